"""What a run shows before its first step."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from megatron_bai.config import Config
from megatron_bai.monitor.run_log import PROGRESS, RunLog
from megatron_bai.rl import trainer
from megatron_bai.rl.checkpointing import ResumePoint


class StartedError(Exception):
    """The servers would start now."""


def test_the_start_of_servers_is_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}

    def start_inference(*_: Any) -> NoReturn:
        shown.update(json.loads((tmp_path / PROGRESS).read_text()))
        raise StartedError

    monkeypatch.setattr(trainer, "open_route_recorder", lambda *_: nullcontext())
    monkeypatch.setattr(trainer, "start_inference", start_inference)
    session: Any = SimpleNamespace(settings=Config())
    nothing: Any = None
    with pytest.raises(StartedError), RunLog(tmp_path, session.settings, 9, True) as progress:
        trainer._run_steps(session, ResumePoint(), {}, nothing, progress, nothing)
    assert (shown["step"], shown["phase"]) == (1, "server_start")
