"""A reward model behind HTTP: what is sent, what is believed, what a fault costs. The server's faults are made up."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from fake_sglang import serve

from megatron_bai import config, rewards
from megatron_bai.data.task import Prompt
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.rewards import Item, Score
from megatron_bai.rollout import http_client

ITEM = Item(Prompt([3, 4], "1+2=", "3", ({"role": "user", "content": "1+2"},)), "three", [5, 6, 1])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_BACKOFF_S", 0.001)


def scores(handler: Any, items: Sequence[Item] = (ITEM,), task: Any = None, **settings: Any) -> Any:
    """The scores under a server that answers /classify with `handler(body, call)`, and what it was sent."""
    bodies: list[dict[str, Any]] = []

    def answer(request: web.Request, body: dict[str, Any]) -> Any:
        if request.path == "/model_info":
            return {"is_generation": settings_of_server}
        assert request.path == "/classify"
        bodies.append(body)
        return handler(body, len(bodies))

    settings_of_server = settings.pop("is_generation", False)
    with serve(answer) as url, ExitStack() as stack:
        chosen = config.RewardModel(url=url, **({"retries": 1} | settings))
        scorer = stack.enter_context(rewards.open_scorer(chosen, task, Path("unused")))
        return scorer(list(items)), bodies


def reply(*outputs: Any) -> dict[str, Any]:
    return {"embedding": list(outputs), "meta_info": {"prompt_tokens": 3}}


def test_it_sends_text_or_the_actors_ids() -> None:
    assert scores(lambda body, call: reply(-1.5)) == ([Score(-1.5)], [{"text": "1+2=three"}])
    assert scores(lambda body, call: reply(2), send="ids")[1] == [{"input_ids": [3, 4, 5, 6, 1]}]


def test_rewards_come_in_order_and_a_label_chooses_an_output() -> None:
    items = [Item(Prompt([i], str(i), ""), "", [1]) for i in range(20)]
    found, _ = scores(lambda body, call: reply(0.0, float(body["text"])), items, label=1)
    assert found == [Score(float(i)) for i in range(20)]


def test_the_datas_own_check_is_added_to_what_the_model_says() -> None:
    right, wrong, lost = (Item(Prompt([1], "1+2=", "3"), text, [1]) for text in ("3", "4", "?"))
    task = SimpleNamespace(reward=lambda prompt, ids: float(ids is right.ids))
    found, _ = scores(
        lambda body, call: reply(None if "?" in body["text"] else -1.5), [right, wrong, lost], task, check=3
    )
    assert found[:2] == [Score(1.5), Score(-1.5)] and found[2].value is None


@pytest.mark.parametrize(
    ("handler", "failure"),
    [
        (lambda body, call: web.Response(status=500, text="boom"), "failed 2 times at /classify: status 500: boom"),
        (lambda body, call: web.Response(status=400, text="too long"), "refused a request with 400: too long"),
        (lambda body, call: web.Response(text="<html>"), "Expecting value"),
        (lambda body, call: reply(None), "the reward None is not a finite number"),
        (lambda body, call: web.Response(text='{"embedding": [NaN]}'), "the reward nan is not a finite number"),
        (lambda body, call: reply("1"), "the reward '1' is not a finite number"),
        (lambda body, call: {"text": "hello"}, "the reply is not SGLang's"),
        (lambda body, call: reply(1.0, 2.0), "the reward model has 2 outputs: choose one with reward.label"),
    ],
)
def test_a_lasting_fault_costs_its_sample_alone(handler: Any, failure: str) -> None:
    second = Item(Prompt([7], "other ", ""), "answer", [1])
    (bad, good), _ = scores(
        lambda body, call: reply(1.0) if body["text"] == "other answer" else handler(body, call), [ITEM, second]
    )
    assert good == Score(1.0) and bad.value is None and failure in bad.failure


def test_a_passing_fault_costs_nothing() -> None:
    found, bodies = scores(lambda body, call: web.Response(status=503) if call == 1 else reply(0.25))
    assert found == [Score(0.25)] and len(bodies) == 2


def test_a_hang_ends_after_the_time_out() -> None:
    async def hang() -> None:
        import asyncio

        await asyncio.sleep(60)

    (score,), _ = scores(lambda body, call: hang(), request_timeout_s=0.1, retries=0)
    assert "no answer within reward.request_timeout_s=0.1 s" in score.failure


def test_a_server_that_generates_and_one_that_is_not_there_are_named_at_the_start() -> None:
    with pytest.raises(UserError, match="serves a model that generates"):
        scores(lambda body, call: reply(1.0), is_generation=True)
    with pytest.raises(UserError, match="http://127.0.0.1:9 does not answer"):
        rewards.open_scorer(config.RewardModel(url="http://127.0.0.1:9"), None, Path("unused")).__enter__()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"url": ""}, "reward.url is ''"),
        ({"url": "127.0.0.1:30000"}, "reward.url is '127.0.0.1:30000'"),
        ({"url": "http://10.0.0.1:30000"}, "reward.remote=true"),
        ({"url": "http://rewards.example"}, "reward.remote=true"),
        ({"send": "tokens"}, "reward.send is 'tokens'"),
        ({"send": "chat"}, "reward.tokenizer and reward.send=chat"),
        ({"tokenizer": "there"}, "reward.tokenizer and reward.send=chat"),
        ({"concurrency": 0}, "reward.concurrency is 0"),
        ({"retries": -1}, "reward.retries is -1"),
        ({"check": float("nan")}, "reward.check is nan"),
        ({"request_timeout_s": 0.0}, "reward.request_timeout_s is 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        rewards.resolve_reward(config.RewardModel(**({"url": "http://[::1]:1"} | settings)))
    rewards.resolve_reward(config.RewardModel(url="http://rewards.example", remote=True))
    rewards.resolve_reward(config.RewardModel(url="http://localhost:30000"))


def test_a_conversation_that_the_models_template_refuses_has_no_reward(tmp_path: Path) -> None:
    """A tool's message under a template of two roles costs its sample, and no traceback; other samples are scored."""
    tokenizer = build_tokenizer(config.Arithmetic(), 64)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ message.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    turns = ({"role": "user", "content": "1+2"}, {"role": "assistant", "content": "three"})
    plain = replace(ITEM, messages=turns)
    tools = replace(ITEM, messages=(*turns, {"role": "tool", "content": "3"}))
    found, bodies = scores(lambda body, call: reply(1.0), [tools, plain], send="chat", tokenizer=str(tmp_path))
    assert found[1] == Score(1.0) and len(bodies) == 1
    assert found[0].value is None and "refuses messages of user, assistant, tool: no tools" in found[0].failure
