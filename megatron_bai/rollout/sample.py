"""One response and all that training needs to know about it: nothing is looked up by position in a second list."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_bai.routing.routes import VersionSpan


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        prompt: index of the prompt in its batch; samples of one group share it.
        tokens: `[T]` int64, the prompt's ids then the response's.
        prompt_length: tokens of the prompt.
        logprobs: `[T − prompt_length]` float32, natural log-probabilities of the response's tokens under the
            inference engine, at the temperature sampled with.
        routes: `[T − 1, moe_layers, topk]` expert ids (see `routing.routes`).
        spans: weight versions that the response's tokens were sampled with, covering them in order.
        finish: `stop` (end token), `length` (ran out of tokens) or `abort`.
        recorded: `[T − 1]` bool, rows of `routes` that are those of the weights that sampled; None: all.
        reward: a finite number; None before it is known, and for good where `failure` says why there is none.
    """

    prompt: int
    tokens: np.ndarray
    prompt_length: int
    logprobs: np.ndarray
    routes: np.ndarray
    spans: tuple[VersionSpan, ...]
    finish: str
    recorded: np.ndarray | None = None
    reward: float | None = None
    failure: str = ""

    @property
    def response(self) -> np.ndarray:
        """`[T − prompt_length]` int64 ids of the response."""
        return self.tokens[self.prompt_length :]

    @property
    def row_spans(self) -> tuple[VersionSpan, ...]:
        """Weight versions of the rows of `routes`: row t was computed to sample token t + 1, the prompt's before the
        first token of the response."""
        shift = self.prompt_length - 1
        spans = [VersionSpan(span.version, span.start + shift, span.end + shift) for span in self.spans]
        return (VersionSpan(spans[0].version, 0, spans[0].end), *spans[1:]) if spans else ()

    def of_layers(self, columns: Sequence[int]) -> "Sample":
        """The same with the routes of some MoE layers, which are counted from 0."""
        return replace(self, routes=self.routes[:, list(columns)])
