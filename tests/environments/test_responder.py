"""What an environment is asked of a sample, and what becomes of what it says."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chats import CHATML, make_tokenizer

from megatron_bai import config
from megatron_bai.data.task import Prompt
from megatron_bai.environments.chat_template import ChatTemplate
from megatron_bai.environments.responder import EnvironmentPool
from megatron_bai.rewards import Score, make_item, make_scoring, score_samples
from megatron_bai.rewards.environment_reward import score
from megatron_bai.rollout.sample import TURN, Sample
from megatron_bai.rollout.turns import Turn, TurnReply
from megatron_bai.routing.routes import VersionSpan
from megatron_bai.workers.outcomes import Outcome

TOKENIZER = make_tokenizer(CHATML)
END, OTHER_END = 4, 1
TASK: Any = SimpleNamespace(tokenizer=TOKENIZER, end_tokens=frozenset((END, OTHER_END)))
ASKED = ({"role": "system", "content": "s"}, {"role": "user", "content": "3+4?"})
PROMPT = Prompt(TOKENIZER.encode("3+4?"), "3+4?", "7", ASKED, {"k": 1})


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def make_sample(end: int = END, finish: str = TURN, **changes: Any) -> Sample:
    """Two turns, `add` and `7`, with a tool's `7` between."""
    reply = ChatTemplate(TOKENIZER, {}, TASK.end_tokens).encode_reply([{"role": "tool", "content": "7"}], END)
    parts = [[*ids("add"), END], reply, [*ids("7"), end]]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    mask = np.repeat([True, False, True], list(map(len, parts)))
    tokens = np.array([*PROMPT.ids, *parts[0], *parts[1], *parts[2]])
    first = Turn(0, starts[1], True, ({"role": "tool", "content": "7"},), len(reply), 0.5, {"seen": 1})
    turns = (first, Turn(starts[2], starts[3], True, reward=changes.pop("last_reward", None)))
    known: dict[str, Any] = dict(sampled_mask=mask, turns=turns) | changes
    routes = np.zeros((len(tokens) - 1, 1, 1), np.uint8)
    spans = (VersionSpan("0", 0, len(mask)),)
    return Sample(0, tokens, len(PROMPT.ids), np.zeros(len(mask), np.float32), routes, spans, finish, **known)


def reply_to(outcome: Outcome, sample: Sample) -> tuple[TurnReply, Any]:
    """The reply to a sample where the environment's process has this outcome, and what it was asked."""
    asked: list[Any] = []

    def submit(arguments: list[Any]) -> "Future[Outcome]":
        asked.append(arguments)
        future: Future[Outcome] = Future()
        future.set_result(outcome)
        return future

    settings = config.UserEnvironment(environment="a:B", max_turns=5)
    pool = EnvironmentPool(submit, settings, TASK, ChatTemplate(TOKENIZER, {}, TASK.end_tokens))
    responder = pool.for_prompts([PROMPT])
    assert responder.max_turns == 5
    return asyncio.run(responder.respond(sample)), asked


def test_it_is_asked_about_the_conversation_and_its_words_become_tokens() -> None:
    said = {"messages": [{"role": "user", "content": "sure?"}], "reward": 1, "state": [2]}
    reply, ((asked,),) = reply_to(Outcome(said), make_sample())
    assert asked == {
        "messages": [
            *PROMPT.messages,
            {"role": "assistant", "content": "add"},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "7"},
        ],
        "answer": "7",
        "extra": {"k": 1},
        "state": {"seen": 1},
        "num_turns": 2,
    }
    assert TOKENIZER.decode(reply.ids) == "\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    assert (reply.done, reply.reward, reply.state, reply.failure) == (False, 1.0, [2], "")
    other, _ = reply_to(Outcome(said), make_sample(OTHER_END))
    assert other.ids == (END, *reply.ids)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Outcome(failure="it took longer than env.timeout_s=10 s"), "it took longer"),
        (Outcome(None), "it is no Reply"),
        (Outcome({}), "no message and is not done"),
        (Outcome({"done": 1}), "its done is 1"),
        (Outcome({"done": True, "reward": 1e39}), "no float32"),
        (Outcome({"done": True, "reward": float("nan")}), "no float32"),
        (Outcome({"messages": [{"role": "tool", "content": 3}]}), "a text each"),
        (Outcome({"messages": [{"role": "tool", "content": "a\ud800"}]}), "a text each"),
        (Outcome({"messages": [{"role": "assistant", "content": "I"}]}), "a text each"),
        (Outcome({"messages": [{"role": "tool", "content": "<|im_start|>"}]}), "text of a special token"),
        (Outcome({"done": True, "more": 1}), "more"),
    ],
)
def test_what_is_no_reply_is_a_failure_with_a_line(outcome: Outcome, message: str) -> None:
    reply, _ = reply_to(outcome, make_sample())
    assert message in reply.failure and reply.failure.startswith("env=class in turn 2: ") and reply.ids == ()
    assert "\n" not in reply.failure and reply.failure.endswith("(prompt '3+4?')")


def test_messages_of_a_last_reply_are_not_tokenised() -> None:
    said = {"messages": [{"role": "nobody", "content": "<|im_end|>"}], "done": True}
    reply, _ = reply_to(Outcome(said), make_sample())
    assert reply.done and reply.ids == () and reply.messages[0]["role"] == "nobody"


def test_rewards_see_the_last_turn_the_conversation_and_what_was_paid() -> None:
    sample = make_sample(finish="stop", last_reward=2.0)
    item = make_item(TASK, PROMPT, sample)
    assert (item.response, list(item.ids), item.environment_reward) == ("7", [*ids("7"), END], 2.5)
    assert [message["role"] for message in item.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert score(item) == Score(2.5, turn_weight=1.0)
    plain = make_item(TASK, PROMPT, make_sample(finish="stop", turns=(), sampled_mask=None))
    assert len(plain.ids) == len(sample.response) and plain.environment_reward is None


def test_a_sample_that_the_environment_failed_is_not_scored() -> None:
    failed, good = make_sample(finish="stop", failure="env=class in turn 2: it fell"), make_sample(finish="stop")
    seen: list[int] = []

    def scorer(items: list[Any]) -> list[Score]:
        seen.append(len(items))
        return [Score(1.0, turn_weight=0.5)] * len(items)

    one, other = score_samples(scorer, TASK, [PROMPT], [failed, good])
    assert (one.reward, one.failure) == (None, failed.failure) and seen == [1]
    assert (other.reward, other.turn_weight) == (1.0, 0.5)
    assert make_scoring(scorer, TASK, [PROMPT]) is None  # lists alone: at the end


def test_a_scorer_of_one_sample_is_awaited_where_it_ends() -> None:
    future: Future[Score] = Future()
    hook = make_scoring(SimpleNamespace(submit=lambda item: future), TASK, [PROMPT])  # type: ignore[arg-type]
    assert hook is not None

    async def both() -> tuple[Sample, Sample]:
        scoring = asyncio.ensure_future(hook(make_sample(finish="stop")))
        await asyncio.sleep(0)
        future.set_result(Score(None, "it broke"))
        return await scoring, await hook(make_sample(finish="stop", failure="env"))

    scored, failed = asyncio.run(both())
    assert scored.reward is None and scored.failure.startswith("it broke (prompt") and failed.failure == "env"
