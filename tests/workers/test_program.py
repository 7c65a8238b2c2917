"""A program of a model's has nothing of the machine's, ends at its limits, and is never run without namespaces."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_bai.workers import program_main
from megatron_bai.workers.program import IsolationError, ProgramLimits, require_isolation, run_program

ROOMY = ProgramLimits(time_s=60.0)
SHORT = ProgramLimits(time_s=0.5)


def run_in_user_namespace(code: str) -> "subprocess.CompletedProcess[str]":
    """Run code of the test in a user namespace of its own, where this user, or root, may change the kernel's limits."""
    prelude = f"""
import ctypes, os
user, group = os.geteuid(), os.getegid()
assert not ctypes.CDLL(None).unshare({program_main._NAMESPACES["user"]})
for name, text in (("setgroups", "deny"), ("uid_map", f"INSIDE {{user}} 1"), ("gid_map", f"INSIDE {{group}} 1")):
    open(f"/proc/self/{{name}}", "w").write(text)
from megatron_bai.workers.program import run_program
"""
    inside, code = ("1000", code) if code.startswith("# a user") else ("0", code)
    command = [sys.executable, "-c", prelude.replace("INSIDE", inside) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_program_reads_its_input_and_is_heard() -> None:
    source = "import sys\nprint(sys.stdin.read()[::-1])\nprint('to here', file=sys.stderr)"
    result = run_program(source, "héllo", ROOMY)
    assert (result.output, result.errors, result.failure) == ("olléh\n", "to here\n", "")
    assert run_program("print(open('data.txt').read())", limits=ROOMY, files={"data.txt": "é"}).output == "é\n"


def test_an_exception_is_shown_with_its_line() -> None:
    result = run_program("x = 1\nx / 0", limits=ROOMY)
    assert result.failure == "it ended with code 1"
    assert 'File "/work/program.py", line 2' in result.errors and "ZeroDivisionError" in result.errors


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("import os; print(sorted(os.environ))", "['HOME', 'LANG', 'PATH', 'TMPDIR']"),
        ("import os; print(os.getuid() == 65534, os.getgroups() in ([], [65534]))", "True True"),
        ("import os; print([i for i in range(3, 64) if os.path.exists(f'/proc/self/fd/{i}')])", "[]"),
        ("import os; print([os.path.exists(each) for each in ('/home', '/sys')])", "[False, False]"),
        ("import glob; print(len(glob.glob('/proc/[0-9]*')))", "2"),
        ("import os\ntry: os.kill(1, 9)\nexcept OSError: pass\nprint(os.path.exists('/proc/1'))", "True"),
        ("import os; os.mkdir('/work/m'); import ctypes\n"
         "print(ctypes.CDLL(None).mount(b'none', b'/work/m', b'tmpfs', 0, None))", "-1"),
        ("import sys; print([m for m in ('numpy', 'megatron_bai') if __import__('importlib.util').util.find_spec(m)])",
         "[]"),
    ],
)  # fmt: skip
def test_it_has_nothing_of_the_machines(source: str, output: str) -> None:
    result = run_program(source, limits=ROOMY)
    assert result.output == output + "\n", result.errors


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("open('/usr/x', 'w')", "OSError: [Errno 30] Read-only file system: '/usr/x'"),
        ("import sys; open(sys.base_prefix + '/x', 'w')", "OSError: [Errno 30] Read-only file system: "),
        ("import os; os.remove(os.__file__)", "OSError: [Errno 30] Read-only file system: "),
        ("import socket; socket.create_connection(('127.0.0.1', 22))", "OSError: [Errno 101] Network is unreachable"),
    ],
)
def test_it_changes_nothing_and_reaches_no_one(source: str, error: str) -> None:
    result = run_program(source, limits=ROOMY)
    assert result.errors.splitlines()[-1].startswith(error)


