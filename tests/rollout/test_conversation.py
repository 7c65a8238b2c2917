"""A conversation is one sample: what was sampled stays as it was sampled, and every row is there once."""

import asyncio
import base64
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_sglang import SIGNATURE, STOP, serve

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout import http_client
from megatron_bai.rollout.client import RolloutClient, SampleRequest
from megatron_bai.rollout.conversation import SampleError
from megatron_bai.rollout.kept_ids import MASK_FIELDS, NO_ID
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import PARTIAL, TURN, Sample
from megatron_bai.rollout.turns import Turn, TurnReply
from megatron_bai.routing.routes import VersionSpan

PROMPT, REPLY = [3, 4, 5], (12, 13)
TURN_TOKENS = 3  # of a turn that ends: two and the end token


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_BACKOFF_S", 0.001)


@dataclass
class Server:
    """Answers as SGLang: every turn ends after `TURN_TOKENS`. Values tell position and call, to be recognised by."""

    versions: list[str] = field(default_factory=lambda: ["7"] * 99)
    fails: set[int] = field(default_factory=set)  # calls
    ends: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, request: web.Request, body: dict[str, Any]) -> Any:
        call, start, limit = len(self.bodies), len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
        self.bodies.append(body)
        if call in self.fails:
            return web.Response(status=500, text="it broke")
        ids = body["input_ids"]
        in_turn = next(i for i in range(99) if len(ids) - i <= len(PROMPT) or ids[-i - 1] in (STOP, *REPLY))
        output = [2 + place % 8 for place in range(start, start + TURN_TOKENS - in_turn - 1)] + [STOP]
        if not self.ends:
            output = [2 + place % 8 for place in range(start, start + limit)]
        finish = "stop" if len(output) <= limit and self.ends else "length"
        output, first = output[:limit], body.get("routed_experts_start_len", 0)
        rows = range(first, start + len(output) - 1)
        routes = [[[row % 8, (row + 1 + call) % 8 if (1 + call) % 8 else (row + 1) % 8]] * 2 for row in rows]
        drawn: dict[str, Any] = {}
        if body.get("return_sampling_mask"):  # of one id more in each call
            masks = [[token, *range(10, 11 + call)] for token in output]
            drawn = dict(zip(MASK_FIELDS, (masks, [-0.5 - call] * len(output)), strict=True))
        return {
            "output_ids": output,
            "meta_info": {
                **drawn,
                "finish_reason": {"type": finish},
                "weight_versions": [{"version": self.versions[call], "start": 0, "end": len(output)}],
                "output_token_logprobs": [[-1.0 - call, token, None] for token in output],
                "routed_experts": base64.b64encode(np.array(routes, dtype="<i4").tobytes()).decode(),
            },
        }


@dataclass
class Environment:
    """Replies with `REPLY` until the model has had `turns`."""

    turns: int = 3
    max_turns: int = 9
    max_turn_tokens: int = 0
    max_reply_tokens: int = 9
    reply: TurnReply = TurnReply(REPLY, ({"role": "tool", "content": "so"},), reward=0.25, state={"n": 1})
    seen: list[Sample] = field(default_factory=list)

    async def respond(self, sample: Sample) -> TurnReply:
        self.seen.append(sample)
        assert sample.finish == TURN and sample.tokens[-1] == STOP
        if len(sample.turns) >= self.turns:
            return TurnReply(done=True, reward=1.0)
        return self.reply


def client(url: str, **settings: Any) -> RolloutClient:
    rollout = Rollout(**({"max_new_tokens": 40, "retries": 0} | settings))
    return RolloutClient([url], rollout, RouteFormat(SIGNATURE), vocab_size=16, max_length=99)


def converse(server: Server, environment: Any, *, partial: Sample | None = None, **settings: Any) -> Sample:
    call = {name: settings.pop(name) for name in ("budget", "version", "on_complete") if name in settings}
    with serve(server) as url:
        request = SampleRequest(0, PROMPT, 77, partial)
        return client(url, **settings).sample([request], [STOP], environment=environment, **call)[0]


