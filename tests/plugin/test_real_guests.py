"""The plugin on real guests: what a fake could get wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import qemu_pids
from tests.plugin.runs import interrupt, long_test, start


def test_real_vms_are_booted_one_per_test_and_shown_when_it_fails(
    pytester: pytest.Pytester, no_vms: Path
) -> None:
    others = qemu_pids()
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.smolvm(mem_size_mib=256)
        ids = set()

        @pytest.mark.smolvm(env_vars={"MODE": "test"})
        def test_first(smolvm):
            assert smolvm.run("echo $MODE; touch /root/canary").output == "test"
            ids.add(smolvm.vm_id)

        def test_second(smolvm, smolvm_factory):
            assert not smolvm.run("ls /root/canary").ok
            more = smolvm_factory(mem_size_mib=200, env_vars={"WHO": "another"})
            assert more.run("echo $WHO").output == "another"
            assert len(ids | {smolvm.vm_id, more.vm_id}) == 3
            smolvm.run("printf 'the last \\\\033[31mwords\\\\n' > /dev/console")
            smolvm.run("echo on purpose; exit 3", check=True)
        """
    )
    result = pytester.runpytest_subprocess("--smolvm-backend=qemu", "--smolvm-retain=none")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">*smolvm.run(*check=True)",
            "E *ended with exit status 3*",
            "E *on purpose",
            "test_*.py:*CommandFailedError",
            "*console of vm-* (last * lines)*",
            "the last words",
            "*last commands in vm-*",
            "$ echo on purpose; exit 3",
            "[[]exit status 3, * s]",
            "  on purpose",
            "*where the time of vm-* went*",
            "disk * s, launch * s, * * s, ssh * s, commands (*) * s",
            "*console of vm-*",
            "VMs: * booted, * restored, 0 reused*",
        ],
        consecutive=False,
    )
    counts = re.search(r"VMs: (\d) booted, (\d) restored", result.stdout.str())
    assert counts is not None
    assert int(counts[1]) + int(counts[2]) == 3
    result.stdout.no_fnmatch_line("*guest.py*")  # where in our code it was raised helps nobody
    assert "\x1b[31m" not in result.stdout.str()
    assert list((no_vms / "vms").iterdir()) == []
    assert qemu_pids() == others


def test_a_vm_that_does_not_boot_is_an_error_of_its_test_with_the_console(
    pytester: pytest.Pytester, micro: tuple[Path, Path], no_vms: Path
) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.smolvm(boot_args="panic=1 root=/dev/nothing init=/init")
        def test_panic(smolvm):
            pass
        """
    )
    result = pytester.runpytest_subprocess("--smolvm-image=micro", "--smolvm-retain=none")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*died while booting: the guest's kernel panicked*", "*cannot be mounted*"]
    )
    result.stdout.no_fnmatch_line("*fixtures.py*")
    assert result.stdout.str().count("Kernel panic - not syncing") == 1
    assert list((no_vms / "vms").iterdir()) == []


@pytest.mark.parametrize("when", ["while booting", "in the test"])
def test_ctrl_c_leaves_nothing(
    pytester: pytest.Pytester, micro: tuple[Path, Path], no_vms: Path, when: str
) -> None:
    others = qemu_pids()
    marker = pytester.path / "in-the-test"
    pytester.makepyfile(long_test(marker))
    sign = marker.exists if when == "in the test" else lambda: qemu_pids() - others
    output = interrupt(start("--smolvm-retain=none"), sign)
    assert "KeyboardInterrupt" in output
    assert list((no_vms / "vms").iterdir()) == []
    assert qemu_pids() == others


def test_the_first_build_of_an_image_is_seen(
    pytester: pytest.Pytester, own_state: Path, micro: tuple[Path, Path]
) -> None:
    # The packages are there already; the image is not.
    (own_state / "images").mkdir(parents=True)
    (own_state / "images" / "debian").symlink_to(micro[0].parents[1] / "debian")
    pytester.makepyfile("def test_one(smolvm_config):\n    pass\n")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "smolvm: image micro: unpacking the kernel*",
            "smolvm: image micro: making the root disk*",
            "smolvm: image micro: ready*",
        ]
    )
    assert "image micro" not in pytester.runpytest_subprocess().stdout.str()
