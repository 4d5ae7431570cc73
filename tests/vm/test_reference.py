"""The examples of the configuration reference, run as written, on real guests.

Only the import's name is changed, and the paths are made real.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, SmolVM, VMConfig
from pytest_smolvm.keys import library_key_pair
from pytest_smolvm.store import shared_store
from tests.conftest import qemu_pids

BASIC = """
config = VMConfig(
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/path/to/rootfs.ext4"),
)

print(config.vm_id)  # Auto-generated, e.g., "vm-a1b2c3d4"
print(config.vcpu_count)  # 2 (default)
print(config.mem_size_mib)  # 512 (default)
"""

CUSTOM_ID = """
config = VMConfig(
    vm_id="my-custom-vm",
    vcpu_count=4,
    mem_size_mib=2048,
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/path/to/rootfs.ext4"),
)
"""

ENV_VARS = """
config = VMConfig(
    vm_id="api-server",
    vcpu_count=2,
    mem_size_mib=1024,
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/path/to/alpine-ssh.ext4"),
    boot_args=SSH_BOOT_ARGS,  # Includes init=/init for SSH support
    env_vars={
        "API_KEY": "secret-key",
        "DATABASE_URL": "postgresql://localhost/mydb",
        "LOG_LEVEL": "debug",
    },
)
"""

SHARED = """
# Multiple VMs can boot from the same rootfs
config = VMConfig(
    vm_id="shared-vm-1",
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/shared/rootfs.ext4"),
    disk_mode="shared",
)
"""

PERSISTENT = """
# Keep VM disk after deletion for state persistence
config = VMConfig(
    vm_id="stateful-vm",
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/path/to/rootfs.ext4"),
    disk_mode="isolated",
    retain_disk_on_delete=True,
)

# Later, create a new VM with the same ID to reuse the disk
config2 = VMConfig(
    vm_id="stateful-vm",  # Same ID
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/path/to/rootfs.ext4"),
    disk_mode="isolated",
)
"""

QEMU = """
config = VMConfig(
    vm_id="qemu-vm",
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/path/to/rootfs.ext4"),
    backend="qemu",
    boot_args="console=ttyAMA0 reboot=k panic=1 init=/init",
)
"""

INTEGRATION = """
config = VMConfig(
    vm_id="my-vm",
    vcpu_count=2,
    mem_size_mib=512,
    kernel_path=Path("/path/to/vmlinux"),
    rootfs_path=Path("/path/to/rootfs.ext4"),
    boot_args="console=ttyS0 reboot=k panic=1 init=/init",
)

with SmolVM(config) as vm:
    result = vm.run("echo 'Hello from configured VM'")
    print(result.stdout)
"""

BUILDER = """
from pytest_smolvm import ImageBuilder, VMConfig, SmolVM
from pathlib import Path

# Build an SSH-capable image
builder = ImageBuilder()
public_key = Path("~/.ssh/id_rsa.pub").expanduser().read_text()

kernel, rootfs = builder.build_micro_ssh_key(
    public_key=public_key,
    name="my-alpine",
    rootfs_size_mb=512,
)

# Use the built images in VMConfig
config = VMConfig(
    vm_id="alpine-vm",
    kernel_path=kernel,
    rootfs_path=rootfs,
    boot_args="console=ttyS0 reboot=k panic=1 init=/init",
)

with SmolVM(config) as vm:
    result = vm.run("cat /etc/os-release")
    print(result.stdout)
