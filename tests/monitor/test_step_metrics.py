"""The metrics of a step against closed forms and plain numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.monitor.metrics.discrepancy import add_discrepancy
from megatron_bai.monitor.metrics.response_metrics import add_response_metrics, compute_response_metrics
from megatron_bai.monitor.metrics.router_metrics import add_expert_load, add_route_mismatch, compute_load_metrics
from megatron_bai.monitor.stats import Stats
from megatron_bai.routing.replay.replay_pass import MicroRoutes


def discrepancy(train: np.ndarray, infer: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    stats = Stats()
    add_discrepancy(stats, "_x", *map(torch.from_numpy, (train, infer, mask)))
    return stats.values()


def test_both_estimates_are_the_kl_of_the_inference_from_the_training_policy() -> None:
    # Tokens in exactly the shares in which the inference engine samples them, so that the estimates have no variance.
    infer, train = np.array([0.5, 0.25, 0.125, 0.125]), np.array([0.1, 0.2, 0.3, 0.4])
    tokens = np.repeat(np.arange(4), [4, 2, 1, 1])[None]
    exact = float((infer * np.log(infer / train)).sum())
    found = discrepancy(np.log(train)[tokens], np.log(infer)[tokens], np.ones_like(tokens, dtype=bool))
    assert found["kl_k1_x"] == pytest.approx(exact, rel=1e-12) and found["kl_k3_x"] == pytest.approx(exact, rel=1e-12)
    # π/μ is 0.2, 0.8, 2.4 and 3.2 with weights 4, 2, 1, 1: 1.25 is the second's inverse, 5 the first's.
    assert (found["f_1.5_x"], found["f_2_x"], found["f_5_x"]) == (6 / 8, 6 / 8, 0)
    weights = np.repeat([0.2, 0.8, 2.4, 3.2], [4, 2, 1, 1])
    assert found["ess_discrepancy_x"] == pytest.approx(weights.sum() ** 2 / (8 * (weights**2).sum()), rel=1e-12)
    assert found["perplexity_ratio_x"] == found["perplexity_ratio_max_x"] == pytest.approx(np.exp(exact), rel=1e-12)


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 0.1, 3.0]))
def test_the_estimates_follow_their_formulas_and_leave_padding_out(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    infer = -random.exponential(2, (3, 7))
    train = infer + random.normal(0, spread, (3, 7))
    mask = random.random((3, 7)) < 0.7
    mask[0, 0] = True
    mask[2] = False  # an empty response
    r = np.exp(train - infer)[mask]
    found = discrepancy(np.where(mask, train, np.nan), infer, mask)
    assert found["kl_k1_x"] == pytest.approx(float(-np.log(r).mean()), rel=1e-9, abs=1e-12)
    assert found["kl_k3_x"] == pytest.approx(float((r - 1 - np.log(r)).mean()), rel=1e-9, abs=1e-12)
    assert found["kl_k3_x"] >= 0
    for name, threshold in (("f_1.5_x", 1.5), ("f_2_x", 2), ("f_5_x", 5)):
        assert found[name] == (np.maximum(r, 1 / r) > threshold).mean()
    assert found["ess_discrepancy_x"] == pytest.approx(r.sum() ** 2 / (r.size * (r**2).sum()), rel=1e-9)
    rows = [i for i in range(3) if mask[i].any()]
    perplexities = [np.exp(-train[i][mask[i]].mean()) / np.exp(-infer[i][mask[i]].mean()) for i in rows]
    assert found["perplexity_ratio_x"] == pytest.approx(np.mean(perplexities), rel=1e-9)
    assert found["perplexity_ratio_max_x"] == pytest.approx(max(perplexities), rel=1e-9)


@given(st.integers(0, 2**31), st.sampled_from([1, 7, 100]))
def test_responses_of_two_replicas_are_described_as_one_batch(seed: int, bucket: int) -> None:
    random = np.random.default_rng(seed)
    groups, size = 4, 3
    lengths, rewards = random.integers(0, 250, groups * size), random.integers(0, 2, groups * size).astype(float)
    rewards[:size] = 1.0  # a group without a gradient
    cut = random.random(groups * size) < 0.3
    stats = Stats()
    for part in (slice(0, size), slice(size, None)):
        own = Stats()
        length, was_cut, reward = map(torch.from_numpy, (lengths[part], cut[part], rewards[part]))
        add_response_metrics(own, length, was_cut, reward, size, bucket)
        stats.add(own)
    found = stats.values() | compute_response_metrics(stats, bucket)
    of_groups = rewards.reshape(groups, size)
    wanted = {
        "reward_mean": rewards.mean(), "reward_std": of_groups.std(1).mean(), "group_variance": of_groups.var(1).mean(),
        "uniform_groups": (of_groups.std(1) == 0).mean(), "response_length_mean": lengths.mean(),
        "response_length_max": lengths.max(), "truncated_fraction": cut.mean(), "response_tokens": lengths.sum(),
    }  # fmt: skip
    for q in (10, 50, 90):
        wanted[f"response_length_p{q}"] = np.quantile(lengths, q / 100, method="inverted_cdf")
    for low in np.unique(lengths // bucket * bucket):
        inside = (lengths >= low) & (lengths < low + bucket)
        wanted[f"reward_by_length/{low}"] = rewards[inside].mean()
        wanted[f"responses_by_length/{low}"] = inside.sum()
    assert found == pytest.approx(wanted, rel=1e-12)


def test_a_step_without_responses_has_no_quantiles() -> None:
    assert compute_response_metrics(Stats(), 100) == {}


EXPERTS, TOPK, LAYERS = 5, 2, [1, 4]


def routes(random: np.random.Generator, rows: int) -> np.ndarray:
    return np.stack([random.permutation(EXPERTS)[:TOPK] for _ in range(rows * len(LAYERS))]).reshape(rows, -1, TOPK)


@given(st.integers(0, 2**31))
def test_routes_that_differ_are_counted_by_layer_and_by_token(seed: int) -> None:
    random = np.random.default_rng(seed)
    theirs, ours, counted = routes(random, 12), routes(random, 12), random.random(12) < 0.7
    counted[0] = True
    ours[:4] = theirs[:4, :, ::-1]  # the same sets in another order
    theirs_, ours_, counted_ = map(torch.from_numpy, (theirs, ours, counted))
    stats, halves = Stats(), (slice(0, 5), slice(5, 12))
    given = [MicroRoutes(theirs_[part], counted_[part]) for part in halves]
    add_route_mismatch(stats, given, [MicroRoutes(ours_[part]) for part in halves], LAYERS)
    differ = np.array([[set(a) != set(b) for a, b in zip(*pair)] for pair in zip(theirs, ours)])[counted]
    assert stats.values() == pytest.approx(
        {
            "route_mismatch": differ.mean(),
            "route_mismatch/1": differ[:, 0].mean(),
            "route_mismatch/4": differ[:, 1].mean(),
            "tokens_route_mismatch": differ.any(1).mean(),
        }  # fmt: skip
    )
    load = Stats()
    add_expert_load(load, given, LAYERS)
    shares = [np.bincount(theirs[counted][:, i].ravel(), minlength=EXPERTS) / (counted.sum() * TOPK) for i in (0, 1)]
    nats = [-sum(p * np.log(p) for p in share if p) for share in shares]
    assert compute_load_metrics(load, EXPERTS) == pytest.approx(
        {
            "expert_entropy/1": nats[0],
            "expert_entropy/4": nats[1],
            "expert_entropy": np.mean(nats),
            "experts_effective": np.exp(nats).mean(),
            "expert_load_max": np.max(shares) * EXPERTS,
            "experts_unused": np.mean([share == 0 for share in shares]),
        }  # fmt: skip
    )


def test_even_and_one_sided_loads() -> None:
    even, one = torch.arange(4).reshape(2, 1, 2), torch.tensor([[[3, 3]]] * 4)
    found = {}
    for name, ids in (("even", even), ("one", one)):
        stats = Stats()
        add_expert_load(stats, [MicroRoutes(ids)], [0])
        found[name] = compute_load_metrics(stats, 4)
    assert found["even"] == {
        "expert_entropy/0": pytest.approx(np.log(4)), "expert_entropy": pytest.approx(np.log(4)),
        "experts_effective": pytest.approx(4), "expert_load_max": 1.0, "experts_unused": 0.0,
    }  # fmt: skip
    assert found["one"]["experts_effective"] == 1 and found["one"]["expert_load_max"] == 4
    assert found["one"]["experts_unused"] == 0.75


def test_an_expert_out_of_range_is_not_counted_silently() -> None:
    stats = Stats()
    add_expert_load(stats, [MicroRoutes(torch.tensor([[[0, 4]]]))], [0])
    with pytest.raises(AssertionError, match="out of range"):
        compute_load_metrics(stats, 4)