def require_whole(sample: Sample) -> None:
    """Three turns with two replies, as one request would have sampled them."""
    turn = [True] * TURN_TOKENS
    assert sample.full_sampled_mask.tolist() == turn + [False] * 2 + turn + [False] * 2 + turn
    replies = sample.response[~sample.full_sampled_mask].tolist()
    assert replies == [*REPLY, *REPLY] and len(sample.tokens) == len(PROMPT) + 13
    assert sample.routes[:, 0, 0].tolist() == [row % 8 for row in range(len(sample.tokens) - 1)]
    assert sample.route_mask is None and sample.prompt_length == len(PROMPT)
    assert (sample.logprobs[~sample.full_sampled_mask] == 0).all()
    assert [(turn.start, turn.end, turn.num_reply_tokens) for turn in sample.turns] == [
        (0, 3, 2),
        (5, 8, 2),
        (10, 13, 0),
    ]
    assert [turn.reward for turn in sample.turns] == [0.25, 0.25, 1.0] and sample.environment_reward == 1.5
    assert sample.finish == "stop" and sample.complete and sample.last_turn.tolist() == sample.response[10:].tolist()


def test_turns_and_replies_are_one_sample() -> None:
    server, environment = Server(), Environment()
    sample = converse(server, environment)
    require_whole(sample)
    assert sample.logprobs.tolist() == [-1.0] * 3 + [0.0] * 2 + [-2.0] * 3 + [0.0] * 2 + [-3.0] * 3
    # What a turn was sampled after is what was sampled before it, token for token, and the reply.
    assert [body["input_ids"] for body in server.bodies] == [sample.tokens[:n].tolist() for n in (3, 8, 13)]
    # A row is asked for once: of a turn's last token with the next turn, which was fed it.
    assert [body.get("routed_experts_start_len") for body in server.bodies] == [None, 5, 10]
    assert {body["sampling_params"]["sampling_seed"] for body in server.bodies} == {77}
    assert [body["sampling_params"]["max_new_tokens"] for body in server.bodies] == [40, 35, 30]
    assert sample.spans == (VersionSpan("7", 0, 13),) and sample.turns[0].messages[0]["content"] == "so"
    assert [seen.turns[-1].state for seen in environment.seen] == [None] * 3
    assert [seen.turns[-2].state for seen in environment.seen[1:]] == [{"n": 1}] * 2


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7])
def test_a_budget_bounds_what_is_sampled_over_turns(budget: int) -> None:
    """Every call samples so many tokens, in whatever turn; the environment is asked in the call that goes on."""
    server, environment = Server(), Environment()
    sample: Sample | None = None
    sampled = [0]
    while sample is None or not sample.complete:
        sample = converse(server, environment, partial=sample, budget=budget)
        sampled.append(sample.num_sampled)
    require_whole(sample)
    steps = np.diff(sampled)
    assert steps.max() == budget and (steps[:-2] == budget).all() and sampled[-1] == 3 * TURN_TOKENS
    assert len(environment.seen) == 3  # once a turn


def test_versions_of_turns_and_of_replies() -> None:
    """A reply's tokens, and the row of the end token before them, are of the version that computed them."""
    server, environment = Server(versions=["3", "4", "4"]), Environment()
    first = converse(server, environment, budget=3, version="3")
    assert first.finish == TURN
    sample = converse(server, environment, partial=first, version="4")
    require_whole(sample)
    assert sample.spans == (VersionSpan("3", 0, 3), VersionSpan("4", 3, 13))
    assert sample.row_spans == (VersionSpan("3", 0, 5), VersionSpan("4", 5, 15))
    calls = [(one - row - 1) % 8 for row, (_, one) in enumerate(sample.routes[:, 0].tolist())]
    assert calls == [0] * 5 + [1] * 5 + [2] * 5


def test_a_turn_of_older_weights_is_refused() -> None:
    server = Server(versions=["4", "3", "3", "3"])
    with pytest.raises(UserError, match=r"sampled with weights \['3'\], the trainer is at 4"):
        converse(server, Environment(), version="4")
    with serve(Server(fails={1})) as url:
        (failed,) = client(url).generate([PROMPT], 1, 0, [STOP], version="7", max_failures=1, environment=Environment())
    with serve(Server(versions=["8"] * 9)) as url, pytest.raises(UserError, match=r"tokens of the weights \['7'\]"):
        client(url).generate(
            [PROMPT], 1, 0, [STOP], version="8", max_failures=1, environment=Environment(), previous=[failed]
        )


