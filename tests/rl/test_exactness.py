"""Where `rollout.exact` is refused, and what is said when its promise is broken."""

from typing import Any

import pytest
import torch
from moe import SIGNATURE, samples
from numpy import ones
from numpy.random import default_rng
from test_settings import MODEL, changed

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import architecture_of
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import ScoredBatch, make_scored_batch
from megatron_bai.rl.policy.exactness import require_exact, validate_exact
from megatron_bai.rl.validate_settings import validate_settings

URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"backend": config.Backend(dtype="bfloat16")},
            "rollout.exact needs backend.dtype=float32, and it is bfloat16",
        ),
        ({"rollout__dtype": "bfloat16"}, "rollout.exact needs rollout.dtype=float32, and it is bfloat16"),
        ({"rollout__quantize": "fp8"}, "rollout.exact needs rollout.quantize=empty, and it is fp8"),
        ({"rollout__tensor": 2}, "rollout.exact needs rollout.tensor=1, and it is 2"),
        ({"parallel__tensor": 2}, "rollout.exact needs parallel.tensor=1, and it is 2"),
        ({"parallel__pipeline": 2}, "rollout.exact needs parallel.pipeline=1, and it is 2"),
        ({"parallel__expert": 2}, "rollout.exact needs parallel.expert=1, and it is 2"),
        ({"rollout__urls": [URL]}, "rollout.exact is for servers that the run starts: leave out rollout.urls"),
    ],
)
def test_a_run_whose_engines_round_differently_is_refused(values: dict[str, Any], named: str) -> None:
    validate_settings(changed(rollout__exact=True))
    validate_settings(changed(**values))
    with pytest.raises(UserError, match=named):
        validate_settings(changed(rollout__exact=True, **values))


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"rollout\.exact needs backend\.kind=cpu, and it is cuda"):
        validate_settings(changed(rollout__exact=True))


def test_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_bai.rl.policy.exactness.is_multi_host", lambda: True)
    settings = changed(rollout__exact=True)
    with pytest.raises(UserError, match="rollout.exact needs one machine"):
        validate_exact(settings, architecture_of(settings.model))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"family": "mixtral"}, "a model of the family mixtral: of qwen3_moe alone both"),
        ({"norm_topk_prob": False}, "norm_topk_prob=false"),
        ({"decoder_sparse_step": 2}, "layers without experts"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn"),
    ],
)
def test_a_model_without_exact_functions_is_refused(values: dict[str, Any], named: str) -> None:
    settings = changed(rollout__exact=True)
    model = architecture_of(config.Model(**MODEL))
    validate_exact(settings, model)
    if family := values.get("family"):
        model.family = type(family, (), {"name": family})()
    elif "decoder_sparse_step" in values:
        model.moe_layers = model.moe_layers[1::2]
    model.tied = values.get("tie_word_embeddings", False)
    model.values = {**model.values, **values}
    with pytest.raises(UserError, match=named):
        validate_exact(settings, model)


@pytest.fixture
def batch() -> ScoredBatch:
    """Scored as it was sampled."""
    rollouts = from_samples(samples(4, default_rng(0)), ones(4), 24, 0, SIGNATURE)
    made = make_scored_batch(rollouts, rollouts.infer_logprobs.clone())
    require_exact(made, made.infer_logprobs.clone())
    require_exact(made, None)
    return made


def test_one_bit_in_one_token_ends_the_run(batch: ScoredBatch) -> None:
    row, column = batch.usable_mask.nonzero()[5].tolist()
    value = batch.infer_logprobs[row, column]
    batch.sampled_logprobs[row, column] = torch.nextafter(value, torch.tensor(0.0))
    tokens = int(batch.usable_mask.sum())
    named = rf"token {column + 1} of sample {row} has -\d.* in the server, \S+ apart \(of 1 of {tokens} "
    with pytest.raises(UserError, match=named):
        require_exact(batch, None)


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_scores_without_replay_are_compared_too(batch: ScoredBatch, value: float) -> None:
    live = batch.infer_logprobs.clone()
    live[tuple(batch.usable_mask.nonzero()[3].tolist())] = value
    with pytest.raises(UserError, match="log-probabilities without replay are not the same"):
        require_exact(batch, live)


def test_tokens_of_weights_that_are_gone_are_not_compared(batch: ScoredBatch) -> None:
    row, column = batch.usable_mask.nonzero()[5].tolist()
    batch.sampled_logprobs[row, column], batch.version_age[row, column] = float("nan"), 2
    live = batch.infer_logprobs.clone()
    live[row, column] = -1
    live[~batch.usable_mask] = 7
    require_exact(batch, live)
