"""What a guest says: it drives no terminal, and breaks no report."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

TEST = r"""
    import pytest
    from pytest_smolvm import SmolVMError

    # Invalid UTF-8, escapes, NULs and what ends a CDATA section; said by the guest alone.
    LINE = "printf '\\033]0;title\\007\\033[2J\\033[31mred\\033[0m]]>\\000<&\\233XK\\377end\\n'"

    def test_prints(smolvm):
        print(smolvm.run(LINE).stdout)
        smolvm.run(f"{LINE} > /dev/console; {LINE} >&2; exit 3", check=True)

    def test_compares(smolvm):
        assert smolvm.run(LINE).output == "something else"

    def test_raises(smolvm):
        raise ValueError(smolvm.run(LINE).output)

    def test_cannot_read(smolvm):
        smolvm.run(f"mkdir -p /evil && cat > /evil/sh && chmod +x /evil/sh",
                   input=f"#!/bin/sh\n{LINE} >&2; exit 1\n", check=True)
        smolvm.run("echo /evil/sh >> /etc/shells", check=True)
        smolvm.run("sed -i 's,:/bin/sh$,:/evil/sh,' /etc/passwd", check=True)
        smolvm.close()
        smolvm.read_text("/etc/passwd")

    def test_a_long_line(smolvm):
        line = "head -c {} /dev/zero | tr '\\0' x"
        smolvm.run(f"{line.format(500000)} > /dev/console", timeout=100)
        smolvm.run(f"{line.format(3000000)}; exit 1", timeout=100, check=True)

    def test_passes(smolvm):
        print(smolvm.run(LINE).stdout)
"""


def test_what_a_guest_says_drives_no_terminal_and_breaks_no_report(
    pytester: pytest.Pytester, micro: tuple[Path, Path]
) -> None:
    pytester.makepyfile(TEST)
    pytester.makeini("[pytest]\njunit_logging = all\nlog_file = run.log\nlog_file_level = debug\n")
    result = pytester.runpytest_subprocess(
        "--smolvm-retain=none", "--junitxml=out.xml", "-rA", "--color=no", timeout=300
    )
    result.assert_outcomes(passed=1, failed=5)
    text = result.stdout.str() + result.stderr.str()
    assert "]]>" in text
    # Colours of what the test itself printed may stay; whatever else begins with ESC may not.
    assert re.sub(r"\x1b\[[0-9;]*m", "", text).count("\x1b") == 0
    for character in "\x07\x9b\0":
        assert character not in text
    assert max(len(line) for line in text.splitlines()) < 25_000
    assert len(text) < 400_000
    cases = ET.parse(pytester.path / "out.xml").getroot().iter("testcase")
    by_name = {case.get("name"): case for case in cases}
    assert len(by_name) == 6
    assert "]]>" in "".join(by_name["test_raises"].itertext())
    log = (pytester.path / "run.log").read_text(errors="strict")
    assert "\x1b" not in log
