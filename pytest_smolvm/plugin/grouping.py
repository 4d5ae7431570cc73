"""pytest-xdist with --dist loadgroup: tests that share a VM stay together on one worker."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from pathlib import PurePath
from typing import Any

import pytest

from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.plugin.wanted import WrongMarkerError, marker_arguments

_name_key = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """With --dist loadgroup, keep tests that share a VM on one worker."""
    if not getattr(config.option, "loadgroup", False):
        return (yield)
    for item in items:
        item.stash[_name_key] = item.nodeid
        group = _group_of(item, config)
        if group and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
    result = yield
    for item in items:
        if any(name.startswith("smolvm") for name in getattr(item, "fixturenames", ())):
            _tell_group(item)
    return result


def name_of(node: pytest.Item | pytest.Collector) -> str:
    """What a person calls a test, and can give to pytest to run it again: without any group."""
    if isinstance(node, pytest.Session):
        return "the session"
    return node.stash.get(_name_key, node.nodeid)


def _tell_group(item: pytest.Item) -> None:
    """See that the group is in the node id, where xdist's scheduler looks for it.

    xdist 3.8 puts it into an attribute that pytest 9.2 has no more, and so
    forgets all groups (pytest-xdist, issue 1386).
    """
    groups = {
        str(marker.args[0] if marker.args else marker.kwargs.get("name", "default"))
        for marker in item.iter_markers("xdist_group")
    }
    suffix = f"@{'_'.join(sorted(groups))}"
    node_id: Any = getattr(item, "_id", None)
    if groups and node_id is not None and not item.nodeid.endswith(suffix):
        item._id = type(node_id).parse(item.nodeid + suffix)


def _group_of(item: pytest.Item, config: pytest.Config) -> str:
    """The same for tests that would share a VM; empty: this one shares none."""
    names = getattr(item, "fixturenames", ())
    if "smolvm_session" in names:
        return "smolvm-session"
    if "smolvm" not in names:
        return ""
    try:
        arguments = marker_arguments(item)
    except WrongMarkerError:
        return ""  # its set-up will say so
    scope = arguments.pop("scope", settings_of(config).scope)
    for name in ("retain", "boot_timeout"):
        arguments.pop(name, None)
    node: Any = {"class": pytest.Class, "module": pytest.Module}.get(scope)
    parent = item.getparent(node) if node else None
    if scope != "session" and parent is None:
        return ""
    told_apart = repr([parent.nodeid if parent else "", _described(arguments)])
    digest = hashlib.sha256(told_apart.encode()).hexdigest()[:8]
    return f"smolvm-{scope}-{digest}"


def _described(value: Any) -> object:
    """What all workers say of a value alike: no addresses, no order of hashes.

    That different values are described alike does no harm: their tests merely stay together.
    """
    if isinstance(value, Mapping):
        return sorted((str(key), _described(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return [_described(entry) for entry in value]
    if isinstance(value, (str, int, float, PurePath, type(None))):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
