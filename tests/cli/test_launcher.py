"""`megatron-bai torchrun`: a mistake is one line, whoever finds it; ranks end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.run import get_args_parser

from megatron_bai.cli import entry_point, torchrun
from megatron_bai.errors import UserError

TORCHRUN = [sys.executable, "-m", "megatron_bai", "torchrun"]
NOWHERE = ["init=checkpoint", "init.checkpoint=/nowhere"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc-per-node", "2", "train", "trainer.stepz=1"], "there is no setting trainer.stepz"),
        (["--nproc-per-node", "2", "trian"], "there is no verb 'trian'"),
        (["--nproc-per-nod=two", "train"], "torchrun: "),
        (["--nproc-per-node", "2"], "torchrun: the following arguments are required"),
        (["--no-python", "train"], "leave out --module"),
    ],
)
def test_a_mistake_in_the_words_is_one_line_before_there_are_ranks(words: list[str], says: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith("megatron-bai: error: ") and says in done.stderr


@pytest.mark.parametrize(
    ("options", "settings", "directory"),
    [
        (["--tee", "0:3", "--redirects", "3"], ["run.dir=/shared/x"], "/shared/x/logs/node7"),
        (["--redirects", "3"], ["run.name=mine"], "runs/mine/logs/node7"),
        (["--redirects", "3", "--log-dir", "/elsewhere"], ["run.name=mine"], "/elsewhere"),
        (["--redirects", "3"], ["--help"], "runs/logs/node7"),  # no settings are read
        ([], ["run.dir=/shared/x"], None),
    ],
)
def test_what_ranks_write_is_below_the_runs_directory(
    options: list[str], settings: list[str], directory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun.socket, "gethostname", lambda: "node7")
    args = torchrun._parse(get_args_parser(), [*options, "train", "experiment=demo", *settings])
    assert args.log_dir == directory


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file"):
        torchrun.launch(["--redirects", "3", "train", "experiment=demo", f"run.dir={tmp_path}/file"])


@pytest.mark.distributed
def test_a_mistake_that_every_rank_finds_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    done = run("--nproc-per-node", "2", "train", "experiment=demo", *NOWHERE, f"run.dir={tmp_path}")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "no checkpoint at /nowhere" in done.stderr
    assert not list(temporary.glob("torchelastic_*")), "what torch makes for the errors of ranks is removed"


def test_what_one_rank_has_said_another_does_not_repeat_however_late_it_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry_point.time, "sleep", lambda seconds: None)
    for rank, text in (("1", "early"), ("0", "late"), ("1", "late"), ("2", "early"), ("2", "another")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        entry_point._print_error(UserError(text))
    said = [line.removeprefix("megatron-bai: error") for line in capsys.readouterr().err.splitlines()]
    assert said == [" [rank 1]: early", ": late", " [rank 2]: another"]


@pytest.mark.distributed
@pytest.mark.long
def test_a_rank_that_is_killed_is_one_line_and_a_killed_torchrun_leaves_no_rank(tmp_path: Path) -> None:
    for victim in ("rank", "torchrun"):
        words = ["train", "experiment=demo_pretrained", "trainer.steps=100000", f"run.dir={tmp_path / victim}"]
        words += ["trainer.micro_batch_size=8"]
        command = [*TORCHRUN, "--nproc-per-node", "2", *words, f"trainer.save={tmp_path / 'model'}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
            while "step" not in started.stdout.readline():
                assert started.poll() is None
            ranks = psutil.Process(started.pid).children(recursive=True)
            if victim == "rank":
                ranks[1].kill()
                _, said = started.communicate(timeout=120)
                assert started.returncode == 1 and "was killed by SIGKILL" in said and "Traceback" not in said
            else:
                started.kill()
            _, alive = psutil.wait_procs(ranks, timeout=120)
            assert not alive


BLOCKED = """
import os, signal, sys, time
from megatron_bai.utils.child_processes import stop_after_parent
signal.signal(signal.SIGTERM, {handler})
stop_after_parent(0.2)
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_a_process_ends_with_its_parent_even_where_it_ignores_sigterm(handler: str) -> None:
    child = BLOCKED.format(handler=handler)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as started:
        process = psutil.Process(int(started.stdout.readline()))
        os.kill(started.pid, signal.SIGKILL)
        ended_by = time.monotonic() + 60
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < ended_by
            time.sleep(0.05)
