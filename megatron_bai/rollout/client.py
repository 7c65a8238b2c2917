"""Asks SGLang servers for samples, many at a time, and returns only what passed every check."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeVar, cast

import numpy as np

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.http_client import HttpRequest, RequestLimits, post_all
from megatron_bai.rollout.parse_reply import max_reply_bytes, parse_logprobs, parse_sample
from megatron_bai.rollout.sample import PARTIAL, Sample
from megatron_bai.rollout.servers.auth import register_key
from megatron_bai.routing.routes import RouteSignature

T = TypeVar("T")
_RESERVED_TOKENS = 7  # positions of its context that SGLang 0.5.21 gives to no request (managers/tp_worker.py, scheduler.py)


@dataclass(frozen=True)
class SampleRequest:
    """One sample to ask for.

    Attributes:
        prompt_index: index of its prompt in the batch.
        prompt_ids: of the prompt.
        seed: of the sample. SGLang's draw depends on it and the token's position, so it serves every part of a sample.
        partial: what there is of it; None: it begins.
    """

    prompt_index: int
    prompt_ids: list[int]
    seed: int
    partial: Sample | None = None


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
        self.max_length = max_request_tokens(rollout, max_length)
        register_key(self.urls, rollout.api_key_file)

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        seed: int | str,
        stop_token_id: int,
        first_prompt: int = 0,
        temperature: float | None = None,
        version: str | None = None,
        max_failures: int | None = None,
        previous: Sequence[Sample | UserError] = (),
    ) -> list[Sample | UserError]:
        """Sample `group_size` responses to every prompt.

        Args:
            prompts: token ids.
            seed: under `rollout.deterministic` it determines the samples, whatever order the server takes them in.
            stop_token_id: ends a response, and belongs to it.
            first_prompt: number of the first prompt in the stream: the seed of a sample depends on its prompt's number,
                so that it does not matter who asks for which part of the stream.
            temperature: None takes `rollout.temperature`.
            version: of the weights that must have sampled; None takes any.
            max_failures: how many samples may fail: why they did is returned in their place. When one more has failed
                nobody waits for the rest, which have failed then, too. None: the first failure is raised.
            previous: what an earlier call with the same arguments returned: only what failed is asked again.

        Returns:
            `len(prompts) · group_size` samples, by prompt and then by member. One that the server aborted says so in
            `finish` and may be short.

        Raises:
            UserError: a prompt the model cannot take, before anything is sent; or a sample failed.
        """
        members = [(index, list(ids), member) for index, ids in enumerate(prompts) for member in range(group_size)]
        wanted = [SampleRequest(index, ids, sampling_seed(seed, first_prompt + index, member)) for index, ids, member in members]
        lacking = [i for i in range(len(members)) if not previous or not isinstance(previous[i], Sample)]
        asked = self.sample([wanted[i] for i in lacking], stop_token_id, temperature, 0, version, max_failures)
        found = dict(zip(lacking, asked, strict=True))
        return [found[i] if i in found else previous[i] for i in range(len(members))]

    def sample(
        self,
        wanted: Sequence[SampleRequest],
        stop_token_id: int,
        temperature: float | None = None,
        budget: int = 0,
        version: str | None = None,
        max_failures: int | None = None,
    ) -> list[Sample | UserError]:
        """Begin samples, or go on with them.

        Args:
            stop_token_id, temperature, max_failures: as in `generate`.
            budget: new tokens of each at most; 0: `rollout.max_new_tokens`, which always is the most of all its parts.
            version: of the weights that must have sampled what is new; None takes any.

        Returns:
            Each with what there was of it before. One that used up its budget is not `complete`.

        Raises:
            UserError: as `generate`.
        """
        for each in wanted:
            self._check_ids(each.prompt_ids, self.rollout.max_new_tokens, f"prompt {each.prompt_index}")
        budget = budget or self.rollout.max_new_tokens
        requests = [self._sampling_request(each, stop_token_id, temperature, budget, version) for each in wanted]
        longest = max((len(each.prompt_ids) for each in wanted), default=0) + self.rollout.max_new_tokens
        return self._post_all(requests, longest, max_failures)

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
        return cast(list[np.ndarray], self._post_all(requests, max(map(len, token_lists))))  # a failure is raised

    def _check_ids(self, ids: Sequence[int], new_tokens: int, where: str) -> None:
        if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
            raise UserError(f"{where} is empty or has a token id outside [0, {self.vocab_size})")
        if len(ids) + new_tokens > self.max_length:
            raise UserError(
                f"{where} has {len(ids)} tokens, and with {new_tokens} new ones exceeds the {self.max_length} that "
                "the model and rollout.max_total_tokens allow: lower rollout.max_new_tokens"
            )

    def _sampling_request(
        self, wanted: SampleRequest, stop_token_id: int, temperature: float | None, budget: int, version: str | None
    ) -> HttpRequest[Sample]:
        partial = wanted.partial
        ids = wanted.prompt_ids if partial is None else partial.tokens.tolist()
        left = self.rollout.max_new_tokens - (len(ids) - len(wanted.prompt_ids))
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
        start = 0 if partial is None else len(ids) - 1  # rows that there are already are not sent once more
        if start:
            body["routed_experts_start_len"] = start

        def read(reply: Any) -> Sample:
            part = parse_sample(reply, wanted.prompt_index, ids, self.signature, limit, stop_token_id, start)
            if part.tokens.max() >= self.vocab_size:
                raise ValueError(f"token {part.tokens.max()} is outside the vocabulary of {self.vocab_size}")
            if version is not None and (wrong := {span.version for span in part.spans} - {version}):
                raise ValueError(f"sampled with weights {sorted(wrong)}, the trainer is at {version}")
            if part.finish == "length" and limit < left:
                part = replace(part, finish=PARTIAL)
            return part if partial is None else partial.append(part)

        return wanted.prompt_index, body, read

    def _scoring_request(self, ids: list[int]) -> HttpRequest[np.ndarray]:
        params = {"temperature": 1.0, "max_new_tokens": 0}
        body = {"input_ids": ids, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        return 0, body, lambda reply: parse_logprobs(reply, ids, self.vocab_size)

    def _post_all(self, requests: list[HttpRequest[T]], longest: int, max_failures: int | None = None) -> list[T | UserError]:
        """Results in order; `max_failures` as in `generate`.

        Args:
            longest: tokens of a request and its reply together.
        """
        rollout = self.rollout
        reply_bytes = max_reply_bytes(longest, self.signature)
        setting = "rollout.request_timeout_s"
        limits = RequestLimits(rollout.concurrency, rollout.request_timeout_s, rollout.retries, setting, reply_bytes)
        turned = [(self.first_server + turn, body, read) for turn, body, read in requests]
        found = post_all(self.urls, "/generate", turned, limits, max_failures or 0)
        if max_failures is None:
            for each in found:
                if isinstance(each, UserError):
                    raise each
        return found


def max_request_tokens(rollout: Rollout, max_length: int) -> int:
    """Tokens of a prompt and its response together that a server of a model takes.

    Args:
        max_length: the model's longest sequence.
    """
    return min(max_length, rollout.max_total_tokens) - _RESERVED_TOKENS


def sampling_seed(seed: int | str, prompt: int, member: int) -> int:
    """A seed in `[0, 2⁶³)` for one sample. Without one SGLang gives every member of a group the same."""
    digest = blake2b(f"{seed}/{prompt}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
