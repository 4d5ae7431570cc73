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
        ("image='nope'", "*there is no image called 'nope': the images are micro, debian*"),
        ("image=3", "*image=3*is not valid: give the name of an image*"),
        ("scope='package'", "*scope='package'*use one of function, class, module, session*"),
        ("retain='some'", "*retain='some'*use one of all, failed, none*"),
        ("restore='no'", "*restore='no'*give True or False*"),
        ("boot_timeout=0", "*boot_timeout=0*give seconds, more than 0*"),
        ("prepare=7", "*prepare=7*give a function of the VM, or a list of commands*"),
        ("prepare='true'", "*prepare='true'*a list of commands*"),
        ("vm_id='a b'", "*vm_id*'a b'*"),
        ("accel='tcg'", "*has no argument 'accel': the valid ones are*"),
        ("kernel_path='nope'", "*kernel_path*nope*"),
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
        ("smolvm_scope = package", "*smolvm_scope = 'package'*function, class, module, session*"),
        ("smolvm_retention_policy = some", "*'some' is not valid: use one of all, failed, none*"),
        (
            "smolvm_retention_count = -1",
            "*smolvm_retention_count = *-1*give a whole number, 0 or more*",
        ),
        ("smolvm_retention_max_mib = big", "*smolvm_retention_max_mib*'big'*"),
        ("smolvm_boot_timeout = 0", "*smolvm_boot_timeout*give seconds, more than 0*"),
        ("smolvm_restore = maybe", "*smolvm_restore*'maybe'*"),
        ("smolvm_prefetch = 100", "*smolvm_prefetch = *100*give a whole number, 0 to 64*"),
        ("smolvm_accel = xen", "*smolvm_accel = 'xen'*auto, kvm, hvf, tcg*"),
        ("smolvm_image = nope", "*smolvm_image = 'nope'*micro*"),
        ("smolvm_kernel_path = nope", "*smolvm_kernel_path = '*nope'*there is no such file*"),
        ("smolvm_disk_mode = mine", "*smolvm_disk_mode = 'mine'*isolated, shared*"),
        ("smolvm_vcpu_count = 0", "*smolvm_vcpu_count = *0*give a whole number, 1 to 32*"),
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


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--smolvm-backend=xen", "*--smolvm-backend*invalid choice: 'xen'*qemu*firecracker*"),
        ("--smolvm-scope=package", "*--smolvm-scope*'package'*class*module*session*"),
        ("--smolvm-retain=some", "*--smolvm-retain*'some'*all*failed*none*"),
        ("--smolvm-prefetch=few", "*--smolvm-prefetch = 'few'*give a whole number*"),
        ("--smolvm-boot-timeout=-1", "*--smolvm-boot-timeout = '-1'*give seconds, more than 0*"),
        ("--smolvm-rootfs=nope", "*--smolvm-rootfs = '*nope'*there is no such file*"),
        ("--smolvm-bogus=1", "*unrecognized arguments: --smolvm-bogus=1*"),
    ],
)
def test_a_wrong_option_is_answered_with_the_right_ones(
    pytester: pytest.Pytester, option: str, named: str
) -> None:
    pytester.makepyfile("def test_never():\n    raise SystemExit('ran')")
    result = pytester.runpytest_subprocess(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([named])
    result.stdout.no_fnmatch_line("*test_never*")


def test_an_unknown_ini_key_is_an_error_under_strict_config(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nsmolvm_memory = 5\n")
    result = pytester.runpytest_subprocess("--strict-config")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*Unknown config option: smolvm_memory*"])


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


SHOW_WANTED = """
    import pytest
    from pytest_smolvm.plugin.settings import settings_of
    from pytest_smolvm.plugin.wanted import wanted_by

    {mark}
    def test_show(request):
        w = wanted_by(request.node, settings_of(request.config))
        print("WANTED", w.image, w.scope, w.retain, w.restore, w.boot_timeout)
"""


@pytest.mark.parametrize(
    ("ini", "arguments", "mark", "wanted"),
    [
        ("", [], "", "micro function failed True None"),
        ("scope=class;boot_timeout=7.5;restore=false", [], "", "micro class failed False 7.5"),
        ("retention_policy=all;scope=class", ["scope=module"], "", "micro module all True None"),
        ("restore=true", ["no-restore", "boot-timeout=9"], "", "micro function failed False 9.0"),
        (
            "scope=class;retention_policy=none;boot_timeout=5",
            ["scope=module", "retain=all", "boot-timeout=6"],
            "scope='session', retain='failed', boot_timeout=7, image='other', restore=False",
            "other session failed False 7",
        ),
    ],
)
def test_the_same_rule_holds_for_what_is_no_field_of_the_configuration(
    pytester: pytest.Pytester, ini: str, arguments: list[str], mark: str, wanted: str
) -> None:
    lines = [f"smolvm_{line.replace('=', ' = ')}" for line in ini.split(";") if line]
    pytester.makeini("\n".join(["[pytest]", *lines]))
    pytester.makepyfile(SHOW_WANTED.format(mark=f"@pytest.mark.smolvm({mark})"))
    result = run(pytester, *(f"--smolvm-{argument}" for argument in arguments))
    result.stdout.fnmatch_lines([f"*WANTED {wanted}"])


def test_the_state_directory_is_the_options_then_the_inis_then_the_environments(
    pytester: pytest.Pytester, own_state: Path
) -> None:
    pytester.makepyfile(
        """
        from pytest_smolvm.statedir import default_state_dir
        def test_show(): print("STATE", default_state_dir())
        """
    )
    run(pytester).stdout.fnmatch_lines([f"*STATE {own_state}"])
    pytester.makeini("[pytest]\nsmolvm_state_dir = by-ini\n")
    (pytester.path / "sub").mkdir()
    os.chdir(pytester.path / "sub")
    run(pytester, "..").stdout.fnmatch_lines([f"*STATE {pytester.path}/by-ini"])
    option = "--smolvm-state-dir=by-option"
    run(pytester, "..", option).stdout.fnmatch_lines([f"*STATE {pytester.path}/sub/by-option"])
    assert not own_state.exists()
