"""Weights that were exported for servers are gone however a start ends, and so is what a killed run left of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.rl.experience import inference_engine
from megatron_bai.rollout.servers.fleet import FleetInfo


class Failing:
    """The inference engine, which fails where it is told to."""

    def __init__(self, *_: Any):
        self.close = lambda: None

    def sync(self) -> None:
        raise UserError("sync")


@pytest.mark.parametrize("error", [UserError("x"), SystemExit(143), KeyboardInterrupt(), OSError(28, "full")])
@pytest.mark.parametrize("where", ["export", "server", "sync"])
def test_nothing_stays_of_a_start_that_fails(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.Config(run=config.Run(dir=str(tmp_path)))
    session: Any = SimpleNamespace(settings=settings, is_rank_0=True, device=SimpleNamespace(kind="cpu"))
    (tmp_path / "weights" / "7").mkdir(parents=True)  # of a run that was killed

    def export(session: Any, version: int) -> Path:
        assert not (tmp_path / "weights").exists()
        (tmp_path / "weights" / ".0.unfinished").mkdir(parents=True)
        if where == "export":
            raise error
        return tmp_path / "weights" / "0"

    @contextmanager
    def start(*_: Any) -> Iterator[Any]:
        if where == "server":
            raise error
        yield FleetInfo([], [], []), None

    monkeypatch.setattr(inference_engine, "_export_weights", export)
    monkeypatch.setattr(inference_engine, "open_servers", start)
    monkeypatch.setattr(Failing, "sync", lambda _: (_ for _ in ()).throw(error))
    monkeypatch.setattr(inference_engine, "InferenceEngine", Failing)
    with pytest.raises(type(error)), inference_engine.start_inference(session):
        pass
    assert list(tmp_path.iterdir()) == []
