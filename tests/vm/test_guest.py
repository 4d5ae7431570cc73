"""Working inside a guest: commands, files, variables, waits, ports."""

from __future__ import annotations

import concurrent.futures
import shlex
import shutil
import socket
import stat
import subprocess
import urllib.request
from pathlib import Path

import pytest

from pytest_smolvm import (
    CommandFailedError,
    OperationTimeoutError,
    SmolVM,
    SmolVMError,
)
from tests.unit.test_envvars import VALUES


def test_a_command_returns_status_output_and_time(guest: SmolVM) -> None:
    result = guest.run("echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")
    assert result.command == "echo out; echo err >&2; exit 3"
    assert result.duration_s > 0
    assert not result.ok
    with pytest.raises(CommandFailedError, match="exit status 3"):
        guest.run("exit 3", check=True)


def test_a_list_of_arguments_is_taken_literally(guest: SmolVM) -> None:
    words = ["a b", "$HOME", "it's", "*", "", "new\nline"]
    assert guest.run(["printf", "%s|", *words]).stdout == "|".join(words) + "|"


def test_input_directory_and_environment_reach_the_command(guest: SmolVM) -> None:
    assert guest.run("cat", input="text ü").stdout == "text ü"
    assert guest.run("wc -c", input=b"\0\1\2").output == "3"
    assert guest.run("cat").stdout == ""
    assert guest.run("pwd", cwd="/etc").output == "/etc"
    assert guest.run('echo "$KEY"', env={"KEY": "it's"}).output == "it's"
    assert guest.run('echo "$KEY"').output == ""


def test_large_input_is_passed_whole(guest: SmolVM) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB
    assert guest.run("sha256sum", 120, input=data).output.split()[0] == sha256(data)


def test_a_login_shell_reads_the_profile_and_a_raw_one_does_not(guest: SmolVM) -> None:
    guest.set_env_vars({"ONLY_LOGIN": "yes"})
    assert guest.run("echo $ONLY_LOGIN").output == "yes"
    assert guest.run("echo $ONLY_LOGIN", shell="raw").output == ""
    guest.unset_env_vars(["ONLY_LOGIN"])


def test_output_that_is_not_utf_8_is_shown_all_the_same(guest: SmolVM) -> None:
    assert guest.run(r"printf 'a\377b'").stdout == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_on_either_stream_does_not_stall(guest: SmolVM, stream: str) -> None:
    megabytes = 100 if stream == "stdout" else 8
    redirect = "" if stream == "stdout" else " >&2"
    result = guest.run(f"head -c {megabytes << 20} /dev/zero{redirect}; echo done", timeout=180)
    assert result.ok
    assert len(getattr(result, stream)) >= megabytes << 20
    assert result.stdout.endswith("done\n")


def test_both_streams_are_drained_together(guest: SmolVM) -> None:
    result = guest.run(
        "for i in 1 2 3 4; do head -c 1048576 /dev/zero; head -c 1048576 /dev/zero >&2; done",
        timeout=120,
    )
    assert len(result.stdout) == 4 << 20
    assert len(result.stderr) == 4 << 20


def test_a_command_past_its_timeout_is_killed_with_all_its_children(guest: SmolVM) -> None:
    with pytest.raises(OperationTimeoutError) as caught:
        guest.run("echo before; sleep 4321 & sh -c 'sleep 4322'; echo after", timeout=3)
    error = caught.value
    assert error.timeout_s == 3
    assert "sleep 4322" in error.operation
    assert error.stdout == "before\n"
    assert "killed in the guest\n--- stdout ---\nbefore\n" in str(error)
    assert "sleep 432" not in guest.run("ps | grep -v grep").stdout
    assert guest.run("echo alive").output == "alive"


def test_a_command_that_leaves_a_daemon_behind_is_over_when_it_is_over(guest: SmolVM) -> None:
    result = guest.run("sleep 60 & echo started", timeout=20)
    assert result.output == "started"
    guest.run("kill %1 2>/dev/null; killall sleep")


def test_a_timeout_must_be_a_time(guest: SmolVM) -> None:
    with pytest.raises(SmolVMError, match=r"timeout=-1 is not valid: give seconds"):
        guest.run("true", timeout=-1)


