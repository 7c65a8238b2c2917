"""One response and all that training needs to know about it: nothing is looked up by position in a second list."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_bai.routing.routes import RouteSignature, VersionSpan

PARTIAL, LOST = "partial", "lost"


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        prompt_index: index of the prompt in its batch; samples of one group share it.
        tokens: `[T]` int64, the prompt's ids then the response's.
        prompt_length: tokens of the prompt.
        logprobs: `[T − prompt_length]` float32, natural log-probabilities of the response's tokens under the
            inference engine, at the temperature sampled with.
        routes: `[T − 1, moe_layers, topk]` expert ids (see `routing.routes`); of one that is lost, none.
        spans: weight versions that the response's tokens were sampled with, covering them in order.
        finish: `stop` (end token), `length` (ran out of tokens), `abort`, `partial` (ran out of those of one go, and is
            to be gone on with), or `lost` (see `lost_sample`).
        route_mask: `[T − 1]` bool, rows of `routes` that are those of the weights that sampled; None: all.
        reward: a finite number; None before it is known, and for good where `failure` says why there is none.
    """

    prompt_index: int
    tokens: np.ndarray
    prompt_length: int
    logprobs: np.ndarray
    routes: np.ndarray
    spans: tuple[VersionSpan, ...]
    finish: str
    route_mask: np.ndarray | None = None
    reward: float | None = None
    failure: str = ""

    @property
    def lost(self) -> bool:
        """Whether no server could be had to sample it: there is a prompt alone, and nothing to learn from."""
        return self.finish == LOST

    @property
    def response(self) -> np.ndarray:
        """`[T − prompt_length]` int64 ids of the response."""
        return self.tokens[self.prompt_length :]

    @property
    def full_route_mask(self) -> np.ndarray:
        """`route_mask`, as an array also where all are."""
        return np.ones(len(self.routes), dtype=bool) if self.route_mask is None else self.route_mask

    @property
    def row_spans(self) -> tuple[VersionSpan, ...]:
        """Weight versions of the rows of `routes`: row t was computed to sample token t + 1, the prompt's before the
        first token of the response."""
        shift = self.prompt_length - 1
        spans = [VersionSpan(span.version, span.start + shift, span.end + shift) for span in self.spans]
        return (VersionSpan(spans[0].version, 0, spans[0].end), *spans[1:]) if spans else ()

    @property
    def complete(self) -> bool:
        """Whether nothing more is to be sampled of it."""
        return self.finish != PARTIAL

    def append(self, part: "Sample") -> "Sample":
        """This and what was sampled after it, with the weights that the server had then.

        Args:
            part: its prompt is all of this sample's tokens. The server computed them again, with its weights: what they
                were sampled with stays, so of `part` the rows that predicted its own tokens are taken. The first of
                them is of this sample's last token, which had none.
        """
        assert np.array_equal(part.tokens[: part.prompt_length], self.tokens), "it continues another sample"
        kept, length = len(self.tokens) - 1, len(self.response)
        spans = list(self.spans)
        for span in part.spans:
            start = spans.pop().start if spans[-1].version == span.version else span.start + length
            spans.append(VersionSpan(span.version, start, span.end + length))
        recorded = np.concatenate([self.full_route_mask, part.full_route_mask[kept:]])
        return replace(
            part,
            prompt_length=self.prompt_length,
            logprobs=np.concatenate([self.logprobs, part.logprobs]),
            routes=np.concatenate([self.routes, part.routes[kept:]]),
            spans=tuple(spans),
            route_mask=None if recorded.all() else recorded,
        )

    def select_layers(self, columns: Sequence[int]) -> "Sample":
        """The same with the routes of some MoE layers, which are counted from 0."""
        return replace(self, routes=self.routes[:, list(columns)])


def lost_sample(prompt: int, ids: Sequence[int], signature: RouteSignature, failure: str) -> Sample:
    """Takes the place of a sample whose request failed for good: the prompt, no response, no row of routes, no reward.

    Args:
        prompt, ids: as in `Sample`.
        failure: why it failed.
    """
    routes = np.zeros((0, signature.moe_layers, signature.topk), signature.dtype)
    tokens, none = np.array(ids, dtype=np.int64), np.zeros(0, np.float32)
    return Sample(prompt, tokens, len(tokens), none, routes, (), LOST, failure=failure)