"""


@pytest.fixture
def run_example(micro: tuple[Path, Path]) -> Any:
    kernel, rootfs = micro

    def run(text: str) -> dict[str, Any]:
        text = re.sub(r'Path\("/[^"]*vmlinux"\)', f"Path({str(kernel)!r})", text)
        text = re.sub(r'Path\("/[^"]*\.ext4"\)', f"Path({str(rootfs)!r})", text)
        names: dict[str, Any] = {
            "VMConfig": VMConfig,
            "SmolVM": SmolVM,
            "SSH_BOOT_ARGS": SSH_BOOT_ARGS,
            "Path": Path,
        }
        exec(compile(textwrap.dedent(text), "example", "exec"), names)  # noqa: S102
        return names

    return run


def with_ssh(config: VMConfig, **changes: Any) -> VMConfig:
    return config.model_copy(update={"boot_args": SSH_BOOT_ARGS, "mem_size_mib": 256, **changes})


def test_basic_configuration(run_example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(BASIC)
    vm_id, vcpus, memory = capsys.readouterr().out.split()
    assert re.fullmatch("vm-[0-9a-f]{8}", vm_id)
    assert (vcpus, memory) == ("2", "512")


def test_custom_id_and_resources_are_what_the_guest_has(run_example: Any) -> None:
    config = run_example(CUSTOM_ID)["config"]
    assert config.boot_args == "console=ttyS0 reboot=k panic=1 pci=off"
    with SmolVM(with_ssh(config, mem_size_mib=2048)) as vm:
        assert vm.vm_id == "my-custom-vm"
        assert vm.run("nproc").output == "4"
        total_kib = int(vm.run("grep MemTotal /proc/meminfo").output.split()[1])
        assert 1900 * 1024 < total_kib <= 2048 * 1024


def test_environment_variables_are_in_a_login_shell(run_example: Any) -> None:
    config = run_example(ENV_VARS)["config"]
    with SmolVM(config) as vm:
        printed = vm.run('echo "$API_KEY|$DATABASE_URL|$LOG_LEVEL"').output
        assert printed == "secret-key|postgresql://localhost/mydb|debug"
        assert vm.list_env_vars() == config.env_vars
        assert "secret-key" in vm.read_text("/etc/profile.d/smolvm_env.sh")
        qemu = Path(f"/proc/{max(qemu_pids())}/cmdline").read_bytes()
        assert b"secret-key" not in qemu


def test_a_shared_disk_serves_two_vms_at_once_and_takes_no_writes(run_example: Any) -> None:
    first = with_ssh(run_example(SHARED)["config"])
    second = first.model_copy(update={"vm_id": "shared-vm-2", "env_vars": {"WHO": "second"}})
    before = fingerprint_of(first.rootfs_path)
    with SmolVM(first) as one, SmolVM(second) as two:
        assert one.run("echo one").output == "one"
        assert two.run("echo $WHO").output == "second"
        written = two.run("echo text > /root/file")
        assert not written.ok
        assert "Read-only file system" in written.stderr
        with pytest.raises(Exception, match="disk_mode='shared'"):
            one.write_text("/root/file", "text")
        assert one.run("echo text > /tmp/file && cat /tmp/file").output == "text"
    assert fingerprint_of(first.rootfs_path) == before


def test_a_retained_disk_is_found_again_by_a_vm_of_the_same_id(
    run_example: Any, state_dir: Path
) -> None:
    configs = run_example(PERSISTENT)
    first, second = with_ssh(configs["config"]), with_ssh(configs["config2"])
    with SmolVM(first) as vm:
        vm.write_text("/root/state", "kept")
    assert (state_dir / "vms" / "stateful-vm" / "disk.qcow2").exists()
    with SmolVM(second) as vm:
        assert vm.read_text("/root/state") == "kept"
    assert not (state_dir / "vms" / "stateful-vm").exists()


def test_the_qemu_backend_boots_though_the_console_asked_for_is_another_machines(
    run_example: Any,
) -> None:
    config = run_example(QEMU)["config"]
    with SmolVM(config) as vm:
        assert vm.run("echo $((6 * 7))").output == "42"
        assert "Run /init" in vm.console


def test_a_configuration_is_immutable(run_example: Any) -> None:
    config = run_example(BASIC)["config"]
    with pytest.raises(ValidationError):
        config.vcpu_count = 4
    assert config.model_copy(update={"vcpu_count": 4}).vcpu_count == 4


def test_integration_with_smolvm(run_example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(INTEGRATION)
    assert "Hello from configured VM" in capsys.readouterr().out


def test_an_image_built_with_ones_own_key_lets_its_owner_in(
    run_example: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_rsa_key(ssh / "id_rsa")
    run_example(BUILDER)
    assert "ID=smolvm-micro" in capsys.readouterr().out
    # Built for that key alone, so that it is no use to anybody else.
    builder = ImageBuilder()
    _, rootfs = builder.build_micro_ssh_key(
        (ssh / "id_rsa.pub").read_text(), name="my-alpine", rootfs_size_mb=512
    )
    assert library_key_pair(shared_store()).public_key not in (
        rootfs.with_name("rootfs.ext4.smolvm.json").read_text()
    )
    shutil.rmtree(rootfs.parent)


def write_rsa_key(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_name("id_rsa.pub").write_text(public.decode() + " me@home\n")


def fingerprint_of(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
