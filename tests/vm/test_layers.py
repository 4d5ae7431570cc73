"""Recipes built in guests: each step a layer, made once; a failure that explains itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pytest_smolvm import SSH_BOOT_ARGS, ImageBuilder, ImageError, SmolVM, VMConfig
from pytest_smolvm.disks import chain_of
from tests.conftest import qemu_pids


@pytest.fixture
def cache(micro: tuple[Path, Path], tmp_path: Path) -> Path:
    """A cache with the image micro in it, and nothing else."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (micro[0].parents[1] / "debian", micro[0].parent):
        (folder / path.name).symlink_to(path)
    return folder


class Project:
    """A project with one recipe, which can be changed."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.printed = b""
        self._cache = cache

    def build(self, text: str, name: str = "app", **options: bool) -> tuple[Path, Path]:
        self.lines, self.printed = [], b""
        source = self.folder / "pyproject.toml"
        source.write_text(f"[tool.smolvm.images.app]\nbase = 'micro'\n{text}")
        builder = ImageBuilder(
            self._cache,
            progress=self.lines.append,
            project=source,
            on_output=self._take,
            **options,
        )
        return builder.build(name)

    def _take(self, data: bytes) -> None:
        self.printed += data

    def done(self, what: str) -> int:
        """How many steps said that they do that."""
        return sum(what in line for line in self.lines)


@pytest.fixture
def project(tmp_path: Path, cache: Path, no_templates: Path) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    return Project(folder, cache)


def config_of(image: tuple[Path, Path], **fields: object) -> VMConfig:
    return VMConfig(
        kernel_path=image[0],
        rootfs_path=image[1],
        boot_args=SSH_BOOT_ARGS,
        mem_size_mib=256,
        **fields,
    )


def test_files_and_commands_are_in_the_guests_of_a_recipe(project: Project, cache: Path) -> None:
    site = project.folder / "site"
    (site / "sub").mkdir(parents=True)
    (site / "sub/page").write_text("hello")
    (site / "tool").write_text("#!/bin/sh\necho tool")
    (site / "tool").chmod(0o755)
    text = "files = { 'site' = '/srv/site' }\nrun = ['/srv/site/tool > /one', 'cat /one > /two']"
    image = project.build(text)
    assert project.done("running") == 2
    assert b"== running cat /one > /two" in project.printed
    with SmolVM(config_of(image)) as vm:
        assert vm.run("cat /srv/site/sub/page /two").stdout == "hellotool\n"
        ids = [vm.run("cat /etc/machine-id").output]
    with SmolVM(config_of(image)) as vm:
        assert vm.restored
        assert vm.run("cat /two").output == "tool"
        ids.append(vm.run("cat /etc/machine-id").output)
    assert len({*ids}) == 2
    assert all(len(one) == 32 for one in ids)
    with SmolVM(config_of(image, disk_mode="shared")) as vm:
        assert vm.run("cat /two && touch /three").exit_code == 1
    # Asked for again: nothing is done, nothing is said.
    assert project.build(text) == image
    assert project.lines == []
    # Another last command: only that is done anew.
    changed = project.build(text.replace("cat /one > /two", "wc -l /one"))
    assert changed != image
    assert (project.done("running"), project.done("copying")) == (1, 0)
    assert b"1 /one" in project.printed
    # Another file: all that comes after it.
    (site / "sub/page").write_text("changed")
    project.build(text)
    assert (project.done("running"), project.done("copying")) == (2, 1)
    # No layer repeats what is in those under it.
    (log,) = [image[1].with_name("build.log")]
    assert "running cat /one" in log.read_text()
    assert len(chain_of(image[1])) == 4
    assert image[1].stat().st_blocks * 512 < 4 << 20
    assert cache.joinpath(image[1].parent.name, "rootfs.ext4").stat().st_nlink > 1


def test_a_disk_over_layers_is_kept_and_goes_on(project: Project) -> None:
    image = project.build("run = ['echo built > /built']")
    config = config_of(image, retain_disk_on_delete=True, vm_id="layered-kept")
    with SmolVM(config) as vm:
        vm.run("echo mine > /mine").check()
    vm = SmolVM(config)
    with vm:
        assert vm.run("cat /built /mine").stdout == "built\nmine\n"
        vm.run("sync")
    with SmolVM(config.model_copy(update={"retain_disk_on_delete": False})) as vm:
        assert vm.run("cat /mine").output == "mine"


def test_a_snapshot_over_layers_starts_others(project: Project) -> None:
    image = project.build("run = ['echo built > /built']")
    with SmolVM(config_of(image)) as vm:
        vm.run("echo later > /later").check()
        template = vm.snapshot()
        with SmolVM.from_template(template) as other:
            assert other.run("cat /built /later").stdout == "built\nlater\n"
        template.delete()


def test_a_command_that_fails_shows_what_it_printed_and_leaves_nothing(
    project: Project, cache: Path
) -> None:
    before, running = sorted(cache.glob("app-*/")), qemu_pids()
    with pytest.raises(ImageError) as caught:
        project.build("run = ['echo some words; ls /nowhere', 'echo never']")
    text = str(caught.value)
    assert "building the image 'app' failed at: running echo some words; ls /nowhere" in text
    assert "some words" in text
    assert "/nowhere: No such file or directory" in text
    assert "--- console ---" in text
    log = cache / "logs/app.log"
    assert str(log) in text
    assert "some words" in log.read_text()
    assert b"never" not in project.printed
    assert sorted(cache.glob("app-*/")) == before
    assert not list(cache.glob(".app-*"))
    assert qemu_pids() == running


def test_a_half_built_vm_is_kept_if_asked(project: Project) -> None:
    with pytest.raises(ImageError, match=r"pytest-smolvm ssh vm-[0-9a-f]{8}$") as caught:
        project.build("run = ['echo half > /half; false']", keep_failed=True)
    with SmolVM.from_id(caught.value.details["vm_id"]) as vm:
        assert vm.run("cat /half").output == "half"


def test_packages_without_a_package_manager_are_an_error_that_says_so(project: Project) -> None:
    with pytest.raises(ImageError, match="no package manager here that is known: apt-get, apk"):
        project.build("packages = ['nginx']")


def test_a_recipe_is_used_by_its_name(pytester: pytest.Pytester, never_built: Path) -> None:
    pytester.makepyprojecttoml(
        """
        [tool.smolvm.images.app]
        base = "micro"
        run = ["echo said by the command", "echo built > /built"]
        [tool.pytest.ini_options]
        smolvm_image = "app"
        """
    )
    pytester.makepyfile(
        """
        import pytest

        def test_ini(smolvm):
            assert smolvm.run("cat /built").output == "built"

        @pytest.mark.smolvm(image="micro")
        def test_marker(smolvm):
            assert not smolvm.run("cat /built").ok
        """
    )
    result = pytester.runpytest_subprocess("-v", "--smolvm-retain=none")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        ["smolvm: image app: running echo said*", "smolvm: | said by the command"]
    )
    result = pytester.runpytest_subprocess("--smolvm-image=ap")
    result.stderr.fnmatch_lines(["*--smolvm-image = 'ap' is not valid: use one of micro,*, app,*"])


def test_an_image_that_cannot_be_built_is_tried_once(
    pytester: pytest.Pytester, never_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)  # with which pytest tells each failure twice
    pytester.makepyprojecttoml(
        """
        [tool.smolvm.images.app]
        base = "micro"
        run = ["echo words; false"]
        [tool.pytest.ini_options]
        smolvm_image = "app"
        """
    )
    pytester.makepyfile("def test_one(smolvm):\n    pass\ndef test_two(smolvm):\n    pass")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=2)
    text = result.stdout.str()
    assert text.count("image app: running echo words; false [") == 1
    assert text.count("failed at: running echo words; false") == 2


def test_packages_are_installed(state_dir: Path, tmp_path: Path, no_templates: Path) -> None:
    source = tmp_path / "pyproject.toml"
    source.write_text(
        "[tool.smolvm.images.nc]\nbase = 'debian-12'\npackages = ['netcat-openbsd']\n"
        "run = ['nc -h 2>&1 | head -1 > /nc']"
    )
    base = ImageBuilder(progress=lambda _: None).build("debian-12")
    cache = tmp_path / "images"
    cache.mkdir()
    for path in (base[0].parent, base[0].parents[1] / "debian"):
        (cache / path.name).symlink_to(path)
    image = ImageBuilder(cache, progress=lambda _: None, project=source).build("nc")
    with SmolVM(config_of(image)) as vm:
        assert "OpenBSD netcat" in vm.run("cat /nc").output
        assert "install ok installed" in vm.run("dpkg -s netcat-openbsd").stdout


def test_layers_are_flattened_for_those_who_want_one_raw_file(project: Project) -> None:
    image = project.build("run = ['echo built > /built']")
    flat = ImageBuilder(image[1].parents[1], progress=lambda _: None).flatten(image[1])
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", flat], capture_output=True, check=True
        ).stdout
    )
    assert info["format"] == "raw"
    with SmolVM(config_of((image[0], flat)), restore=False) as vm:
        assert vm.run("cat /built").output == "built"
