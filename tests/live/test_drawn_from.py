"""A real server's truncated draws keep what transformers' warpers keep, and their log-probabilities are over that."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    Qwen3MoeForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_bai import config
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient, SampleRequest
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.servers import fleet
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = pytest.mark.live
MakeClient = Callable[..., RolloutClient]
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18]]
TOLERANCE = 1e-5  # nats
EDGE = 1e-4  # nats or probability from a limit, within which rounding decides what is kept


class Processed:
    """transformers' float32 forward of one checkpoint, and its processors in the order in which a server has them."""

    def __init__(self, path: Path):
        self.model = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, sample: Sample, settings: dict[str, Any], ends: list[int]) -> torch.Tensor:
        """Log-probabilities `[response, V]`, −∞ of tokens that are not kept.

        SGLang compares all probabilities with `top_p`, not those of the kept: top-k comes after.
        """
        ids = torch.from_numpy(sample.tokens)
        first, end = sample.prompt_length - 1, len(ids) - 1
        least, temperature = settings.get("min_new_tokens", 0), settings.get("temperature", 1.0)
        processors = LogitsProcessorList(
            [
                MinNewTokensLengthLogitsProcessor(sample.prompt_length, least, ends, device="cpu"),
                TemperatureLogitsWarper(float(temperature)),
                TopPLogitsWarper(settings.get("top_p", 1.0)),
                TopKLogitsWarper(settings.get("top_k") or VOCAB),
                MinPLogitsWarper(settings.get("min_p", 0.0)),
            ]
        )
        logits = self.model(ids[None]).logits[0]
        return torch.cat(
            [processors(ids[None, : t + 1], logits[t : t + 1].clone()) for t in range(first, end)]
        ).log_softmax(-1)

    def agrees(self, sample: Sample, settings: dict[str, Any], ends: list[int]) -> int:
        """Assert that a sample has these log-probabilities, of these tokens; return how many tokens were compared."""
        scores = self(sample, settings, ends)
        wider, narrower = (
            self(
                sample,
                settings | {name: settings[name] + sign * EDGE for name in ("top_p", "min_p") if name in settings},
                ends,
            )
            for sign in (1, -1)
        )
        sure = (wider.isfinite() == narrower.isfinite()).all(-1)
        if top_k := settings.get("top_k"):
            full = self(sample, settings | {"top_k": 0}, ends).sort(-1, descending=True).values
            edge = full[:, top_k - 1] - full[:, top_k]
            sure &= ~(edge < EDGE)
            assert sample.kept_ids is not None
            for row, (kept, wanted) in enumerate(zip(sample.kept_ids, scores.isfinite(), strict=True)):
                if sure[row]:
                    assert sorted(kept[kept >= 0].tolist()) == wanted.nonzero()[:, 0].tolist(), row
        wanted = scores.gather(-1, torch.from_numpy(sample.response)[:, None])[:, 0]
        np.testing.assert_allclose(sample.logprobs[sure], wanted[sure], atol=TOLERANCE, rtol=0)
        return int(sure.sum())


@pytest.fixture(scope="module")
def processed(checkpoints: dict[str, Path]) -> Processed:
    return Processed(checkpoints["v0"])


TRUNCATIONS: list[dict[str, Any]] = [{"top_k": 8}, {"top_k": 12, "top_p": 0.6, "temperature": 0.7}]


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_a_truncated_draw_is_from_the_ids_of_transformers(
    client: MakeClient, serving: Callable[[str], None], processed: Processed, settings: dict[str, Any]
) -> None:
    serving("v0")
    samples = client(**settings).generate(PROMPTS, 4, seed=0, stop_token_ids=[STOP])
    whole = client(temperature=settings.get("temperature", 1.0)).generate(PROMPTS, 4, seed=0, stop_token_ids=[STOP])
    assert all(sample.kept_ids is None for sample in whole)
    compared = sum(processed.agrees(sample, settings, [STOP]) for sample in samples)
    assert compared > 0.9 * sum(len(sample.response) for sample in samples)
    counts = {int((row >= 0).sum()) for sample in samples for row in sample.kept_ids}
    assert max(counts) <= settings["top_k"] and (len(counts) > 3) == ("top_p" in settings)


@pytest.mark.long
def test_truncated_tokens_are_drawn_with_their_probabilities(
    client: MakeClient, serving: Callable[[str], None]
) -> None:
    """χ² of 2048 first tokens against the probabilities that came with them."""
    serving("v0")
    truncated = client(max_new_tokens=1, top_k=12, top_p=0.9)
    samples = truncated.generate([PROMPTS[0]], 2048, seed=0, stop_token_ids=[STOP])
    of_token = {int(sample.response[0]): float(np.exp(sample.logprobs[0])) for sample in samples}
    assert set(of_token) == set(samples[0].kept_ids[0].tolist()) and sum(of_token.values()) == pytest.approx(
        1, abs=1e-5
    )
    seen = np.bincount([int(sample.response[0]) for sample in samples], minlength=VOCAB)
    expected = 2048 * np.array([of_token[token] for token in of_token])
    chi2 = ((seen[list(of_token)] - expected) ** 2 / expected).sum()
    assert expected.min() >= 5 and chi2 < len(expected) + 5 * np.sqrt(2 * len(expected))