def test_after_a_failure_the_turns_stay_and_the_failed_one_is_requested_again() -> None:
    server, environment = Server(fails={1}), Environment()
    with serve(server) as url:
        asking = client(url)
        arguments = ([PROMPT], 1, 5, [STOP])
        known = {"version": "7", "max_failures": 1, "environment": environment}
        (failed,) = asking.generate(*arguments, **known)
        assert isinstance(failed, SampleError) and failed.partial.finish == TURN and len(failed.partial.turns) == 1
        (sample,) = asking.generate(*arguments, **known, previous=[failed])
    require_whole(sample)
    assert [len(body["input_ids"]) for body in server.bodies] == [3, 8, 8, 13]
    server = Server(fails={1})
    require_whole(converse(server, Environment(), retries=1))  # a request's own retry
    assert [body["input_ids"] for body in server.bodies][1] == [body["input_ids"] for body in server.bodies][2]


@pytest.mark.parametrize(
    ("environment", "settings", "turns", "finish"),
    [
        (Environment(max_turns=2), {}, 2, "length"),
        (Environment(max_reply_tokens=1), {}, 1, "length"),
        (Environment(), {"max_new_tokens": 5}, 1, "length"),  # the reply and no token after it
        (Environment(), {"max_new_tokens": 6}, 2, "length"),  # the second turn is cut off
        (Environment(max_turn_tokens=2), {}, 1, "length"),
        (Environment(turns=1), {}, 1, "stop"),
    ],
)
def test_limits_end_a_conversation(environment: Environment, settings: dict[str, Any], turns: int, finish: str) -> None:
    sample = converse(Server(), environment, **settings)
    assert sample.complete and sample.finish == finish and len(sample.turns) == turns
    assert sample.full_sampled_mask[-1] and sample.turns[-1].num_reply_tokens == 0
    assert sample.turns[-1].ended == (sample.tokens[-1] == STOP)
    assert len(sample.response) <= settings.get("max_new_tokens", 40)


def test_a_turn_in_progress_has_its_own_limit_over_calls() -> None:
    server, environment = Server(ends=False), Environment(max_turn_tokens=5)
    first = converse(server, environment, budget=3)
    assert first.finish == PARTIAL and first.turns == ()
    last = converse(server, environment, partial=first, budget=3)
    assert (last.finish, len(last.response), last.turns) == ("length", 5, (Turn(0, 5, ended=False),))


def test_an_environments_failure_ends_its_sample_and_no_other() -> None:
    environment = Environment(reply=TurnReply(failure="it fell"))
    with serve(Server()) as url:
        samples = client(url).generate([PROMPT], 2, 5, [STOP], environment=environment)
    for sample in samples:
        assert sample.complete and sample.failure == "it fell" and sample.reward is None and not sample.lost
        assert [turn.failed for turn in sample.turns] == [True] and sample.sampled_mask is None


def test_what_an_environment_cannot_do_at_all_stops_the_call() -> None:
    class Broken(Environment):
        async def respond(self, sample: Sample) -> TurnReply:
            raise UserError("it cannot be started")

    with pytest.raises(UserError, match="^it cannot be started$"):
        converse(Server(), Broken())
    with pytest.raises(UserError, match="token id outside"):
        converse(Server(), Environment(reply=TurnReply((16,))))


def test_a_sample_is_finished_while_others_are_sampled() -> None:
    """The reward of one may end before the first turn of another does: here it must, or the test hangs."""
    scored: list[Sample] = []

    async def score(sample: Sample) -> Sample:
        scored.append(sample)
        return replace(sample, reward=2.0)

    server = Server()

    async def slow(request: web.Request, body: dict[str, Any]) -> Any:
        while body["input_ids"][0] == 9 and not scored:
            await asyncio.sleep(0.001)
        return server(request, body)

    with serve(slow) as url:
        samples = client(url).generate([[9, 4, 5], PROMPT], 1, 0, [STOP], environment=Environment(), on_complete=score)
    assert [sample.reward for sample in samples] == [2.0, 2.0] and len(scored) == 2
    assert scored[0].tokens[0] == PROMPT[0]


