"""What Megatron-Core logs in every run to its callers stays off the terminal, and nothing else does."""

import logging
from collections.abc import Iterator

import pytest

from megatron_bai.compat import megatron_notices, releases


@pytest.fixture(autouse=True)
def default_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python's, of a process that configures no logging; pytest does."""
    monkeypatch.setattr(logging, "lastResort", type(logging.lastResort)(logging.WARNING))
    megatron_notices.hide_notices()
    megatron_notices.hide_notices()
    yield


def shown(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> bool:
    logging.lastResort.handle(logging.LogRecord(name, logging.WARNING, "", 0, text, None, None))
    return text in capsys.readouterr().err


@pytest.mark.parametrize("release", releases.MEGATRON)
def test_notices_of_a_release_are_hidden(
    release: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(releases, "installed_megatron", lambda: release)
    everything = releases.MEGATRON["0.19.2"].notices
    hidden = {text for text in everything if not shown("megatron.core.module", f"{text}. Use another.", capsys)}
    assert hidden == {*releases.MEGATRON[release].notices}
    assert shown("another.module", everything[0], capsys)
    assert shown("megatron.core.module", "gradients are not finite", capsys)


def test_the_default_release_logs_none() -> None:
    assert not releases.MEGATRON[releases.MEGATRON_CORE].notices
