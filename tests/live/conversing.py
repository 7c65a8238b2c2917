"""Conversations with a real server, and what a fresh forward of the whole of one says of all its tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from megatron_bai.rollout.client import RolloutClient, SampleRequest, sampling_seed
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.turns import TurnReply

# `[T − 1]` log-probabilities, `[T − 1, layers, topk]` sorted routes, and `[T − 1]` whether rounding can change neither.
Forward: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
TOLERANCE = 2e-5  # nats, of float32 in two engines
PROMPTS = [[5, 6, 8], [9, 10], [12, 13, 14, 15, 16]]
REPLIES = [(40, 41, 42, 43), (44,), (45, 46, 47)]
ENDS = frozenset((1, 2, 3, 4, 7, 17, 19, 23, 29, 31))  # of a random model's turns, which then have some ten tokens


@dataclass
class Toy:
    """Replies to the first turns with given tokens."""

    turns: int = 3
    max_turns: int = 9
    max_turn_tokens: int = 0
    max_reply_tokens: int = 9
    asked: list[int] = field(default_factory=list)

    async def respond(self, sample: Sample) -> TurnReply:
        turn = len(sample.turns)
        self.asked.append(turn)
        if turn >= self.turns:
            return TurnReply(done=True, reward=1.0)
        return TurnReply(REPLIES[turn % len(REPLIES)], ({"role": "tool", "content": str(turn)},), reward=0.5)


def make_requests(members: int = 4, seed: int = 3) -> list[SampleRequest]:
    return [
        SampleRequest(index, ids, sampling_seed(seed, index, member))
        for index, ids in enumerate(PROMPTS)
        for member in range(members)
    ]


def converse(client: RolloutClient, **settings: Any) -> list[Sample]:
    """Some conversations, of which at least one has three turns."""
    samples = client.sample(make_requests(), ENDS, environment=Toy(), **settings)
    assert max(len(sample.turns) for sample in samples) == 3, "the test's premise"
    return samples


def require_fresh(sample: Sample, forward: Forward, version: str | None = None) -> None:
    """Assert that what was recorded of a conversation is what one forward of all its tokens gives.

    Of a version: what its spans say it computed; None: everything, and no row is missing.
    """
    logprobs, routes, sure = forward(sample.tokens)
    start, mask = sample.prompt_length - 1, sample.full_sampled_mask
    assert len(sample.routes) == len(sample.tokens) - 1 and sample.route_mask is None
    assert sum(sure) > 0 and len(sample.logprobs) == len(mask) == len(sample.response)
    assert (sample.logprobs[~mask] == 0).all() and mask[-1]
    rows = np.zeros(len(sample.routes), dtype=bool)
    for span in sample.row_spans:
        rows[span.start : span.end] = version in (None, span.version)
    known = mask & sure[start:] & rows[start:]
    np.testing.assert_allclose(sample.logprobs[known], logprobs[start:][known], atol=TOLERANCE, rtol=0)
    known = sure & rows
    np.testing.assert_array_equal(np.sort(sample.routes, -1)[known], routes[known])
    assert version is not None or known.mean() > 0.5, "something was compared"
