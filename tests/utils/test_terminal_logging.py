import io
import logging
import sys

import pytest

from megatron_bai.utils import terminal_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.fixture
def log() -> logging.Logger:
    terminal_logging.setup()
    terminal_logging.setup()
    return logging.getLogger("megatron_bai.rl.trainer")


def test_a_line_is_said_once_behind_the_rank(
    log: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger().addHandler(root := logging.StreamHandler())  # as libraries do
    try:
        log.debug("nobody asks")
        log.info("step %d", 1)
        monkeypatch.setenv("RANK", "3")
        log.warning("a server is lost: 100%")
    finally:
        logging.getLogger().removeHandler(root)
    said = capsys.readouterr()
    assert said.out == "[rank 0] step 1\n"
    assert said.err == "[rank 3] a server is lost: 100%\n"


def test_warnings_are_yellow_on_a_terminal_alone(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    log.info("step 1")
    log.warning("alarm")
    assert out.getvalue() == "[rank 0] step 1\n" and err.getvalue() == "\033[33m[rank 0] alarm\033[0m\n"


def test_a_closed_pipe_ends_the_command(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        log.info("step 1")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding_takes_any_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    # Without pytest's handler: its workers cannot send half a surrogate pair in what they captured.
    monkeypatch.setattr(logging.getLogger("megatron_bai"), "handlers", [])
    terminal_logging.setup()
    text = "→ ü \ud800"
    print(text)
    logging.getLogger("megatron_bai").warning(text)
    for stream in streams.values():
        assert stream.buffer.getvalue().decode(encoding).rstrip("\n").endswith("\\ud800")
