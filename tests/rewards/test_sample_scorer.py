"""A response is scored by itself, while others are sampled, by every reward that is built in."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from fake_sglang import serve

from megatron_bai import config, rewards
from megatron_bai.data.task import Prompt
from megatron_bai.rewards import Item, Score
from megatron_bai.rollout import http_client, http_thread

HERE = Path(__file__).parent
ITEMS = [Item(Prompt([i], str(i), str(i)), "x" * i, [i, 1]) for i in range(20)]
TASK = SimpleNamespace(reward=lambda prompt, ids: float(ids[0] % 2))


def answer(request: web.Request, body: dict[str, Any]) -> Any:
    return {"is_generation": False} if request.path == "/model_info" else {"embedding": [float(len(body["text"]))]}


@pytest.mark.parametrize("name", ["exact", "function", "model"])
def test_one_by_one_or_as_a_list_the_scores_are_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=":")
    with serve(answer) as url:
        settings = {
            "exact": config.Exact(),
            "function": config.Function(function="functions:length", timeout_s=60.0),
            "model": config.RewardModel(url=url),
        }[name]
        opened: Any = rewards.open_scorer(settings, TASK, tmp_path / "reward.log")
        with opened as scorer:
            listed = scorer(ITEMS)

            async def each() -> list[Score]:
                return list(await asyncio.gather(*(asyncio.wrap_future(scorer.submit(item)) for item in ITEMS)))

            assert asyncio.run(each()) == listed
    expected = {"exact": lambda i: i % 2, "function": lambda i: i, "model": lambda i: len(str(i)) + i}[name]
    assert listed == [Score(float(expected(i))) for i in range(20)]


def test_requests_in_flight_end_with_the_block() -> None:
    async def hang() -> None:
        await asyncio.sleep(600)

    with serve(lambda request, body: hang()) as url:
        limits = http_client.RequestLimits(2, 600.0, 3, "reward.request_timeout_s")
        with http_thread.PostingThread([url], "/classify", limits) as thread:
            futures = [thread.submit(http_client.HttpRequest(0, {}, lambda reply: reply)) for _ in range(3)]
        assert all(future.cancelled() for future in futures)
