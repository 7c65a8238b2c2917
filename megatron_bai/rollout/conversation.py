"""One sample from its first request to its end: requests, and between them the environment's replies."""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import TypeAlias, TypeVar

from megatron_bai.errors import UserError
from megatron_bai.rollout.http_client import HttpRequest, Post
from megatron_bai.rollout.sample import PARTIAL, TURN, Sample
from megatron_bai.rollout.turns import TurnEnvironment

T = TypeVar("T")
OnComplete: TypeAlias = Callable[[Sample], Awaitable[Sample]]


class SampleError(UserError):
    """A sample whose request failed for good.

    Attributes:
        partial: the tokens that it has, which another call continues; None: none.
    """

    def __init__(self, message: str, partial: Sample | None):
        super().__init__(message)
        self.partial = partial


class FatalError(Exception):
    """An error of an environment or a reward that is not one sample's: it stops the call, and is in `cause`."""

    def __init__(self, cause: UserError):
        super().__init__(str(cause))
        self.cause = cause


MakeRequest: TypeAlias = Callable[[Sample | None, tuple[int, ...], int], HttpRequest[Sample]]


class SampleDriver:
    """Carries one sample to its end, or as far as a call's budget goes.

    Args:
        make_request: makes the request that continues a sample, None at its beginning, by at most so many tokens after
            the ids of a reply. Its result is the continued sample, of finish `stop`, `length` or `abort`.
        max_new_tokens: of the response, the environment's tokens included.
        budget: tokens to sample in this call.
        vocab_size: of the model.
        end_tokens: that end a turn by themselves.
        environment: replies to turns; None: the sample has one.
        on_complete: is awaited with the sample once it is complete, for what replaces it; None: nothing is.
        partial: the sample so far; None: it begins.

    Attributes:
        sample: the tokens so far, whole turns of which stay where a request fails; None: none.
    """

    def __init__(
        self,
        make_request: MakeRequest,
        max_new_tokens: int,
        budget: int,
        vocab_size: int,
        end_tokens: Collection[int],
        environment: TurnEnvironment | None,
        on_complete: OnComplete | None,
        partial: Sample | None,
    ):
        self._make_request, self._max_new_tokens, self._budget = make_request, max_new_tokens, budget
        self._vocab_size, self._end_tokens = vocab_size, end_tokens
        self._environment, self._on_complete = environment, on_complete
        self.sample = partial

    async def run(self, post: Post) -> Sample:
        """Request turn after turn until the sample is complete or the budget is used up.

        Args:
            post: of `http_client.run_all`.

        Raises:
            UserError: a request failed for good.
            FatalError: the environment or a reward cannot be used at all.
        """
        while True:
            ids: tuple[int, ...] = ()
            continued = self.sample
            if continued is not None and continued.finish == TURN:
                continued, ids = await self._reply(continued)
            if continued is not None and continued.complete:
                self.sample = continued
                break
            room = self._count_room(continued, len(ids))  # of the turn and the response, whatever the budget
            limit = min(room, self._budget)
            assert limit > 0, f"a request without tokens: {room} fit, of the budget there are {self._budget}"
            before = 0 if continued is None else continued.num_sampled
            sample: Sample = await post(self._make_request(continued, ids, limit))
            self._budget -= sample.num_sampled - before
            self.sample = self._end_request(sample, used_up=limit < room)
            if self._budget <= 0 and not self.sample.complete:
                return self.sample
        if self._on_complete:
            self.sample = continued = await _guard(self._on_complete(continued))
        return continued

    def _count_room(self, sample: Sample | None, num_reply_tokens: int) -> int:
        """Return how many tokens fit into the sample's turn and response, after those of a reply."""
        used = 0 if sample is None else len(sample.response)
        room = self._max_new_tokens - used - num_reply_tokens
        if self._environment and self._environment.max_turn_tokens:
            in_turn = 0 if sample is None or sample.finish == TURN else used - sample.next_turn_start
            room = min(room, self._environment.max_turn_tokens - in_turn)
        return room

    def _end_request(self, sample: Sample, used_up: bool) -> Sample:
        """Return the sample with its finish, and the turn that has ended.

        Args:
            sample: as its request ended.
            used_up: whether it had all that the budget left, and more tokens would fit.
        """
        if sample.finish == "length" and used_up:
            return replace(sample, finish=PARTIAL)
        if self._environment is None:
            return sample
        finish = TURN if sample.finish == "stop" else sample.finish
        return replace(sample, finish=finish).end_turn(finish == TURN and int(sample.tokens[-1]) in self._end_tokens)

    async def _reply(self, sample: Sample) -> tuple[Sample, tuple[int, ...]]:
        """Return the sample after the environment's reply to its last turn, and the ids to append; () if it ends."""
        environment = self._environment
        assert environment, "a turn ended, and no environment is there to reply"
        reply = await _guard(environment.respond(sample))
        if reply.failure:
            turns = (*sample.turns[:-1], replace(sample.turns[-1], failed=True))
            return replace(sample, finish="stop", failure=reply.failure, turns=turns), ()
        if reply.ids and not 0 <= min(reply.ids) <= max(reply.ids) < self._vocab_size:
            raise FatalError(UserError(f"the environment's reply has a token id outside [0, {self._vocab_size})"))
        fits = len(reply.ids) <= environment.max_reply_tokens
        fits &= len(sample.response) + len(reply.ids) < self._max_new_tokens
        if reply.done or not fits or len(sample.turns) >= environment.max_turns:
            # what ends here is no one's to read: its messages are shown alone
            return replace(sample.add_reply(replace(reply, ids=())), finish="stop" if reply.done else "length"), ()
        return sample.add_reply(reply), reply.ids


async def _guard(call: Awaitable[T]) -> T:
    """Await a call; a UserError of it is no failed request."""
    try:
        return await call
    except UserError as error:
        raise FatalError(error) from error
