"""What a run says on a terminal, where a progress bar is drawn below it."""

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from monitor.kept import kept

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.report.report import write_report
from megatron_bai.monitor.run_log import PROGRESS, RunLog
from megatron_bai.monitor.samples import store
from megatron_bai.monitor.summary import Summary
from megatron_bai.utils import terminal_logging

ALARM = Alarm(
    1, "length_collapse", "response_length_mean", 9.0, "it fell from 400 to 100", "merge again", 1, "warn", {}
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_lines_are_whole_and_warnings_go_where_stderr_goes(
    file: type[io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line is not broken at the terminal's width; warnings are drawn above the bar only if stderr is a terminal."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setattr(sys, "stderr", err := file())
    terminal_logging.setup()
    metrics = {f"a_metric_of_number_{number}": float(number) for number in range(5)}
    with RunLog(tmp_path, config.Config(monitor=config.Monitor(tensorboard=False)), 2, True) as log:
        log.log_step({"step": 1, **metrics, "alarms": [asdict(ALARM)]}, tuple(metrics))
    step = "  ".join(f"{name} {number:g}" for name, number in metrics.items())
    assert f"[rank 0] step    1/2  {step}\n" in out.getvalue()
    alarm = f"[rank 0] alarm: {ALARM}"
    if err.isatty():
        assert f"{alarm}\033[0m\n" in out.getvalue() and not err.getvalue()
    else:
        assert err.getvalue() == f"{alarm}\n" and alarm not in out.getvalue()


def _settings(**monitor: object) -> config.Config:
    return config.Config(monitor=config.Monitor(tensorboard=False, **monitor))


def test_a_resumed_run_writes_the_samples_of_its_steps_once(tmp_path: Path) -> None:
    """Killed in its 4th step, resumed after the 2nd: no sample of the 3rd is there twice, none is missing."""
    with RunLog(tmp_path, _settings(), 5, True) as log:
        for step in (1, 2, 3):
            log.log_step({"step": step}, (), [kept(step, "first")])
    with RunLog(tmp_path, _settings(), 5, True, after=2) as log:
        assert store.list_steps(tmp_path) == [1, 2]
        for step in (3, 4):
            log.log_step({"step": step}, (), [kept(step, "second")])
    responses = {step: [s.response for s in store.read_step(tmp_path, step)] for step in store.list_steps(tmp_path)}
    assert responses == {1: ["first"], 2: ["first"], 3: ["second"], 4: ["second"]}
    with RunLog(tmp_path, _settings(), 5, True):
        assert store.list_steps(tmp_path) == []  # the run begins again, as its metrics do


def test_samples_that_cannot_be_written_end_the_run_in_a_line_and_without_the_step(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file where the directory should be")
    with RunLog(tmp_path, _settings(), 5, True) as log, pytest.raises(UserError, match="samples"):
        log.log_step({"step": 1}, (), [kept()])
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_phases_of_the_first_step_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal_logging.setup()
    with RunLog(tmp_path, _settings(), 5, True, after=0) as log:
        log.show_phase(1, "old_logprob")
        assert json.loads((tmp_path / PROGRESS).read_text())["phase"] == "old_logprob"
        log.log_step({"step": 1}, ())
        log.show_phase(2, "rollout")
    said = capsys.readouterr().out
    assert "step 1, the first of this start: old logprob" in said and "rollout" not in said
    assert not (tmp_path / PROGRESS).exists()  # no step is in work any more
    with RunLog(tmp_path, _settings(), 5, active=False) as log:
        log.show_phase(1, "rollout")


def _fill(directory: Path, name: str) -> None:
    """Make the disk full for a file that is written beside its path first."""
    (directory / f".{name}.{os.getpid()}").symlink_to("/dev/full")


def _begin(directory: Path) -> None:
    RunLog(directory, _settings(), 2, active=True, after=1)


def _record(directory: Path) -> None:
    with RunLog(directory, _settings(), 2, active=True) as log:
        log._file.close()
        log._file = open("/dev/full", "a", encoding="utf-8")
        log.log_step({"step": 1}, ())


def _summarise(directory: Path) -> None:
    settings = _settings()
    settings.run.dir = str(directory)
    Summary(settings, 1, [], []).write(directory, complete=True)


def _report(directory: Path) -> None:
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    write_report([directory], directory / "report.html")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's")
@pytest.mark.parametrize(
    ("act", "name"),
    [(_begin, "config.yaml"), (_begin, "metrics.jsonl"), (_record, "metrics.jsonl"), (_summarise, "summary.json")]
    + [(_report, "report.html")],
)
def test_a_full_disk_is_one_line_and_the_earlier_file_stays(
    act: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text('{"step": 1}\n')
    if act is not _record:
        _fill(tmp_path, name)
    with pytest.raises(UserError, match=rf"^{tmp_path}.*: No space left on device$"):
        act(tmp_path)
    assert act is _record or (tmp_path / name).read_text() == '{"step": 1}\n'
    assert not (tmp_path / f".{name}.{os.getpid()}").is_symlink()
