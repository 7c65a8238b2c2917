"""examples/: the reward, and the judge against a server that answers as told."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_judge import serve_judge
from outside import EXAMPLES

from megatron_bai import config, rewards
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rewards import Item, Score


def answer(message: str) -> tuple[int, bytes | str]:
    """What stands behind `say:` in the message; `hang`, `fail` and `break` are what they say."""
    text = message.rpartition("say:")[2]
    if text == "hang":
        time.sleep(30)
    return 503 if text == "fail" else 200, b"<html>" if text == "break" else text


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The requests that reached the judge."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=":")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve_judge(answer) as (url, requests):
        monkeypatch.setenv("JUDGE_URL", url + "/")
        yield requests


def score(tmp_path: Path, function: str, *responses: str, timeout_s: float = 20.0) -> list[Score]:
    settings = config.Function(function=function, timeout_s=timeout_s, workers=1)
    prompt = Prompt([1], "What is 3+4?", "7", {})
    with rewards.open_scorer(settings, None, tmp_path / "reward.log") as scorer:
        return scorer([Item(prompt, response, [2]) for response in responses])


def test_a_mark_is_a_reward_and_anything_else_costs_its_sample(
    tmp_path: Path, judge: list[Any], monkeypatch: Any
) -> None:
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    said = ["Mark: 7", "It is fine.\n**Mark: 10**", "no idea", "Mark: -5", "break", "fail", "Mark: 0/10"]
    found = score(tmp_path, "llm_judge:judge", *(f"say:{text}" for text in said))
    assert [each.value for each in found] == [0.7, 1.0, None, None, None, None, 0.0]
    assert [each.failure for each in found[2:6]] == [
        "ValueError: the judge gave no mark from 0 to 10: 'no idea'",
        "ValueError: the judge gave no mark from 0 to 10: 'Mark: -5'",
        "ValueError: the reply is not a chat completion: b'<html>'",
        "HTTPError: HTTP Error 503: Service Unavailable",
    ]
    first = judge[0]
    assert (first["path"], first["key"], first["model"]) == ("/v1/chat/completions", "Bearer secret", "a-judge")
    assert "What is 3+4?" in first["messages"][0]["content"] and "Reference: 7" in first["messages"][0]["content"]


def test_a_judge_that_hangs_or_is_not_there_costs_the_sample(
    tmp_path: Path, judge: list[Any], monkeypatch: Any
) -> None:
    found = score(tmp_path, "llm_judge:judge", "say:hang", "say:Mark: 5", timeout_s=5.0)
    assert found[0].value is None and "5" in found[0].failure and found[1] == Score(0.5)
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/v1")
    (gone,) = score(tmp_path, "llm_judge:judge", "say:Mark: 5")
    assert gone.value is None and "refused" in gone.failure


def test_a_run_without_an_address_stops_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=":")
    monkeypatch.delenv("JUDGE_URL", raising=False)
    with pytest.raises(UserError, match="set JUDGE_URL to the judge's address"):
        score(tmp_path, "llm_judge:judge", "say:Mark: 5")


def test_the_reward_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=":")
    responses = ("3+4=7\n#### 7", "7.", "17", "", "x" * 300 + "\n7", "x" * 3000 + "\n7")
    found = score(tmp_path, "concise_reward:concise", *responses)
    assert [each.value for each in found] == pytest.approx([1.0, 1.0, 0.0, 0.0, 1 - 0.102, 0.5])
