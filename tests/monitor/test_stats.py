"""Means and maxima over parts are those of the whole; the KL estimates are the KL."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.monitor.discrepancy import add_kl
from megatron_bai.monitor.stats import Stats

parts = st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), min_size=1, max_size=5)


@given(parts)
def test_parts_of_any_size_merge_to_the_mean_and_maximum_of_all(values: list[list[float]]) -> None:
    total = Stats()
    for part in values:
        one = Stats()
        one.mean("mean", torch.tensor(part, dtype=torch.float64))
        one.max("top", torch.tensor(part, dtype=torch.float64))
        total.add(one)
    everything = [value for part in values for value in part]
    if not everything:
        assert total.values() == {}  # nothing, not nan
        return
    assert total.values()["mean"] == pytest.approx(np.mean(everything), abs=1e-6)
    assert total.values()["top"] == max(everything)


def test_adding_leaves_the_added_as_it_was() -> None:
    one, other = Stats(), Stats()
    one.ratio("x", 1.0, 2.0)
    other.ratio("x", 3.0, 2.0)
    other.max("y", torch.tensor([-4.0]))
    one.add(other)
    one.ratio("x", 5.0, 0.0)
    assert one.values() == {"x": 9 / 4, "y": -4.0} and other.values() == {"x": 1.5, "y": -4.0}


def test_a_mean_over_booleans_is_their_share() -> None:
    stats = Stats()
    stats.mean("share", torch.tensor([[True, False], [False, False]]))
    assert stats.values() == {"share": 0.25}


def kl(train: np.ndarray, infer: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    stats = Stats()
    add_kl(stats, "_x", *map(torch.from_numpy, (train, infer, mask)))
    return stats.values()


def test_both_estimates_are_the_kl_of_the_inference_from_the_training_policy() -> None:
    # Tokens in exactly the shares in which the inference engine samples them, so that the estimates have no variance.
    infer, train = np.array([0.5, 0.25, 0.125, 0.125]), np.array([0.1, 0.2, 0.3, 0.4])
    tokens = np.repeat(np.arange(4), [4, 2, 1, 1])[None]
    exact = float((infer * np.log(infer / train)).sum())
    found = kl(np.log(train)[tokens], np.log(infer)[tokens], np.ones_like(tokens, dtype=bool))
    assert found == {"kl_k1_x": pytest.approx(exact, rel=1e-12), "kl_k3_x": pytest.approx(exact, rel=1e-12)}


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 0.1, 3.0]))
def test_the_estimates_follow_their_formulas_and_leave_padding_out(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    infer = -random.exponential(2, (3, 7))
    train = infer + random.normal(0, spread, (3, 7))
    mask = random.random((3, 7)) < 0.7
    mask[0, 0] = True
    r = np.exp(train - infer)[mask]
    found = kl(np.where(mask, train, np.nan), infer, mask)
    assert found["kl_k1_x"] == pytest.approx(float(-np.log(r).mean()), rel=1e-9, abs=1e-12)
    assert found["kl_k3_x"] == pytest.approx(float((r - 1 - np.log(r)).mean()), rel=1e-9, abs=1e-12)
    assert found["kl_k3_x"] >= 0