def test_commands_may_run_side_by_side(guest: SmolVM) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        outputs = pool.map(lambda n: guest.run(f"sleep 0.1; echo {n}").output, range(16))
    assert list(outputs) == [str(n) for n in range(16)]


def test_the_connection_is_kept_and_renewed_when_it_breaks(guest: SmolVM) -> None:
    first = guest.run("echo $SSH_CONNECTION").output
    assert guest.run("echo $SSH_CONNECTION").output == first
    guest.close()
    assert guest.run("echo $SSH_CONNECTION").output != first


def test_files_go_in_and_come_out_with_their_modes(guest: SmolVM, tmp_path: Path) -> None:
    local = tmp_path / "tool"
    data = b"#!/bin/sh\necho works\n" + bytes(range(256)) * 1000
    local.write_bytes(data)
    local.chmod(0o750)
    guest.put(local, "/root/new/folder/tool")
    assert guest.run("stat -c '%a %U' /root/new/folder/tool").output == "750 root"
    guest.get("/root/new/folder/tool", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o750


def test_a_file_goes_into_a_folder_that_is_there(guest: SmolVM, tmp_path: Path) -> None:
    local = tmp_path / "it's a file"
    local.write_text("text")
    guest.run("mkdir -p /root/in")
    guest.put(local, "/root/in")
    guest.put(local, "/root/also-new/")
    for folder in ("in", "also-new"):
        assert guest.read_text(f"/root/{folder}/it's a file") == "text"
    guest.get("/root/in/it's a file", tmp_path)
    assert local.read_text() == "text"


def test_trees_go_in_and_come_out_whole(guest: SmolVM, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / "empty").mkdir(parents=True)
    (tree / "deep" / "file").write_text("x")
    (tree / "deep" / "file").chmod(0o640)
    (tree / "link").symlink_to("deep/file")
    (tree / "odd ' name").write_bytes(b"\0\xff")
    guest.put(tree, "/root/tree")
    assert guest.run("readlink /root/tree/link").output == "deep/file"
    assert guest.run("stat -c '%a %u' /root/tree/deep/file").output == "640 0"
    guest.get("/root/tree", tmp_path / "back")
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    back = tmp_path / "back"
    assert sorted(str(path.relative_to(back)) for path in back.rglob("*")) == names
    assert (back / "odd ' name").read_bytes() == b"\0\xff"
    assert (back / "link").readlink() == Path("deep/file")
    assert stat.S_IMODE((back / "deep/file").stat().st_mode) == 0o640


def test_what_cannot_be_copied_is_an_error_that_names_it(guest: SmolVM, tmp_path: Path) -> None:
    with pytest.raises(SmolVMError, match="no such file or directory: /root/none"):
        guest.get("/root/none", tmp_path / "x")
    with pytest.raises(SmolVMError, match="missing is neither a file nor a directory"):
        guest.put(tmp_path / "missing", "/root/x")
    with pytest.raises(SmolVMError, match="/proc/version"):
        guest.write_text("/proc/version", "text")
    with pytest.raises(SmolVMError, match="/root/none"):
        guest.read_text("/root/none")
    assert not (tmp_path / "x").exists()


def test_text_files_are_read_and_written(guest: SmolVM) -> None:
    text = "ü\n'quotes' \"and\" $dollars\\\n\n"
    guest.write_text("/root/a/new/text", text)
    assert guest.read_text("/root/a/new/text") == text
    guest.run(r"printf '\377' > /root/binary")
    with pytest.raises(SmolVMError, match="not UTF-8"):
        guest.read_text("/root/binary")


def test_variables_of_any_value_reach_login_shells(guest: SmolVM) -> None:
    variables = {f"V{n}": value for n, value in enumerate(VALUES)}
    assert guest.set_env_vars(variables, merge=False) == sorted(variables)
    assert guest.list_env_vars() == variables
    for name, value in variables.items():
        # sha256sum rather than the value: "\r" and the like are then no matter.
        printed = guest.run(f'printf %s "${name}" | sha256sum').output.split()[0]
        assert printed == sha256(value.encode()), name
    guest.unset_env_vars(list(variables))


def test_variables_are_merged_replaced_and_removed(guest: SmolVM) -> None:
    assert guest.set_env_vars({"A": "1", "B": "2"}, merge=False) == ["A", "B"]
    assert guest.set_env_vars({"B": "3", "C": "4"}) == ["A", "B", "C"]
    assert guest.list_env_vars() == {"A": "1", "B": "3", "C": "4"}
    assert guest.unset_env_vars(["A", "NONE"]) == {"A": "1"}
    assert guest.set_env_vars({"D": "5"}, merge=False) == ["D"]
    assert guest.run('echo "$A$B$C$D"').output == "5"
    assert guest.unset_env_vars(["D"]) == {"D": "5"}
    assert guest.list_env_vars() == {}
    with pytest.raises(SmolVMError, match="'1A'"):
        guest.set_env_vars({"1A": "x"})


def test_waiting_ends_with_the_condition(guest: SmolVM) -> None:
    guest.run("rm -f /root/flag; (sleep 0.5; touch /root/flag) >/dev/null 2>&1 &")
    assert guest.wait_until("ls /root/flag", timeout=20).output == "/root/flag"


def test_a_wait_in_vain_shows_the_last_try(guest: SmolVM) -> None:
    with pytest.raises(OperationTimeoutError) as caught:
        guest.wait_until("echo not yet; false", timeout=2)
    assert "echo not yet; false" in caught.value.operation
    assert "last try" in str(caught.value)
    assert caught.value.stdout == "not yet\n"
    with pytest.raises(OperationTimeoutError, match=r"port 9999.*22"):
        guest.wait_for_port(9999, timeout=2)
    with pytest.raises(OperationTimeoutError, match="no try came to an end") as caught:
        guest.wait_until("echo started; sleep 1000", timeout=3)
    assert caught.value.stdout == "started\n"


def test_a_port_of_the_guest_is_exposed_where_asked_and_taken_back(guest: SmolVM) -> None:
    guest.run("mkdir -p /root/www; echo hello > /root/www/index.html; httpd -p 8080 -h /root/www")
    guest.wait_for_port(8080)
    port = guest.expose_local(8080)
    assert fetch(port) == "hello\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        wanted = free.getsockname()[1]
    assert guest.expose_local(8080, wanted) == wanted
    assert fetch(wanted) == "hello\n"
    for taken in (port, wanted):
        guest.unexpose_local(taken)
        with pytest.raises(OSError, match="refused"):
            fetch(taken)
    guest.run("killall httpd")


def test_a_port_that_is_taken_or_is_none_is_an_error_that_names_it(guest: SmolVM) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SmolVMError, match=f"port {port} of 127.0.0.1 cannot be forwarded"):
            guest.expose_local(8080, port)
    for wrong in (0, 65536, -1):
        with pytest.raises(SmolVMError, match="not a TCP port"):
            guest.expose_local(wrong)
    with pytest.raises(SmolVMError, match=r"port 1 of 127.0.0.1 is not forwarded"):
        guest.unexpose_local(1)


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh client on this host")
def test_the_lines_to_paste_get_one_in(guest: SmolVM, tmp_path: Path) -> None:
    lines = guest.ssh_commands()
    done = subprocess.run(
        [*shlex.split(lines["ssh"]), "echo pasted"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout == "pasted\n"


def test_the_network_is_isolated_but_for_the_hosts_way_in(guest: SmolVM) -> None:
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        service.listen()
        port = service.getsockname()[1]
        for address in ("10.0.2.2", "10.0.2.3"):
            result = guest.run(f"nc -w 2 {address} {port} < /dev/null", timeout=20)
            assert not result.ok, address
        assert not guest.run("nslookup localhost.example 10.0.2.3", timeout=30).ok
        service.settimeout(0.2)
        with pytest.raises(TimeoutError):
            service.accept()


def test_the_console_has_what_the_guest_wrote_there(guest: SmolVM) -> None:
    guest.run("echo a line for the console > /dev/console")
    assert "a line for the console" in guest.console
    assert "Linux version" in guest.console


def test_each_phase_of_the_start_was_timed(guest: SmolVM) -> None:
    phases = {"disk", "launch", "restore" if guest.restored else "boot", "ssh"}
    assert set(guest.timings) - {"template"} == phases
    assert all(seconds > 0 for seconds in guest.timings.values())


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as response:
        return str(response.read().decode())


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
