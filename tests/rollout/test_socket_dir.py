"""Where a server's sockets are, whatever TMPDIR is, and that nothing of a server stays. No SGLang is started here."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import sglang_server as module
from megatron_bai.rollout.servers import socket_dir
from megatron_bai.rollout.servers.sglang_server import SGLangServer

PROGRAM = """#!{python}
import os, socket, sys, tempfile, time
from pathlib import Path
listener = socket.socket(socket.AF_UNIX)
listener.bind(tempfile.NamedTemporaryFile().name)  # as SGLang chooses them
instance = sys.argv[sys.argv.index("--instance") + 1]
Path(f"{memory}/sglang_loads_{{instance[:12]}}_1.shm").touch()
print("TMPDIR", os.environ["TMPDIR"], flush=True)
{then}
"""


@pytest.fixture
def short(tmp_path: Path) -> Path:  # whose parent is made before TMPDIR is changed
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(params=["short", "of 150 characters", "missing", "a file"])
def temporary(request: pytest.FixtureRequest, short: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """TMPDIR of every kind; where nothing can be written in it Python's tempfile takes another."""
    names = {"short": "d", "of 150 characters": "d" * 150, "missing": "none", "a file": "file"}
    directory = short / names[request.param]
    if request.param == "a file":
        directory.touch()
    elif request.param != "missing":
        directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return request.param


@pytest.mark.parametrize("then", ["time.sleep(600)", "sys.exit(3)"])
def test_sockets_can_be_bound_and_nothing_stays(
    temporary: str, then: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    memory = short / "shm"
    memory.mkdir()
    (memory / "sglang_loads_other_1.shm").touch()
    monkeypatch.setattr(socket_dir, "_SHARED_MEMORY", memory)
    program = short / "program"
    program.write_text(PROGRAM.format(python=sys.executable, memory=memory, then=then))
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(program))
    monkeypatch.setattr(module, "_STOP_S", 0.5)
    server = SGLangServer(tmp_path, Rollout(start_timeout_s=0.5), tmp_path / "log")
    server.launch()
    line = None  # whole: it may be written in pieces
    while line is None:
        ended = server._process.poll() is not None  # before its log is read: then that is complete
        said = (tmp_path / "log").read_text()
        line = re.search(r"TMPDIR (.+)\n", said)
        assert line or not ended, said
        time.sleep(0.01)
    directory = Path(line[1])
    assert (directory.parent == short / "d") == (temporary == "short")
    with pytest.raises(UserError):
        server.wait()
    assert not directory.exists() and [path.name for path in memory.iterdir()] == ["sglang_loads_other_1.shm"]


def test_a_directory_is_closed_to_others_and_its_sockets_have_room(temporary: str) -> None:
    made = socket_dir.make_socket_dir("0" * 32)
    directory = made.path
    try:
        assert directory.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "tmpxxxxxxxx"))
        assert len(os.fsencode(directory)) <= socket_dir._MAX_PARENT_BYTES + 22
    finally:
        made.remove()


def test_no_directory_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", nothing)
    monkeypatch.setattr(socket_dir, "_SHORT_DIRS", ("/proc/nowhere",))
    with pytest.raises(UserError, match=r"/proc/nowhere: No such file.*set TMPDIR"):
        socket_dir.make_socket_dir("0" * 32)


OWNER = """
import sys, time
from pathlib import Path
from megatron_bai.rollout.servers import socket_dir
socket_dir._SHARED_MEMORY = Path(sys.argv[1])
made = socket_dir.make_socket_dir(sys.argv[2] * 32)
print(made.path, flush=True)
time.sleep(600)
"""


