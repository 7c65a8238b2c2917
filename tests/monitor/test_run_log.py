"""What a run says on a terminal, where a progress bar is drawn below it."""

import io
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_bai import config
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.run_log import RunLog
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
