"""Ages of tokens, what is known of the weights that sampled them, and settings that contradict each other."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from moe import SIGNATURE, random_routes

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import RolloutBatch, make_scored_batch, make_training_batch
from megatron_bai.rl.experience import staleness
from megatron_bai.rl.objectives.terms import ratio_metrics
from megatron_bai.rl.validate_settings import validate_stale_rollouts
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.routes import VersionSpan

VERSION = 7
SPANS = [[("7", 4)], [("5", 2), ("7", 3)], [("6", 1), ("7", 2)], [("6", 5)]]  # version and number of tokens


def batch_of(limit: int | None = None) -> tuple[RolloutBatch, Stats, list[list[int]]]:
    random, samples, ages = np.random.default_rng(0), [], []
    for prompt, parts in enumerate(SPANS):
        ends = np.cumsum([0, *(count for _, count in parts)])
        spans = tuple(VersionSpan(version, int(a), int(b)) for (version, _), a, b in zip(parts, ends, ends[1:]))
        tokens = random.integers(0, 50, prompt + 2 + ends[-1])
        logprobs = random.normal(-2, 1, ends[-1]).astype(np.float32)
        routes = random_routes(len(tokens) - 1, random)
        samples.append(Sample(prompt, tokens, prompt + 2, logprobs, routes, spans, "stop"))
        ages.append([VERSION - int(version) for version, count in parts for _ in range(count)])
    batch, stats = from_samples(samples, np.ones(len(samples)), 12, 0, SIGNATURE, version=VERSION), Stats()
    fresh = staleness.find_fresh_tokens(batch, limit, stats)
    return replace(batch, usable_mask=batch.response_mask & fresh), stats, ages


def old_logprobs() -> torch.Tensor:
    return torch.randn(len(SPANS), 12, generator=torch.Generator().manual_seed(0)) - 2


def test_ages_lie_where_tokens_are_predicted() -> None:
    batch, stats, ages = batch_of()
    for row, own in enumerate(ages):
        assert batch.version_age[row, batch.response_mask[row]].tolist() == own
    assert not batch.version_age[~batch.response_mask].any()
    every = sum(ages, [])
    assert stats.values() == pytest.approx(
        {"stale_fraction": np.mean(np.array(every) > 0), "version_age_mean": np.mean(every), "version_age_max": 2}
    )


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_tokens_that_are_too_old_are_responses_but_not_usable(limit: int) -> None:
    batch, stats, ages = batch_of(limit)
    assert batch.response_mask.sum(1).tolist() == [len(own) for own in ages]
    assert batch.usable_mask.sum(1).tolist() == [sum(age <= limit for age in own) for own in ages]
    assert stats.values()["stale_masked"] == pytest.approx(np.mean(np.array(sum(ages, [])) > limit))
    training = make_training_batch(make_scored_batch(batch))
    assert training.prompt_tokens.tolist() == batch.usable_mask.sum(1).tolist()


def test_a_token_from_the_future_is_a_bug() -> None:
    sample = Sample(0, np.arange(4), 2, np.zeros(2, np.float32), random_routes(3, np.random.default_rng(0)),
                    (VersionSpan("8", 0, 2),), "stop")  # fmt: skip
    with pytest.raises(AssertionError, match="of version 8 in the step of version 7"):
        from_samples([sample], np.ones(1), 4, 0, SIGNATURE, version=VERSION)


@pytest.mark.parametrize("kept", [False, True])
def test_the_two_factors_are_of_the_weights_that_sampled(kept: bool) -> None:
    """Against sums over tokens one by one."""
    rollouts, _, ages = batch_of()
    former = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(1)) - 2
    batch = make_training_batch(make_scored_batch(rollouts, old_logprobs(), former if kept else None))
    new = batch.old_logprobs + 0.1
    stats = Stats()
    staleness.add_discrepancies(stats, batch, None)
    found = stats.values() | ratio_metrics(new, batch).values()
    infer, old = batch.infer_logprobs.double().numpy(), batch.old_logprobs.double().numpy()
    between = {0: old, 1: former.double().numpy()} if kept else {0: old}
    logs, moved, weights, stale = [], [], [], []
    for row, own in enumerate(ages):
        for age, place in zip(own, np.flatnonzero(batch.usable_mask[row].numpy())):
            at = row, place
            weights.append(np.exp(old[at] + 0.1 - infer[at]))
            if age in between:
                logs.append(between[age][at] - infer[at])
                moved.append(old[at] + 0.1 - between[age][at])
            if age:
                stale.append(old[at] - infer[at])
    assert len(logs) < len(weights)
    expected = {
        "discrepancy": np.mean(logs), "kl_k1": -np.mean(logs), "kl_k3": np.mean(np.exp(logs) - 1 - logs),
        "staleness": np.mean(moved), "staleness_ratio_mean": np.mean(np.exp(moved)), "is_weight_mean": np.mean(weights),
        "kl_k1_stale": -np.mean(stale), "f_2_stale": np.mean(np.abs(stale) > np.log(2)),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_fresh_rollouts_have_the_metrics_they_always_had() -> None:
    rollouts, stats = replace(batch_of()[0], version_age=torch.zeros(len(SPANS), 12, dtype=torch.int64)), Stats()
    scored = make_scored_batch(rollouts, old_logprobs())
    assert torch.equal(scored.sampled_logprobs, old_logprobs())
    staleness.add_discrepancies(stats, scored, old_logprobs())
    names = set(stats.values())
    assert {"kl_k3", "kl_k3_live"} <= names and not [name for name in names if name.endswith("_stale")]


def settings(objective: config.Policy | None = None, **rollout: Any) -> config.Config:
    rollout = config.Rollout(**{"max_new_tokens": 64} | rollout)
    model = config.Model(*[1] * 10)
    return config.Config(model=model, rollout=rollout, objective=objective or config.Minirl())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (settings(partial_tokens=64), "rollout.partial_tokens is 64: it must be less than rollout.max_new_tokens"),
        (settings(partial_tokens=-1), "rollout.partial_tokens is -1"),
        (settings(prompts_in_progress=32), "rollout.prompts_in_progress is for partial rollouts"),
        (settings(partial_tokens=8, prompts_in_progress=16), "not more than trainer.prompts_per_step"),
        (settings(max_staleness=1), "rollout.max_staleness is for partial or overlapping rollouts"),
        (settings(partial_tokens=8, max_staleness=-1), "rollout.max_staleness is -1: it must be at least 0"),
        (settings(overlap=True, max_staleness=0), "at least 1 with rollout.overlap"),
        (
            settings(config.Dapo(drop_uniform_groups=True, refill_rounds=2, correction="token_mask"), overlap=True),
            "objective.refill_rounds asks for groups within a step",
        ),
        (settings(config.Minirl(train_infer_is=False), overlap=True), "set objective.train_infer_is=true$"),
        (
            settings(config.Grpo(), partial_tokens=8),
            "set objective.correction, or rollout.max_staleness=0 to leave stale tokens out",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changed: config.Config, says: str) -> None:
    objectives.check(changed.objective)
    with pytest.raises(UserError, match=says):
        validate_stale_rollouts(changed)


@pytest.mark.parametrize(
    "good",
    [
        settings(),
        settings(partial_tokens=8),
        settings(partial_tokens=8, prompts_in_progress=17, overlap=True, max_staleness=1),
        settings(config.Grpo(), partial_tokens=8, max_staleness=0),
        settings(config.Grpo(correction="token_truncate"), overlap=True),
        settings(config.Sequence(), overlap=True),
    ],
)
def test_settings_that_go_together_are_taken(good: config.Config) -> None:
    validate_stale_rollouts(good)