def test_what_a_killed_owner_left_is_removed_at_the_next_start_and_nothing_else(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr(tempfile, "tempdir", None)
    memory = short / "shm"
    memory.mkdir()
    monkeypatch.setattr(socket_dir, "_SHARED_MEMORY", memory)
    owners, paths = [], []
    try:
        for name in "ab":
            command = [sys.executable, "-c", OWNER, str(memory), name]
            owners.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            paths.append(Path(owners[-1].stdout.readline().strip()))
            (paths[-1] / "socket").touch()
            (memory / f"sglang_loads_{name * 12}_1.shm").touch()
        owners[0].kill()
        owners[0].wait()
        others = [short / "megatron-bai-other", short / "megatron-bai-empty", short / "megatron-bai-file"]
        others[0].mkdir()
        (others[0] / "owner").write_text("*")
        others[1].mkdir()
        others[2].touch()
        (short / "megatron-bai-link").symlink_to(paths[1])
        socket_dir.make_socket_dir("c" * 32).remove()
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()
    assert not paths[0].exists() and (paths[1] / "socket").exists() and all(path.exists() for path in others)
    assert [path.name for path in memory.iterdir()] == ["sglang_loads_bbbbbbbbbbbb_1.shm"]
    socket_dir.make_socket_dir("c" * 32).remove()
    assert not paths[1].exists() and not list(memory.iterdir())


def test_without_locks_nobody_is_taken_for_dead(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(socket_dir, "lock_open_file", lambda fd: None)
    first = socket_dir.make_socket_dir("a" * 32)
    socket_dir.make_socket_dir("b" * 32).remove()
    assert first.path.exists()
    first.remove()


HOLDER = """
import mmap, sys, time
with open(sys.argv[1], "r+b") as file:
    held = mmap.mmap(file.fileno(), 0)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def memory(short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for shared memory, with what two processes of one id made, as in containers that share it."""
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr(tempfile, "tempdir", None)
    directory = short / "shm"
    directory.mkdir()
    monkeypatch.setattr(socket_dir, "_SHARED_MEMORY", directory)
    for name in ("sgl_shm_mq_1_0a", "sgl_shm_mq_1_0b", "of_another_program"):
        (directory / name).write_bytes(bytes(4096))
    return directory


def holding(*paths: Path) -> list["subprocess.Popen[str]"]:
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) for path in paths
    ]
    assert all(process.stdout.readline() == "held\n" for process in processes)
    return processes


def end(processes: Iterable["subprocess.Popen[str]"]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def test_the_shared_memory_that_a_server_holds_goes_with_it_and_no_other(memory: Path) -> None:
    processes = holding(memory / "sgl_shm_mq_1_0a", memory / "of_another_program")
    made = socket_dir.make_socket_dir("a" * 32)
    made.record_shared_memory([*(process.pid for process in processes), 2**22 + 1])
    end(processes)
    made.remove()
    assert sorted(path.name for path in memory.iterdir()) == ["of_another_program", "sgl_shm_mq_1_0b"]


def test_the_shared_memory_that_a_killed_owners_server_held_goes_at_the_next_start(memory: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(memory), "a"], stdout=subprocess.PIPE, text=True)
    processes = holding(memory / "sgl_shm_mq_1_0a")
    try:
        directory = Path(owner.stdout.readline().strip())
        socket_dir.SocketDir(directory, "a" * 32, -1).record_shared_memory([processes[0].pid])
        (directory / "holds-..").touch()  # no name of SGLang's
        (directory / "holds-of_another_program").touch()
    finally:
        end([owner, *processes])
    socket_dir.make_socket_dir("c" * 32).remove()
    assert not directory.exists()
    assert sorted(path.name for path in memory.iterdir()) == ["of_another_program", "sgl_shm_mq_1_0b"]


def test_another_users_shared_memory_stays(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = holding(memory / "sgl_shm_mq_1_0a")
    made = socket_dir.make_socket_dir("a" * 32)
    made.record_shared_memory([processes[0].pid])
    end(processes)
    monkeypatch.setattr(socket_dir.os, "geteuid", lambda: os.getuid() + 1)
    made.remove()
    assert (memory / "sgl_shm_mq_1_0a").exists()
