"""Options, ini keys and markers: one rule, and clear words for what is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

SHOW_CONFIG = """
    import pytest

    {mark}
    def test_show(smolvm_config):
        c = smolvm_config
        print("CONFIG", c.backend, c.vcpu_count, c.mem_size_mib, c.disk_mode, c.network)
        print("ENV", c.env_vars)
        print("ARGS", c.boot_args)
        print("PATHS", c.kernel_path, c.rootfs_path, c.initrd_path)
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-s", *arguments)


def test_the_defaults_are_the_configurations_and_boot_to_ssh(
    pytester: pytest.Pytester, files: dict[str, Path]
) -> None:
    pytester.makepyfile(SHOW_CONFIG.format(mark=""))
    result = run(pytester, "--smolvm-kernel=kernel", "--smolvm-rootfs=rootfs")
    result.stdout.fnmatch_lines(
        [
            "*CONFIG None 2 512 isolated isolated",
            "ENV {}",
            "ARGS console=ttyS0 reboot=k panic=1 pci=off root=/dev/vda rw init=/init",
            f"PATHS {files['kernel']} {files['rootfs']} None",
        ]
    )


def test_ini_options_are_taken_with_paths_relative_to_their_file(
    pytester: pytest.Pytester, files: dict[str, Path]
) -> None:
    pytester.makeini(
        """
        [pytest]
        smolvm_backend = qemu
        smolvm_vcpu_count = 1
        smolvm_mem_size_mib = 200
        smolvm_disk_mode = shared
        smolvm_network = nat
        smolvm_boot_args = quiet init=/init
        smolvm_kernel_path = kernel
        smolvm_rootfs_path = rootfs
        smolvm_initrd_path = initrd
        smolvm_env_vars =
            A=1
            B=two words = three
        """
    )
    pytester.makepyfile(SHOW_CONFIG.format(mark=""))
    (pytester.path / "sub").mkdir()
    os.chdir(pytester.path / "sub")
    result = run(pytester, "..", "--strict-config")
    result.stdout.fnmatch_lines(
        [
            "*CONFIG qemu 1 200 shared nat",
            "ENV {'A': '1', 'B': 'two words = three'}",
            "ARGS quiet init=/init",
            f"PATHS {files['kernel']} {files['rootfs']} {files['initrd']}",
        ]
    )


def test_marker_beats_command_line_beats_ini(
    pytester: pytest.Pytester, files: dict[str, Path]
) -> None:
    pytester.makeini(
        """
        [pytest]
        smolvm_backend = firecracker
        smolvm_network = nat
        smolvm_mem_size_mib = 200
        smolvm_vcpu_count = 3
        smolvm_kernel_path = kernel
        smolvm_rootfs_path = rootfs
        """
    )
    mark = "@pytest.mark.smolvm(mem_size_mib=300, network='isolated')"
    pytester.makepyfile(SHOW_CONFIG.format(mark=mark))
    result = run(
        pytester, "--smolvm-backend=qemu", "--smolvm-network=nat", "-o", "smolvm_vcpu_count=4"
    )
    result.stdout.fnmatch_lines(["*CONFIG qemu 4 300 isolated isolated"])


def test_markers_of_function_class_and_module_merge_key_by_key(
    pytester: pytest.Pytester, files: dict[str, Path]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.smolvm(
            kernel_path="kernel", rootfs_path="rootfs", vcpu_count=3, mem_size_mib=300
        )

        @pytest.mark.smolvm(mem_size_mib=400, network="nat")
        class TestGroup:
            @pytest.mark.smolvm(network="isolated")
            def test_show(self, smolvm_config):
                c = smolvm_config
                print("CONFIG", c.vcpu_count, c.mem_size_mib, c.network)
        """
    )
    run(pytester).stdout.fnmatch_lines(["*CONFIG 3 400 isolated"])


@pytest.mark.parametrize(
    ("mark", "named"),
    [
        ("mem_size=256", "*has no argument 'mem_size': the valid ones are*mem_size_mib*"),
        ("256", "*takes keyword arguments only, not (256,)*"),
        ("mem_size_mib=64", "*greater than or equal to 128*input_value=64*"),
        ("disk_mode='mine'", "*'isolated' or 'shared'*input_value='mine'*"),
        ("image='nope'", "*there is no image called 'nope': the images are 'micro'*"),
    ],
)
def test_a_wrong_marker_is_an_error_of_its_test_alone_and_boots_nothing(
    pytester: pytest.Pytester, files: dict[str, Path], mark: str, named: str
) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.smolvm({mark})
        def test_wrong(smolvm):
            pass

        def test_other():
            pass
        """
    )
    paths = [] if "image" in mark else ["--smolvm-kernel=kernel", "--smolvm-rootfs=rootfs"]
    result = run(pytester, *paths)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines([named])


@pytest.mark.parametrize(
    ("ini", "named"),
    [
        ("smolvm_backend = xen", "*smolvm_backend = 'xen'*auto, qemu, firecracker*"),
        ("smolvm_network = lan", "*smolvm_network = 'lan'*isolated, nat*"),
        ("smolvm_mem_size_mib = lots", "*smolvm_mem_size_mib*'lots'*128 to 16384*"),
        ("smolvm_env_vars = A", "*smolvm_env_vars*'A' is not of the form KEY=value*"),
    ],
)
def test_a_wrong_ini_value_is_a_usage_error_before_any_test(
    pytester: pytest.Pytester, ini: str, named: str
) -> None:
    pytester.makeini(f"[pytest]\n{ini}\n")
    pytester.makepyfile("def test_never():\n    raise SystemExit('ran')")
    result = pytester.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {named}"])


def test_a_wrong_option_is_answered_with_the_right_ones(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--smolvm-backend=xen")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--smolvm-backend*invalid choice: 'xen'*qemu*firecracker*"])


def test_the_marker_is_registered_and_the_fixtures_explain_themselves(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.smolvm\ndef test_one():\n    pass\n")
    assert pytester.runpytest_subprocess("--strict-markers").ret == 0
    pytester.runpytest_subprocess("--markers").stdout.fnmatch_lines(["@pytest.mark.smolvm(*"])
    fixtures = pytester.runpytest_subprocess("--fixtures").stdout.str()
    for name in ("smolvm", "smolvm_config", "smolvm_factory", "smolvm_images"):
        assert re.search(rf"^{name}\b.*\n    \S", fixtures, re.MULTILINE), name


def test_collecting_boots_and_builds_nothing(pytester: pytest.Pytester, own_state: Path) -> None:
    pytester.makepyfile("def test_one(smolvm):\n    pass\n")
    for option in ("--collect-only", "--setup-plan"):
        assert pytester.runpytest_subprocess(option).ret == 0
    assert not own_state.exists()


def test_the_configuration_can_be_overridden_by_a_fixture(
    pytester: pytest.Pytester, files: dict[str, Path]
) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def smolvm_config(smolvm_config):
            return smolvm_config.model_copy(update={"mem_size_mib": 333})

        def test_show(smolvm_config):
            print("MEMORY", smolvm_config.mem_size_mib)
        """
    )
    result = run(pytester, "--smolvm-kernel=kernel", "--smolvm-rootfs=rootfs")
    result.stdout.fnmatch_lines(["*MEMORY 333"])
