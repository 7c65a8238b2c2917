"""Asks SGLang servers for samples, many at a time, and returns only what passed every check."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeVar, cast

import numpy as np

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.http_client import Limits, Request, ask_all
from megatron_bai.rollout.parse_reply import largest, to_sample, to_scores
from megatron_bai.rollout.sample import PARTIAL, Sample
from megatron_bai.rollout.servers.auth import use_key
from megatron_bai.routing.routes import RouteSignature

T = TypeVar("T")
_RESERVED = 7  # positions of its context that SGLang 0.5.21 gives to no request (managers/tp_worker.py, scheduler.py)


@dataclass(frozen=True)
class Wanted:
    """One sample to ask for.

    Attributes:
        prompt: index of its prompt in the batch.
        ids: of the prompt.
        seed: of the sample. SGLang's draw depends on it and the token's position, so it serves every part of a sample.
        former: what there is of it; None: it begins.
    """

    prompt: int
    ids: list[int]
    seed: int
    former: Sample | None = None


class RolloutClient:
    """Synchronous outside, concurrent inside: call it where no event loop runs. Holds no connection between calls.

    A prompt's samples are asked of one server, and of the next one when that fails.

    Args:
        urls: of servers with the same weights, `http://host:port`.
        rollout: sampling settings, limits and time-outs.
        signature: of the served model's routes.
        vocab_size: rows of its embedding. A larger id in a prompt would kill the server.
        max_length: its longest sequence, in tokens.
        first_server: which of them has the first prompt, so that several clients begin at different ones.
    """

    def __init__(
        self,
        urls: Sequence[str],
        rollout: Rollout,
        signature: RouteSignature,
        vocab_size: int,
        max_length: int,
        first_server: int = 0,
    ):
        self.urls, self.rollout, self.signature = list(urls), rollout, signature
        self.vocab_size, self.first_server = vocab_size, first_server
        self.max_length = longest_request(rollout, max_length)
        use_key(self.urls, rollout.api_key_file)

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        seed: int | str,
        stop_token_id: int,
        first: int = 0,
        temperature: float | None = None,
        version: str | None = None,
        tolerated: int | None = None,
        known: Sequence[Sample | UserError] = (),
    ) -> list[Sample | UserError]:
        """Sample `group_size` responses to every prompt.

        Args:
            prompts: token ids.
            seed: under `rollout.deterministic` it determines the samples, whatever order the server takes them in.
            stop_token_id: ends a response, and belongs to it.
            first: number of the first prompt in the stream: the seed of a sample depends on its prompt's number, so that
                it does not matter who asks for which part of the stream.
            temperature: None takes `rollout.temperature`.
            version: of the weights that must have sampled; None takes any.
            tolerated: how many samples may fail: why they did is returned in their place. When one more has failed
                nobody waits for the rest, which have failed then, too. None: the first failure is raised.
            known: what an earlier call with the same arguments returned: only what failed is asked again.

        Returns:
            `len(prompts) · group_size` samples, by prompt and then by member. One that the server aborted says so in
            `finish` and may be short.

        Raises:
            UserError: a prompt the model cannot take, before anything is sent; or a sample failed.
        """
        members = [(index, list(ids), member) for index, ids in enumerate(prompts) for member in range(group_size)]
        wanted = [Wanted(index, ids, sampling_seed(seed, first + index, member)) for index, ids, member in members]
        lacking = [i for i in range(len(members)) if not known or not isinstance(known[i], Sample)]
        asked = self.sample([wanted[i] for i in lacking], stop_token_id, temperature, 0, version, tolerated)
        found = dict(zip(lacking, asked, strict=True))
        return [found[i] if i in found else known[i] for i in range(len(members))]

    def sample(
        self,
        wanted: Sequence[Wanted],
        stop_token_id: int,
        temperature: float | None = None,
        budget: int = 0,
        version: str | None = None,
        tolerated: int | None = None,
    ) -> list[Sample | UserError]:
        """Begin samples, or go on with them.

        Args:
            stop_token_id, temperature, tolerated: as in `generate`.
            budget: new tokens of each at most; 0: `rollout.max_new_tokens`, which always is the most of all its parts.
            version: of the weights that must have sampled what is new; None takes any.

        Returns:
            Each with what there was of it before. One that used up its budget is not `complete`.

        Raises:
            UserError: as `generate`.
        """
        for each in wanted:
            self._check_ids(each.ids, self.rollout.max_new_tokens, f"prompt {each.prompt}")
        budget = budget or self.rollout.max_new_tokens
        requests = [self._sampling_request(each, stop_token_id, temperature, budget, version) for each in wanted]
        longest = max((len(each.ids) for each in wanted), default=0) + self.rollout.max_new_tokens
        return self._run(requests, longest, tolerated)

    def score(self, token_lists: Sequence[list[int]]) -> list[np.ndarray]:
        """The server's own log-probabilities of given tokens, at temperature 1.

        Args:
            token_lists: each at least two token ids.

        Returns:
            For a list of T tokens `[T − 1]` float32: those of tokens 1…T−1 given the tokens before.

        Raises:
            UserError: as `generate`.
        """
        for index, ids in enumerate(token_lists):
            self._check_ids(ids, 0, f"sequence {index}")

        requests = [self._scoring_request(list(ids)) for ids in token_lists]
        return cast(list[np.ndarray], self._run(requests, max(map(len, token_lists))))  # a failure is raised

    def _check_ids(self, ids: Sequence[int], new_tokens: int, where: str) -> None:
        if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
            raise UserError(f"{where} is empty or has a token id outside [0, {self.vocab_size})")
        if len(ids) + new_tokens > self.max_length:
            raise UserError(
                f"{where} has {len(ids)} tokens, and with {new_tokens} new ones exceeds the {self.max_length} that "
                "the model and rollout.max_total_tokens allow: lower rollout.max_new_tokens"
            )

    def _sampling_request(
        self, wanted: Wanted, stop_token_id: int, temperature: float | None, budget: int, version: str | None
    ) -> Request[Sample]:
        former = wanted.former
        ids = wanted.ids if former is None else former.tokens.tolist()
        left = self.rollout.max_new_tokens - (len(ids) - len(wanted.ids))
        limit = min(budget, left)
        params: dict[str, Any] = {
            "temperature": self.rollout.temperature if temperature is None else temperature,
            "top_p": 1.0,  # truncated sampling would not be the policy whose log-probabilities are returned
            "top_k": -1,
            "max_new_tokens": limit,
            "stop_token_ids": [stop_token_id],
        }
        if self.rollout.deterministic:  # without the server's flag a seed is ignored in silence
            params["sampling_seed"] = wanted.seed
        body = {"input_ids": ids, "sampling_params": params, "return_logprob": True, "return_routed_experts": True}
        start = 0 if former is None else len(ids) - 1  # rows that there are already are not sent once more
        if start:
            body["routed_experts_start_len"] = start

        def read(reply: Any) -> Sample:
            part = to_sample(reply, wanted.prompt, ids, self.signature, limit, stop_token_id, start)
            if part.tokens.max() >= self.vocab_size:
                raise ValueError(f"token {part.tokens.max()} is outside the vocabulary of {self.vocab_size}")
            if version is not None and (wrong := {span.version for span in part.spans} - {version}):
                raise ValueError(f"sampled with weights {sorted(wrong)}, the trainer is at {version}")
            if part.finish == "length" and limit < left:
                part = replace(part, finish=PARTIAL)
            return part if former is None else former.followed_by(part)

        return wanted.prompt, body, read

    def _scoring_request(self, ids: list[int]) -> Request[np.ndarray]:
        params = {"temperature": 1.0, "max_new_tokens": 0}
        body = {"input_ids": ids, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        return 0, body, lambda reply: to_scores(reply, ids, self.vocab_size)

    def _run(self, requests: list[Request[T]], longest: int, tolerated: int | None = None) -> list[T | UserError]:
        """Results in order; `tolerated` as in `generate`.

        Args:
            longest: tokens of a request and its reply together.
        """
        rollout = self.rollout
        reply_bytes = largest(longest, self.signature)
        setting = "rollout.request_timeout_s"
        limits = Limits(rollout.concurrency, rollout.request_timeout_s, rollout.retries, setting, reply_bytes)
        turned = [(self.first_server + turn, body, read) for turn, body, read in requests]
        found = ask_all(self.urls, "/generate", turned, limits, tolerated or 0)
        if tolerated is None:
            for each in found:
                if isinstance(each, UserError):
                    raise each
        return found


def longest_request(rollout: Rollout, max_length: int) -> int:
    """Tokens of a prompt and its response together that a server of a model takes.

    Args:
        max_length: the model's longest sequence.
    """
    return min(max_length, rollout.max_total_tokens) - _RESERVED


def sampling_seed(seed: int | str, prompt: int, member: int) -> int:
    """A seed in `[0, 2⁶³)` for one sample. Without one SGLang gives every member of a group the same."""
    digest = blake2b(f"{seed}/{prompt}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