@pytest.mark.parametrize(
    ("source", "limits", "failure"),
    [
        ("while True: pass", SHORT, "it took longer than 0.5 s"),
        ("import time; time.sleep(600)", SHORT, "it took longer than 0.5 s"),
        ("import os, time; os.closerange(0, 64); time.sleep(600)", SHORT, "it took longer than 0.5 s"),
        ("import signal, time\nfor i in range(1, 32):\n  try: signal.signal(i, signal.SIG_IGN)\n"
         "  except OSError: pass\ntime.sleep(600)", SHORT, "it took longer than 0.5 s"),
        ("print('x' * 10_000_000)", ROOMY, "it wrote more than 65,536 bytes"),
        ("import sys; sys.stderr.write('x' * 10_000_000)", ROOMY, "it wrote more than 65,536 bytes"),
        ("while True: print('x' * 1000)", ROOMY, "it wrote more than 65,536 bytes"),
        ("import os; os.kill(os.getpid(), 11)", ROOMY, "it was ended by SIGSEGV"),
        ("import os; os.abort()", ROOMY, "it was ended by SIGABRT"),
        ("import os; os.kill(-1, 9)", ROOMY, ""),  # of all processes that it can reach
        ("import sys; sys.exit(7)", ROOMY, "it ended with code 7"),
        ("x = bytearray(1 << 40)", ROOMY, "it ended with code 1"),
        ("open('big', 'wb').write(bytes(64 << 20))", ROOMY, "it ended with code 1"),
        ("import os\nwhile True: os.fork()", ProgramLimits(time_s=2.0), ""),
        ("not python", ROOMY, "it ended with code 1"),
        ("'\ud800'", ROOMY, ""),
    ],
)  # fmt: skip
def test_its_end_is_known(source: str, limits: ProgramLimits, failure: str) -> None:
    result = run_program(source, "unread" * 100_000, limits)
    assert result.failure == failure or not failure and len(result.errors) <= limits.output_bytes
    assert len(result.output) <= limits.output_bytes


def test_output_that_is_no_utf8_is_replaced() -> None:
    result = run_program("import sys; sys.stdout.buffer.write(b'a\\xffb')", limits=ROOMY)
    assert result.output == "a\ufffdb"


def test_what_it_leaves_behind_ends_with_it() -> None:
    """A daemon of it keeps its pipes open, and a mark by which it is found."""
    mark = f"600.{os.getpid()}5"
    source = f"import os, subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\nprint('gone')"
    assert run_program(source, limits=ROOMY).output == "gone\n"
    assert not [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", mark]]


def test_a_user_that_is_not_root_has_the_same_namespaces() -> None:
    result = run_in_user_namespace("# a user\nprint(run_program('import os; print(os.getuid(), os.getpid() < 3)'))")
    assert "output='65534 True\\n', errors='', failure=''" in result.stdout, result.stderr


@pytest.mark.parametrize("kind", ["net", "pid", "mnt"])
def test_where_the_kernel_gives_no_namespace_nothing_is_run(kind: str, tmp_path: Path) -> None:
    """The kernel's own limit, set to none in a user namespace: `unshare` itself refuses."""
    result = run_in_user_namespace(f"""
open("/proc/sys/user/max_{kind}_namespaces", "w").write("0")
print(run_program("open({str(tmp_path / "ran")!r}, 'w')"))
""")
    assert result.stdout == ""
    assert (
        "IsolationError: a program cannot be run in namespaces of its own: no namespaces of user, network, mount, "
        "process, ipc, host name: No space left on device\n" in result.stderr
    )
    assert not (tmp_path / "ran").exists()


def test_a_machine_without_them_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_isolation()
    other = tmp_path / "program_main.py"  # the system call's wrapper stands for a kernel that forbids it
    source = Path(program_main.__file__).read_text()
    other.write_text(source.replace("_libc.unshare, flags)", "lambda flags: ctypes.set_errno(1) or -1, flags)"))
    monkeypatch.setattr(program_main, "__file__", str(other))
    with pytest.raises(
        IsolationError, match=r"^a program cannot be run in namespaces of its own: no namespaces of .*: "
    ):
        require_isolation()


def test_no_more_descriptors_are_closed_than_there_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all that the limit allows, one by one where libc cannot close a range: containers allow 2^30."""
    wrapper = tmp_path / "recorded.py"
    wrapper.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(program_main.__file__).parent)!r})
import program_main
close = os.closerange
os.closerange = lambda first, end: (os.write(2, b"%d\\n" % end), close(first, end))
program_main.main()
""")
    monkeypatch.setattr(program_main, "__file__", str(wrapper))
    result = run_program("pass", limits=ROOMY)
    ends = [int(line) for line in result.errors.split()]
    assert not result.failure and len(ends) == 3 and max(ends) < 1024
