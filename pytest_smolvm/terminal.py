"""Text of a guest's, made harmless for a person's terminal."""

from __future__ import annotations

import re

# Terminal escape sequences (ECMA-48) and other control characters: what a guest
# prints must not drive the terminal of whoever reads the report.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]")


def harmless(text: str) -> str:
    """``text`` without what could drive a terminal."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
