"""One sampled response with all that training needs of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_bai.rollout.kept_ids import concatenate_kept
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
        routes: `[T − 1, layers, topk]` expert ids (see `routing.routes`) in the MoE layers of `columns`; `[0, …]` of a
            lost sample.
        spans: weight versions that the response's tokens were sampled with, covering them in order.
        finish: `stop` (end token), `length` (all tokens used), `abort`, `partial` (the tokens of one go used; another
            continues it), or `lost` (see `lost_sample`).
        route_mask: `[T − 1]` bool, rows of `routes` that are those of the weights that sampled; None: all.
        reward: a finite number; None before it is known, and where it failed.
        failure: why there is no reward; empty where there is one or it is not known yet.
        stream_index: index of the prompt in its split's stream, whatever batch it is in; −1 before it is in one.
        route_weights: `[T − 1, layers, topk]` float32, what the inference engine multiplied the outputs of `routes`
            with; None: not asked for, or the sample is lost.
        columns: MoE layers of the model, counted from 0, that `routes` and `route_weights` have, in this order; None:
            all of them, as sampled.
        kept_ids: `[T − prompt_length, K]` int32, the ids that each token was drawn from (`rollout.kept_ids`), which
            `logprobs` are over, `NO_ID` where a token has fewer; None: all, no draw was truncated.
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
    stream_index: int = -1
    route_weights: np.ndarray | None = None
    columns: tuple[int, ...] | None = None
    kept_ids: np.ndarray | None = None

    @property
    def lost(self) -> bool:
        """Whether the sample's request failed for good: there is a prompt alone."""
        return self.finish == LOST

    @property
    def response(self) -> np.ndarray:
        """`[T − prompt_length]` int64 ids of the response."""
        return self.tokens[self.prompt_length :]

    @property
    def full_route_mask(self) -> np.ndarray:
        """`[T − 1]` bool, `route_mask` as an array also where it is None."""
        return np.ones(len(self.routes), dtype=bool) if self.route_mask is None else self.route_mask

    @property
    def row_spans(self) -> tuple[VersionSpan, ...]:
        """Weight versions of the rows of `routes`.

        Row t was computed to sample token t + 1; the prompt's rows belong to the first token of the response.
        """
        shift = self.prompt_length - 1
        spans = [VersionSpan(span.version, span.start + shift, span.end + shift) for span in self.spans]
        return (VersionSpan(spans[0].version, 0, spans[0].end), *spans[1:]) if spans else ()

    @property
    def complete(self) -> bool:
        """Whether the sample needs no further request."""
        return self.finish != PARTIAL

    def append(self, continuation: "Sample") -> "Sample":
        """Append tokens that were sampled after this sample's, with the weights that the server had then.

        Args:
            continuation: whose prompt is all of this sample's tokens. The server computed these again, with its
                weights; this sample's rows of routes stay, only the rows that predicted the continuation's tokens are
                appended. The first of them is of this sample's last token, which had none.
        """
        assert np.array_equal(continuation.tokens[: continuation.prompt_length], self.tokens), "of another sample"
        assert self.columns == continuation.columns, "with the routes of other layers"
        rows, length = len(self.tokens) - 1, len(self.response)
        spans = list(self.spans)
        for span in continuation.spans:
            start = spans.pop().start if spans[-1].version == span.version else span.start + length
            spans.append(VersionSpan(span.version, start, span.end + length))
        route_mask = np.concatenate([self.full_route_mask, continuation.full_route_mask[rows:]])
        return replace(
            continuation,
            prompt_length=self.prompt_length,
            logprobs=np.concatenate([self.logprobs, continuation.logprobs]),
            routes=np.concatenate([self.routes, continuation.routes[rows:]]),
            spans=tuple(spans),
            route_mask=None if route_mask.all() else route_mask,
            route_weights=self._append_weights(continuation),
            kept_ids=self._append_kept(continuation),
        )

    def _append_weights(self, continuation: "Sample") -> np.ndarray | None:
        """Return the route weights of both, as `append` joins routes."""
        if self.route_weights is None or continuation.route_weights is None:
            return None
        return np.concatenate([self.route_weights, continuation.route_weights[len(self.tokens) - 1 :]])

    def _append_kept(self, continuation: "Sample") -> np.ndarray | None:
        """Return the kept ids of both."""
        if self.kept_ids is None and continuation.kept_ids is None:
            return None
        assert self.kept_ids is not None and continuation.kept_ids is not None, "one part of a sample was truncated"
        return concatenate_kept([self.kept_ids, continuation.kept_ids])

    def select_layers(self, columns: Sequence[int]) -> "Sample":
        """Return the sample with the routes of some of its MoE layers.

        Args:
            columns: of the model, counted from 0, whatever layers this sample has the routes of.

        Raises:
            ValueError: the sample lacks a layer's routes.
        """
        held = range(self.routes.shape[1]) if self.columns is None else self.columns
        positions, weights = [held.index(column) for column in columns], self.route_weights
        return replace(
            self,
            routes=self.routes[:, positions],
            route_weights=None if weights is None else weights[:, positions],
            columns=tuple(columns),
        )


def lost_sample(prompt_index: int, ids: Sequence[int], signature: RouteSignature, failure: str) -> Sample:
    """Make the stand-in for a sample whose request failed for good: a prompt without response, routes or reward.

    Args:
        prompt_index: index of the prompt in its batch.
        ids: token ids of the prompt.
        signature: of the served model's routes.
        failure: why the request failed.
    """
    routes = np.zeros((0, signature.moe_layers, signature.topk), signature.dtype)
    tokens, none = np.array(ids, dtype=np.int64), np.zeros(0, np.float32)
    return Sample(prompt_index, tokens, len(tokens), none, routes, (), LOST, failure=failure)