def test_a_continued_sample_has_the_index_of_its_request() -> None:
    """Also where nothing more is sampled: the environment and rewards look its prompt up by it."""
    environment = Environment(turns=1)
    first = converse(Server(), environment, budget=3)
    with serve(Server()) as url:
        request = SampleRequest(4, PROMPT, 77, first)
        (sample,) = client(url).sample([request], [STOP], environment=environment)
    assert sample.prompt_index == 4 and environment.seen[-1].prompt_index == 4 and sample.complete


def test_append_refuses_another_prefix_other_replies_and_rows_twice() -> None:
    whole = converse(Server(), Environment())
    first = converse(Server(), Environment(), budget=3)
    replied = first.add_reply(TurnReply(REPLY))

    def make(tokens: list[int], prompt_length: int, rows: int | None = None) -> Sample:
        n = len(tokens) - prompt_length
        routes = whole.routes[: len(tokens) - 1 if rows is None else rows]
        spans = (VersionSpan("7", 0, n),)
        return Sample(0, np.array(tokens), prompt_length, np.zeros(n, np.float32), routes, spans, "stop")

    tokens = whole.tokens.tolist()
    assert replied.append(make(tokens[:11], 8)).full_sampled_mask.tolist() == [True] * 3 + [False] * 2 + [True] * 3
    for wrong in (
        make([*tokens[:5], 9, *tokens[6:11]], 8),  # re-tokenised: a token of the turn is another
        make(tokens[:11], 9),  # a longer reply
        make(tokens[:11], 6),  # without the reply
        make(tokens[:11], 8, rows=11),
    ):
        with pytest.raises(AssertionError):
            replied.append(wrong)
    with pytest.raises(AssertionError):
        first.append(make(tokens[:11], 8))  # nobody replied


def test_the_ids_of_truncated_draws_stay_with_their_turns() -> None:
    """A reply's tokens were drawn from nothing; turns may have been drawn from different numbers of ids."""
    sample = converse(Server(), Environment(), top_k=4)
    require_whole(sample)
    assert sample.kept_ids is not None and sample.kept_ids.shape == (13, 4)
    counts = (sample.kept_ids != NO_ID).sum(axis=1).tolist()
    assert counts == [2] * 3 + [0] * 2 + [3] * 3 + [0] * 2 + [4] * 3
    assert (sample.kept_ids[sample.full_sampled_mask, 0] == sample.response[sample.full_sampled_mask]).all()
    assert sample.logprobs.tolist() == [-0.5] * 3 + [0.0] * 2 + [-1.5] * 3 + [0.0] * 2 + [-2.5] * 3


def test_a_minimum_counts_all_tokens_of_a_conversation() -> None:
    """Replies count where a request says what is left of the minimum, as where training holds end tokens back."""
    server = Server()
    converse(server, Environment(), min_new_tokens=2, max_new_tokens=20)
    assert [body["sampling_params"]["min_new_tokens"] for body in server.bodies] == [2, 0, 0]
    server = Server()
    partial = converse(server, Environment(), min_new_tokens=2, budget=1)
    converse(server, Environment(), min_new_tokens=2, partial=partial)
    assert [body["sampling_params"]["min_new_tokens"] for body in server.bodies] == [1, 1, 0, 0]


def test_a_stop_text_ends_a_turn_without_an_end_token() -> None:
    """What the template ends a turn by then comes with the reply."""

    def answer(request: web.Request, body: dict[str, Any]) -> Any:
        reply = Server()(request, body)
        meta = reply["meta_info"]
        if reply["output_ids"][-1] == STOP:  # instead of the end token another one, with which the text ends
            reply["output_ids"][-1] = meta["output_token_logprobs"][-1][1] = 14
            meta["finish_reason"] = {"type": "stop", "matched": "so."}
        return reply

    @dataclass
    class Any14(Environment):
        async def respond(self, sample: Sample) -> TurnReply:
            assert sample.tokens[-1] == 14 and not sample.turns[-1].ended
            return TurnReply((STOP, *REPLY)) if len(sample.turns) < 2 else TurnReply(done=True)

    with serve(answer) as url:
        request = SampleRequest(0, PROMPT, 77)
        (sample,) = client(url, stop=["so."]).sample([request], [STOP], environment=Any14())
    assert [turn.ended for turn in sample.turns] == [False, False] and sample.finish == "stop"
