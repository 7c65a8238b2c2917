"""One sampled response, or conversation, with all that training needs of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_bai.rollout.kept_ids import NO_ID, concatenate_kept
from megatron_bai.rollout.turns import Turn, TurnReply
from megatron_bai.routing.routes import RouteSignature, VersionSpan

PARTIAL, TURN, LOST = "partial", "turn", "lost"


@dataclass(frozen=True)
class Sample:
    """One sampled response. That of a conversation is all that follows the prompt: turns and the replies to them.

    Attributes:
        prompt_index: index of the prompt in its batch; samples of one group share it.
        tokens: `[T]` int64, the prompt's ids then the response's.
        prompt_length: tokens of the prompt.
        logprobs: `[T − prompt_length]` float32, natural log-probabilities of the response's tokens under the
            inference engine, at the temperature sampled with; 0 of tokens that the environment gave.
        routes: `[T − 1, layers, topk]` expert ids (see `routing.routes`) in the MoE layers of `columns`; `[0, …]` of a
            lost sample.
        spans: weight versions that the response's tokens were sampled with, covering them in order. Tokens of the
            environment have the version that computed them to sample the turn after.
        finish: `stop` (end token, or the environment's end), `length` (a limit of tokens or turns), `abort`, `partial`
            (the tokens of one go used; another continues it), `turn` (a turn ended; the environment is asked next), or
            `lost` (see `lost_sample`).
        route_mask: `[T − 1]` bool, rows of `routes` that are those of the weights that sampled; None: all.
        reward: a finite number; None before it is known, and where it failed.
        failure: why there is no reward; empty where there is one or it is not known yet.
        stream_index: index of the prompt in its split's stream, whatever batch it is in; −1 before it is in one.
        route_weights: `[T − 1, layers, topk]` float32, what the inference engine multiplied the outputs of `routes`
            with; None: not asked for, or the sample is lost.
        columns: MoE layers of the model, counted from 0, that `routes` and `route_weights` have, in this order; None:
            all of them, as sampled.
        sampled_mask: `[T − prompt_length]` bool, tokens of the response that the model sampled, the last one among
            them; the others are the environment's. None: all.
        turns: of a conversation, in order, without one that is in progress; empty where there is no environment.
        turn_weight: by which the environment's rewards of turns are in `reward`; 0: they are not.
        reward_parts: of a reward that is a sum, each part by name, without its weight.
        kept_ids: `[T − prompt_length, K]` int32, the ids that each token was drawn from (`rollout.kept_ids`), which
            `logprobs` are over, `NO_ID` where a token has fewer, or is the environment's; None: all, no draw was
            truncated.
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
    sampled_mask: np.ndarray | None = None
    turns: tuple[Turn, ...] = ()
    turn_weight: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
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
    def full_sampled_mask(self) -> np.ndarray:
        """`[T − prompt_length]` bool, `sampled_mask` as an array also where it is None."""
        length = len(self.tokens) - self.prompt_length
        return np.ones(length, dtype=bool) if self.sampled_mask is None else self.sampled_mask

    @property
    def num_sampled(self) -> int:
        """Tokens of the response that the model sampled."""
        return int(self.full_sampled_mask.sum())

    @property
    def last_turn(self) -> np.ndarray:
        """`[n]` int64 ids of the model's last turn, ended or not; where there is no environment, of the response."""
        return self.response[self.turns[-1].start if self.turns and self.finish != PARTIAL else self.next_turn_start :]

    @property
    def next_turn_start(self) -> int:
        """First token, counted from the response's first, of the turn in progress or of the next one."""
        return self.turns[-1].next_start if self.turns else 0

    @property
    def environment_reward(self) -> float | None:
        """Sum of the environment's rewards of turns; None where it gave none."""
        rewards = [turn.reward for turn in self.turns if turn.reward is not None]
        return sum(rewards) if rewards else None

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
        return self.finish not in (PARTIAL, TURN)

    def append(self, continuation: "Sample") -> "Sample":
        """Append tokens that were sampled after this sample's, with the weights that the server had then.

        Args:
            continuation: whose prompt is all of this sample's tokens, and after a turn those of the environment's reply
                to it. The server computed these again, with its weights; this sample's rows of routes stay, only those
                of later tokens are appended: of this sample's last token, which had none, of the reply, and of the
                continuation's.
        """
        rows, length = len(self.tokens) - 1, len(self.response)
        num_reply_tokens = continuation.prompt_length - len(self.tokens)
        assert np.array_equal(continuation.tokens[: len(self.tokens)], self.tokens), "of another sample"
        assert num_reply_tokens == (self.turns[-1].num_reply_tokens if self.finish == TURN else 0), "another reply"
        assert len(self.routes) == rows and len(continuation.routes) == len(continuation.tokens) - 1, "rows twice"
        assert self.columns == continuation.columns, "with the routes of other layers"
        spans, first = list(self.spans), length + num_reply_tokens
        for span in continuation.spans:
            start = length if span.start == 0 else span.start + first  # the reply's tokens are of the first version
            start = spans.pop().start if spans[-1].version == span.version else start
            spans.append(VersionSpan(span.version, start, span.end + first))
        route_mask = np.concatenate([self.full_route_mask, continuation.full_route_mask[rows:]])
        reply = np.zeros(num_reply_tokens, dtype=np.float32)
        sampled_mask = np.concatenate([self.full_sampled_mask, reply > 0, continuation.full_sampled_mask])
        return replace(
            continuation,
            prompt_length=self.prompt_length,
            logprobs=np.concatenate([self.logprobs, reply, continuation.logprobs]),
            routes=np.concatenate([self.routes, continuation.routes[rows:]]),
            spans=tuple(spans),
            route_mask=None if route_mask.all() else route_mask,
            route_weights=self._append_weights(continuation),
            sampled_mask=None if sampled_mask.all() else sampled_mask,
            turns=self.turns,
            kept_ids=self._append_kept(continuation, num_reply_tokens),
        )

    def end_turn(self, ended: bool) -> "Sample":
        """Return the sample with its turn in progress among `turns`.

        Args:
            ended: as in `Turn`.
        """
        return replace(self, turns=(*self.turns, Turn(self.next_turn_start, len(self.response), ended)))

    def add_reply(self, reply: TurnReply) -> "Sample":
        """Return the sample with what the environment replied to its last turn, without the reply's tokens.

        Args:
            reply: whose `ids` are the first that `append` appends.
        """
        assert self.finish == TURN and not self.turns[-1].num_reply_tokens, "no turn waits for a reply"
        turn = replace(
            self.turns[-1],
            messages=reply.messages,
            num_reply_tokens=len(reply.ids),
            reward=reply.reward,
            state=reply.state,
        )
        return replace(self, turns=(*self.turns[:-1], turn))

    def _append_weights(self, continuation: "Sample") -> np.ndarray | None:
        """Return the route weights of both, as `append` joins routes."""
        if self.route_weights is None or continuation.route_weights is None:
            return None
        return np.concatenate([self.route_weights, continuation.route_weights[len(self.tokens) - 1 :]])

    def _append_kept(self, continuation: "Sample", num_reply_tokens: int) -> np.ndarray | None:
        """Return the kept ids of both, and of a reply's tokens between them, which have none."""
        if self.kept_ids is None and continuation.kept_ids is None:
            return None
        assert self.kept_ids is not None and continuation.kept_ids is not None, "one part of a sample was truncated"
        reply = np.full((num_reply_tokens, 1), NO_ID, dtype=np.int32)
        return concatenate_kept([self.kept_ids, reply, continuation.kept_ids])

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
