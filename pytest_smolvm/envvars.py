"""The guest's environment file: shell text in, shell text out, for any value."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

ENV_FILE = "/etc/profile.d/smolvm_env.sh"
_HEADER = "# Kept by pytest-smolvm: changes made here by hand may be lost.\n"

# What shlex.quote makes: bare safe characters, or pieces in single quotes
# between which "'" stands for a single quote.
_EXPORT = re.compile(
    r"^export (?P<key>[A-Za-z_][A-Za-z0-9_]*)="
    r"""(?P<value>(?:'[^']*'|"'"|[A-Za-z0-9@%+=:,./_-])*)$""",
    re.MULTILINE,
)


def render(variables: Mapping[str, str]) -> str:
    """The file's text: one ``export`` per variable, sorted by name."""
    return _HEADER + "".join(
        f"export {key}={shlex.quote(value)}\n" for key, value in sorted(variables.items())
    )


def parse(text: str) -> dict[str, str]:
    """The variables of a file that ``render`` wrote; other lines are passed over."""
    found, position = {}, 0
    while match := _EXPORT.search(text, position):
        found[match["key"]] = _unquote(match["value"])
        position = match.end()
    return found


def _unquote(quoted: str) -> str:
    return "".join(shlex.split(quoted)) if quoted else ""
