"""The client of SGLang servers: many requests at a time, of which only replies that pass every check are returned."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.conversation import FatalError, OnComplete, SampleDriver, SampleError
from megatron_bai.rollout.http_client import HttpRequest, RequestLimits, post_all, run_all
from megatron_bai.rollout.kept_ids import max_kept
from megatron_bai.rollout.parse_reply import max_reply_bytes, parse_logprobs, parse_sample
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.sample_request import SampleRequest, sampling_seed
from megatron_bai.rollout.sampling_params import make_rollout_params, make_sampling_params
from megatron_bai.rollout.servers.auth import register_key
from megatron_bai.rollout.turns import TurnEnvironment

# Positions of its context that SGLang 0.5.21 gives to no request (managers/tp_worker.py, scheduler.py).
_RESERVED_TOKENS = 7
__all__ = ["RolloutClient", "SampleRequest", "max_request_tokens", "sampling_seed"]


class RolloutClient:
    """A synchronous client that sends requests concurrently. Call it where no event loop runs.

    A prompt's samples are requested from one server, and from the next one when that fails. No connection is held
    between calls.

    Args:
        urls: of servers with the same weights, `http://host:port`.
        rollout: sampling settings, limits and time-outs.
        route_format: of the servers' replies.
        vocab_size: rows of its embedding. A larger id in a prompt would kill the server.
        max_length: its longest sequence, in tokens.
        first_server: index of the server of the first prompt, so that several clients begin at different ones.
    """

    def __init__(
        self,
        urls: Sequence[str],
        rollout: Rollout,
        route_format: RouteFormat,
        vocab_size: int,
        max_length: int,
        first_server: int = 0,
    ):
        self.urls, self.rollout, self.route_format = list(urls), rollout, route_format
        self.vocab_size, self.first_server = vocab_size, first_server
        self.max_length = max_request_tokens(rollout, max_length)
        register_key(self.urls, rollout.api_key_file)

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        seed: int | str,
        stop_token_ids: Collection[int],
        first_prompt: int = 0,
        temperature: float | None = None,
        version: str | None = None,
        max_failures: int | None = None,
        previous: Sequence[Sample | UserError] = (),
        environment: TurnEnvironment | None = None,
        on_complete: OnComplete | None = None,
    ) -> list[Sample | UserError]:
        """Sample `group_size` responses to every prompt.

        Args:
            prompts: token ids of each.
            group_size: samples of a prompt.
            seed: under `rollout.deterministic` it determines the samples, in whatever order the server computes them.
            stop_token_ids: any of them ends a response, and belongs to it.
            first_prompt: index of the first prompt in the stream of prompts. The seed of a sample depends on its
                prompt's index there, and not on which client requests it.
            temperature: None takes `rollout.temperature`.
            version: of the weights that must have sampled; None takes any.
            max_failures: how many samples may fail; the error is returned in their place. When one more has failed, the
                other requests are cancelled and count as failed, too. None: the first failure is raised.
            previous: results of an earlier call with the same arguments, of which only failures are requested again, of
                a conversation only the turn that failed.
            environment: as in `sample`.
            on_complete: likewise.

        Returns:
            `len(prompts) · group_size` samples, by prompt and then by member. One that the server aborted has the
            finish `abort` and may be short.

        Raises:
            UserError: a prompt the model cannot take, before anything is sent; or a sample failed.
        """
        requests = [
            SampleRequest(index, list(ids), sampling_seed(seed, first_prompt + index, member))
            for index, ids in enumerate(prompts)
            for member in range(group_size)
        ]
        lacking = [i for i in range(len(requests)) if not previous or not isinstance(previous[i], Sample)]
        partials = [getattr(previous[i], "partial", None) if previous else None for i in lacking]
        results = self.sample(
            [replace(requests[i], partial=partial) for i, partial in zip(lacking, partials, strict=True)],
            stop_token_ids, temperature, 0, version, max_failures, environment, on_complete,
        )  # fmt: skip
        for result in results:  # turns of an earlier call are of the same weights, too
            if version is not None and isinstance(result, Sample):
                _check_version(result, version)
        new = dict(zip(lacking, results, strict=True))
        return [new[i] if i in new else previous[i] for i in range(len(requests))]

    def sample(
        self,
        requests: Sequence[SampleRequest],
        stop_token_ids: Collection[int],
        temperature: float | None = None,
        budget: int = 0,
        version: str | None = None,
        max_failures: int | None = None,
        environment: TurnEnvironment | None = None,
        on_complete: OnComplete | None = None,
    ) -> list[Sample | UserError]:
        """Begin samples, or continue them. None waits for another.

        Args:
            requests: the samples to begin or to continue.
            stop_token_ids: as in `generate`.
            temperature: as in `generate`.
            budget: the most tokens to sample of each, in all its turns; 0: `rollout.max_new_tokens`, which bounds the
                response in any case.
            version: of the weights that must have sampled the new tokens; None takes any.
            max_failures: as in `generate`.
            environment: replies to turns, which an end token ends; None: a sample has one.
            on_complete: is awaited with each sample that is complete, while others are not, for what replaces it.

        Returns:
            The samples, each with its tokens so far. One that used up its budget is not `complete`. A failure may have
            some, too: it is a `SampleError`.

        Raises:
            UserError: as `generate`; or what the environment or `on_complete` raised.
        """
        max_new_tokens = self.rollout.max_new_tokens
        for request in requests:
            self._check_ids(request.prompt_ids, max_new_tokens, f"prompt {request.prompt_index}")

        def make_driver(request: SampleRequest) -> SampleDriver:
            def make_request(sample: Sample | None, ids: tuple[int, ...], limit: int) -> HttpRequest[Sample]:
                continued = replace(request, partial=sample)
                return self._sampling_request(continued, ids, stop_token_ids, temperature, limit, version)

            tokens = (max_new_tokens, budget or max_new_tokens, self.vocab_size, stop_token_ids)
            partial = request.partial and replace(request.partial, prompt_index=request.prompt_index)
            return SampleDriver(make_request, *tokens, environment, on_complete, partial)

        drivers = [make_driver(request) for request in requests]
        longest = max((len(r.prompt_ids) for r in requests), default=0) + max_new_tokens
        calls = [driver.run for driver in drivers]
        try:
            results = run_all(self.urls, "/generate", calls, self._limit_requests(longest), max_failures or 0)
        except FatalError as error:
            raise error.cause from None
        if max_failures is None:
            _require_all(results)
        return [
            SampleError(str(result), driver.sample) if isinstance(result, UserError) else result
            for result, driver in zip(results, drivers, strict=True)
        ]

    def score(self, token_lists: Sequence[list[int]]) -> list[np.ndarray]:
        """Compute log-probabilities of given tokens under the server, at temperature 1.

        Args:
            token_lists: each at least two token ids.

        Returns:
            For each list of T tokens `[T − 1]` float32: those of tokens 1…T−1 given the tokens before.

        Raises:
            UserError: as `generate`.
        """
        for index, ids in enumerate(token_lists):
            self._check_ids(ids, 0, f"sequence {index}")
        requests = [self._scoring_request(list(ids)) for ids in token_lists]
        limits = self._limit_requests(max(map(len, token_lists)))
        results = post_all(self.urls, "/generate", requests, limits)
        _require_all(results)
        return cast(list[np.ndarray], results)

    def _check_ids(self, ids: Sequence[int], new_tokens: int, where: str) -> None:
        """Refuse token ids that the model cannot take, with `new_tokens` more."""
        if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
            raise UserError(f"{where} is empty or has a token id outside [0, {self.vocab_size})")
        if len(ids) + new_tokens > self.max_length:
            raise UserError(
                f"{where} has {len(ids)} tokens, and with {new_tokens} new ones exceeds the {self.max_length} that "
                "the model and rollout.max_total_tokens allow: lower rollout.max_new_tokens"
            )

    def _sampling_request(
        self,
        request: SampleRequest,
        reply: tuple[int, ...],
        stop_token_ids: Collection[int],
        temperature: float | None,
        limit: int,
        version: str | None,
    ) -> HttpRequest[Sample]:
        """Make the HTTP request of a sample's next tokens, at most `limit`, after those of a reply to its last turn."""
        partial = request.partial
        ids = request.prompt_ids if partial is None else [*partial.tokens.tolist(), *reply]
        temperature = self.rollout.temperature if temperature is None else temperature
        # Without its flag for deterministic inference a server ignores the seed; with it, but without a seed, the
        # samples of a prompt would be the same.
        done, kept = len(ids) - len(request.prompt_ids), max_kept(self.rollout.top_k)
        params = make_rollout_params(self.rollout, temperature, limit, stop_token_ids, request.seed, done)
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
        body["return_routed_experts"] = True
        if kept:
            body["return_sampling_mask"] = True
        start = 0 if partial is None else len(partial.tokens) - 1  # rows that are here already are not sent again
        if start:
            body["routed_experts_start_len"] = start

        def parse(reply: Any) -> Sample:
            index, form = request.prompt_index, self.route_format
            sample = parse_sample(reply, index, ids, form, limit, stop_token_ids, start, self.rollout.stop, kept)
            largest = max(sample.tokens.max(), 0 if sample.kept_ids is None else sample.kept_ids.max(initial=0))
            if largest >= self.vocab_size:
                raise ValueError(f"token {largest} is outside the vocabulary of {self.vocab_size}")
            if self._ended_early(sample, params["min_new_tokens"], stop_token_ids):
                raise ValueError(f"token {len(sample.response)} ends the response, before rollout.min_new_tokens")
            if version is not None and (wrong := {span.version for span in sample.spans} - {version}):
                raise ValueError(f"sampled with weights {sorted(wrong)}, the trainer is at {version}")
            return sample if partial is None else partial.append(sample)

        return HttpRequest(self.first_server + request.prompt_index, body, parse)

    @staticmethod
    def _ended_early(sample: Sample, min_new_tokens: int, stop_token_ids: Collection[int]) -> bool:
        """Return whether an end token was sampled where it has no probability."""
        return 0 < len(sample.response) <= min_new_tokens and int(sample.tokens[-1]) in stop_token_ids

    def _scoring_request(self, ids: list[int]) -> HttpRequest[np.ndarray]:
        """Make the HTTP request of tokens' log-probabilities."""
        params = make_sampling_params(temperature=1.0, max_new_tokens=0)
        body = {"input_ids": ids, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        return HttpRequest(self.first_server, body, lambda reply: parse_logprobs(reply, ids, self.vocab_size))

    def _limit_requests(self, longest: int) -> RequestLimits:
        """Return the limits of requests that have at most so many tokens, those of their replies among them."""
        rollout = self.rollout
        reply_bytes = max_reply_bytes(longest, self.route_format, max_kept(rollout.top_k))
        setting = "rollout.request_timeout_s"
        return RequestLimits(rollout.concurrency, rollout.request_timeout_s, rollout.retries, setting, reply_bytes)


def _require_all(results: Sequence[object]) -> None:
    """Raise the first result that is a UserError."""
    for result in results:
        if isinstance(result, UserError):
            raise result


def _check_version(sample: Sample, version: str) -> None:
    """Raise a UserError unless one version of the weights sampled all of a sample."""
    if wrong := {span.version for span in sample.spans} - {version}:
        raise UserError(f"a sample has tokens of the weights {sorted(wrong)}, the trainer is at {version}")


def max_request_tokens(rollout: Rollout, max_length: int) -> int:
    """Compute the most tokens of a prompt and its response together that a server takes.

    Args:
        rollout: whose `max_total_tokens` bounds them, too.
        max_length: the model's longest sequence.
    """
    return min(max_length, rollout.max_total_tokens) - _RESERVED_TOKENS
