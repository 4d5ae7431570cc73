"""Which VMs the tests that come next will want, as far as that can be known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_smolvm.config import VMConfig
from pytest_smolvm.errors import SmolVMError
from pytest_smolvm.image_builder import ImageBuilder
from pytest_smolvm.images.projects import find_project
from pytest_smolvm.plugin import fixtures
from pytest_smolvm.plugin.preparation import preparation_of
from pytest_smolvm.plugin.settings import settings_of
from pytest_smolvm.plugin.summary import wants_vm_of_its_own
from pytest_smolvm.plugin.wanted import Wanted, WrongMarkerError, wanted_by
from pytest_smolvm.pool import Wish

_LOOK_AHEAD = 50
_FIXTURES = ("smolvm", "smolvm_config", "smolvm_images")


class Foresight:
    """Knows what a test will ask for: what the last one of its kind got, or what the settings say.

    Tests of a kind have equal settings and markers, and the same fixtures to make a
    configuration of them.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._settings = settings_of(config)
        self._known: dict[str, VMConfig] = {}
        self._wrong: set[str] = set()

    def learn(self, item: pytest.Item, config: VMConfig, wanted: Wanted) -> None:
        """``item`` has asked for this."""
        kind = _kind(item, wanted)
        known = self._known.get(kind)
        if known is not None and pool_key(known, wanted) != pool_key(config, wanted):
            self._wrong.add(kind)  # each test gets another: there is no knowing
        self._known[kind] = config

    def wishes(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Iterator[tuple[pytest.Item, Wanted, Wish]]:
        """What the tests after ``item`` will want, in their order."""
        for coming in _upcoming(item, nextitem):
            if not wants_vm_of_its_own(coming):
                continue
            try:
                wanted = wanted_by(coming, self._settings)
            except WrongMarkerError:
                continue  # that test's own error
            config = self.foresee(coming, wanted)
            if config is None:
                continue
            preparation, problem = preparation_of(wanted)
            if not problem:
                yield (
                    coming,
                    wanted,
                    Wish(
                        pool_key(config, wanted),
                        config,
                        wanted.accel,
                        wanted.restore,
                        preparation,
                        wanted.boot_timeout,
                    ),
                )

    def foresee(self, item: pytest.Item, wanted: Wanted) -> VMConfig | None:
        """What the test will ask for, but for the id; None: there is no knowing.

        A VM that is to have a certain id is nobody else's business.
        """
        kind = _kind(item, wanted)
        known = self._known.get(kind)
        if kind in self._wrong or "vm_id" in wanted.config_fields:
            return None
        if known is not None:
            return None if "vm_id" in known.model_fields_set else known
        changed = self._config.hook.pytest_smolvm_config.get_hookimpls()
        ours = all(_is_ours(definition) for definition in _definitions(item))
        if changed or not ours:
            return None
        try:
            # An image is built for the test that wants it, and with its lines on the screen.
            images = ImageBuilder(project=find_project(self._config.rootpath), make_missing=False)
            return fixtures.config_of(wanted, images)
        except (ValueError, TypeError, SmolVMError, OSError):
            return None  # that test's own error


def pool_key(config: VMConfig, wanted: Wanted) -> str:
    """Equal for what the same VM can serve."""
    fields = config.model_dump(mode="json", exclude={"vm_id"})
    preparation, problem = preparation_of(wanted)
    prepared = preparation.key if preparation and not problem else problem
    return json.dumps([fields, wanted.accel, wanted.restore, prepared], sort_keys=True)


def _upcoming(item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.Item]:
    if nextitem is None:
        return []
    if hasattr(item.config, "workerinput"):
        # xdist's worker has collected all tests, and is told of the next one only.
        return [nextitem]
    items = item.session.items
    try:
        first = items.index(nextitem, items.index(item))
    except ValueError:
        return [nextitem]
    return items[first : first + _LOOK_AHEAD]


def _kind(item: pytest.Item, wanted: Wanted) -> str:
    facts = [wanted.config_fields, wanted.image, wanted.arch, wanted.accel, wanted.restore]
    preparation, problem = preparation_of(wanted)
    made_by = [id(definition) for definition in _definitions(item)]
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    theirs = [repr(parameters.get(name)) for name in _FIXTURES]
    key = preparation.key if preparation else ""
    return json.dumps([facts, key, problem, made_by, theirs], default=str, sort_keys=True)


def _definitions(item: pytest.Item) -> list[Any]:
    found = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    return [definition for name in _FIXTURES for definition in found.get(name, ())]


def _is_ours(definition: Any) -> bool:
    return getattr(definition.func, "__module__", "") == fixtures.__name__
