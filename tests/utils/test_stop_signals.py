"""A closed terminal, a lost connection and SIGTERM end every verb as an exception would; `nohup` keeps it running."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.distributed

VERB = """
import signal, sys, time
from pathlib import Path
from megatron_bai.cli import entry_point
from megatron_bai.utils import stop_signals

stop_signals._ECHO_S = 3600.0  # a machine that stands still for seconds is no second signal

def work(words):
    print("at work", flush=True)
    try:
        Path(sys.argv[1], "started").touch()
        time.sleep(60)
    finally:
        print("a line for nobody\\n" * 5000, flush=True)
        print("and one more", file=sys.stderr, flush=True)
        Path(sys.argv[1], "closed").touch()

def train(words):
    from megatron_bai.rl.signals import handle_signals
    with handle_signals(60) as requests:
        print("at work", flush=True)
        Path(sys.argv[1], "started").touch()
        while not requests._stop:
            time.sleep(0.01)
        print("a line for nobody\\n" * 5000, flush=True)
        Path(sys.argv[1], "closed").touch()
        sys.exit(128 + requests._stop)

class SignalsOnceMore:  # when Python takes its modules apart, after it reset the handlers
    def __del__(self, raise_signal=signal.raise_signal, number=int((sys.argv[3:] or [0])[0])):
        raise_signal(number)

def end(words):
    global last_to_go
    last_to_go = SignalsOnceMore()
    signal.raise_signal(int(sys.argv[3]))

entry_point._dispatch = globals()[sys.argv[2]]
entry_point.main()
"""


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    """Have SIGHUP its default effect in what a test starts, also where the tests themselves run under `nohup`."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def start(directory: Path, function: str, *arguments: str, **options: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", VERB, str(directory), function, *arguments]
    return subprocess.Popen(command, **options)  # type: ignore[call-overload,no-any-return]


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    while not path.exists():
        assert process.poll() is None


@pytest.mark.parametrize("function", ["work", "train"])
def test_a_closed_terminal_ends_a_verb_in_order_though_nothing_can_be_printed(tmp_path: Path, function: str) -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", VERB, str(tmp_path), function])
    while not (tmp_path / "started").exists():
        assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE, os.read(terminal, 10_000).decode()
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 128 + signal.SIGHUP and (tmp_path / "closed").exists()


@pytest.mark.parametrize(("function", "number"), [("work", signal.SIGHUP), ("train", signal.SIGTERM)])
def test_a_signal_that_comes_twice_does_not_interrupt_the_clean_up(
    tmp_path: Path, function: str, number: signal.Signals
) -> None:
    with open(tmp_path / "output", "wb") as output:
        process = start(tmp_path, function, stdout=output, stderr=output)
    wait_for(tmp_path / "started", process)
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(60) == 128 + number and (tmp_path / "closed").exists()
    assert (tmp_path / "output").read_text().count("a line for nobody") == 5000  # a file is there still


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_second_signal_does_not_replace_the_exit_status_of_a_verb_that_is_gone_but_for_python(
    tmp_path: Path, number: signal.Signals
) -> None:
    assert start(tmp_path, "end", str(int(number))).wait(60) == 128 + number


def test_what_read_our_output_may_have_gone_with_the_terminal(tmp_path: Path) -> None:
    process = start(tmp_path, "train", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "started", process)
    assert process.stdout
    process.stdout.close()  # as of `train | tee log`
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP and (tmp_path / "closed").exists()


def test_under_nohup_a_verb_goes_on(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the process inherits; the fixture resets it
    process = start(tmp_path, "work", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "started", process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
