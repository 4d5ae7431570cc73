"""Text of a guest's, made harmless for a person's terminal."""

from __future__ import annotations

import re

# Terminal escape sequences (ECMA-48) and other control characters: what a guest
# prints must not drive the terminal of whoever reads the report.
_COLOUR = r"\x1b\[[0-9;:]*m"
_ESCAPES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
_ANY_ESCAPE = re.compile(_ESCAPES)
_ESCAPE_BUT_COLOUR = re.compile(f"(?!{_COLOUR}){_ESCAPES}")
_KEPT = r"\t\n\x20-\x7e\xa0-\u2027\u202f-\u2065\u2070-\ud7ff\ue000-\U0010ffff"
"""Not control characters, nor those that change the direction of text, nor surrogates."""
_CONTROLS = re.compile(f"[^{_KEPT}]")
_CONTROLS_BUT_COLOUR = re.compile(f"(?!{_COLOUR})[^{_KEPT}]")
_LINE_CHARS = 1000


def harmless(text: str) -> str:
    """``text`` without what could drive a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", _ANY_ESCAPE.sub("", _with_newlines(text)))


def harmless_but_coloured(text: str) -> str:
    """Like ``harmless``, but colours stay; they end with the text."""
    text = _ESCAPE_BUT_COLOUR.sub("", _with_newlines(text))
    text = _CONTROLS_BUT_COLOUR.sub("\N{REPLACEMENT CHARACTER}", text)
    return f"{text}\x1b[0m" if "\x1b" in text else text


def short_lines(text: str) -> list[str]:
    """The lines of a harmless text, those that are very long without their middle."""
    return [
        line
        if len(line) <= _LINE_CHARS
        else f"{line[: _LINE_CHARS // 2]}[... {len(line) - _LINE_CHARS} characters ...]"
        f"{line[-_LINE_CHARS // 2 :]}"
        for line in text.splitlines()
    ]


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