@pytest.mark.long
def test_a_sample_in_several_rounds_is_the_sample_in_one(client: MakeClient, serving: Callable[[str], None]) -> None:
    """Seeds draw by a token's position, of truncated draws too; the ids of all rounds are in one sample."""
    serving("v0")
    one = client(top_k=6)
    (whole,) = one.sample([SampleRequest(0, PROMPTS[0], 7)], [STOP])
    sample: Any = None
    while sample is None or not sample.complete:
        (sample,) = one.sample([SampleRequest(0, PROMPTS[0], 7, partial=sample)], [STOP], budget=5)
    assert isinstance(whole, Sample) and sample.tokens.tolist() == whole.tokens.tolist()
    np.testing.assert_array_equal(np.sort(sample.kept_ids), np.sort(whole.kept_ids))
    np.testing.assert_allclose(sample.logprobs, whole.logprobs, atol=TOLERANCE)


@pytest.fixture(scope="module")
def with_text(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """The URL of a server that decodes what it samples, and draws without seeds; and its tokenizer."""
    directory = tmp_path_factory.mktemp("text")
    model = Path(shutil.copytree(checkpoints["v0"], directory / "model"))
    tokenizer = build_tokenizer(config.Arithmetic(), VOCAB)
    tokenizer.save_pretrained(model)
    settings = replace(ROLLOUT, stop=["x"], deterministic=False)
    with SGLangServer(model, settings, directory / "sglang.log") as server:
        yield server.url, tokenizer


def text_client(url: str, **changes: Any) -> RolloutClient:
    return RolloutClient([url], replace(ROLLOUT, deterministic=False, **changes), RouteFormat(SIGNATURE), VOCAB, LENGTH)


@pytest.mark.long
def test_a_text_ends_a_response_with_the_token_that_completes_it(with_text: tuple[str, Any]) -> None:
    url, tokenizer = with_text
    stops = ["1", "a", "mo"]
    samples = text_client(url, stop=stops).generate(PROMPTS, 8, seed=0, stop_token_ids=[STOP])
    texts = [tokenizer.decode(sample.response) for sample in samples]
    ended = [sample.finish == "stop" and sample.tokens[-1] != STOP for sample in samples]
    assert sum(ended) > len(samples) // 2
    for sample, text, by_text in zip(samples, texts, ended, strict=True):
        before = tokenizer.decode(sample.response[:-1])
        assert not any(stop in before for stop in stops)
        assert any(stop in text for stop in stops) == by_text


@pytest.mark.long
def test_further_tokens_end_a_response(with_text: tuple[str, Any]) -> None:
    samples = text_client(with_text[0]).generate(PROMPTS, 8, seed=0, stop_token_ids=[STOP, 20, 33])
    assert {int(sample.tokens[-1]) for sample in samples if sample.finish == "stop"} > {20}
    assert not any(np.isin(sample.response[:-1], [STOP, 20, 33]).any() for sample in samples)


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"top_k": 12, "min_p": 0.1, "temperature": 1.3}], ids=str)
def test_end_tokens_have_no_probability_before_the_minimum(
    with_text: tuple[str, Any], processed: Processed, settings: dict[str, Any]
) -> None:
    """Over the whole vocabulary and over kept ids; one round ends before the minimum."""
    ends = [STOP, 20, 33]
    settings = settings | {"min_new_tokens": 9}
    minimum = text_client(with_text[0], **settings)
    begun = [SampleRequest(i % 3, PROMPTS[i % 3], i) for i in range(24)]
    rounds = minimum.sample(begun, ends, budget=4)
    assert all(isinstance(each, Sample) and len(each.response) == 4 for each in rounds)
    samples = minimum.sample([replace(r, partial=each) for r, each in zip(begun, rounds, strict=True)], ends)
    assert 10 <= min(len(sample.response) for sample in samples) < ROLLOUT.max_new_tokens  # the tenth may be an end
    compared = sum(processed.agrees(sample, settings, ends) for sample in samples)
    assert compared > 0.9 * sum(len(sample.response) for sample in samples)


@pytest.mark.long
def test_a_server_without_a_tokenizer_or_seeds_is_refused(server: SGLangServer) -> None:
    with pytest.raises(UserError, match="rollout.stop and rollout.min_new_tokens need a server with the model's"):
        fleet.connect_servers(replace(ROLLOUT, urls=[server.url], min_new_tokens=3))
    fleet.connect_servers(replace(ROLLOUT, urls=[server.url], top_k=20))
    with pytest.raises(UserError, match="--sampling-mask-max-tokens 4096, and ties may keep 5000"):
        fleet.connect_servers(replace(ROLLOUT, urls=[server.url], top_k=2500))
