"""`serve` leaves no converted checkpoint behind, however it ends."""

import json
from pathlib import Path
from typing import Any

import pytest
from model.families import published

from megatron_bai import config
from megatron_bai.checkpoint import formats, manifest
from megatron_bai.cli import serve
from megatron_bai.errors import UserError


class Server:
    """In place of SGLang."""

    url = "http://nowhere"
    error: BaseException = KeyboardInterrupt()

    def __init__(self, directory: Path, *_: Any, **__: Any) -> None:
        assert (directory / "config.json").is_file()

    def __enter__(self) -> "Server":
        if isinstance(self.error, UserError):
            raise self.error
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_alive(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(129), UserError("it did not start")])
@pytest.mark.parametrize("converts", [True, False])
def test_the_copy_goes_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, converts: bool
) -> None:
    def convert(settings: Any, source: str, target: Path, to: str) -> None:
        stage = manifest.make_staging_dir(target)
        (stage / "config.json").write_text("{}")
        if not converts:
            raise error
        manifest.finalize(stage, target, {})

    monkeypatch.setattr(Server, "error", error)
    monkeypatch.setattr(serve, "SGLangServer", Server)
    monkeypatch.setattr(serve, "convert", convert)
    monkeypatch.setattr(formats, "require_model", lambda source: "megatron")
    monkeypatch.setattr(formats, "require_complete", lambda source: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    settings = config.Config(run=config.Run(dir=str(tmp_path)), serve=config.Serve(checkpoint="somewhere"))
    with pytest.raises(type(error)):
        serve.run(settings)
    assert list((tmp_path / "serve").iterdir()) == []


@pytest.mark.parametrize("checkpoint_format", ["hf", "megatron"])
def test_what_sglang_would_serve_as_another_model_is_refused_in_either_format(
    checkpoint_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.read("mixtral_tied_yarn")))
    monkeypatch.setattr(serve, "convert", lambda *_: pytest.fail("it was converted"))
    monkeypatch.setattr(formats, "require_model", lambda source: checkpoint_format)
    settings = config.Config(run=config.Run(dir=str(tmp_path)), serve=config.Serve(checkpoint=str(tmp_path)))
    with pytest.raises(UserError, match="SGLang does not serve this mixtral model"):
        serve.run(settings)


@pytest.mark.parametrize(("left_out", "copies"), [((), False), (("use_qk_norm", "rotary_dim"), True)])
def test_a_file_that_leaves_out_what_sglang_asks_for_is_served_as_a_copy(
    left_out: tuple[str, ...], copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published.make("minimax_m2", tmp_path / "source")
    described = {key: value for key, value in published.read("minimax_m2").items() if key not in left_out}
    (source / "config.json").write_text(json.dumps(described))
    made = []

    def convert(settings: Any, source: str, target: Path, to: str) -> None:
        made.append(source)
        stage = manifest.make_staging_dir(target)
        (stage / "config.json").write_text("{}")
        manifest.finalize(stage, target, {})

    monkeypatch.setattr(serve, "SGLangServer", Server)
    monkeypatch.setattr(serve, "convert", convert)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    settings = config.Config(run=config.Run(dir=str(tmp_path)), serve=config.Serve(checkpoint=str(source)))
    with pytest.raises(KeyboardInterrupt):
        serve.run(settings)
    assert made == [str(source)] * copies
