"""Statistics of parts, added up, are those of the whole."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.monitor.stats import Stats, entropy, quantile

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


integers = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4)


@given(integers, st.floats(0, 1))
def test_quantiles_and_entropy_of_tallied_parts_are_those_of_all_values(values: list[list[int]], share: float) -> None:
    total = Stats()
    for part in values:
        one = Stats()
        one.tally("n", torch.tensor(part, dtype=torch.int64))
        total.add(one)
    everything, counts = [value for part in values for value in part], total.tallies["n"]
    assert counts == Counter(everything)
    if not everything:
        with pytest.raises(ValueError, match="nothing"):
            quantile(counts, share)
        return
    assert quantile(counts, share) == np.quantile(everything, share, method="inverted_cdf")
    p = np.unique(everything, return_counts=True)[1] / len(everything)
    assert entropy(counts) == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


@given(parts)
def test_the_effective_sample_size_of_parts_is_that_of_all_weights(values: list[list[float]]) -> None:
    total = Stats()
    for part in values:
        one = Stats()
        one.sample_size("ess", torch.tensor(part, dtype=torch.float64).abs())
        total.add(one)
    w = np.abs([value for part in values for value in part])
    if not (w**2).sum():
        assert total.values() == {}
        return
    assert total.values()["ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-9)


def test_the_effective_sample_size_is_one_for_equal_weights_and_a_share_for_a_single_one() -> None:
    stats = Stats()
    stats.sample_size("even", torch.full((2, 3), 0.7))
    stats.sample_size("single", torch.tensor([0.0, 0.0, 5.0, 0.0]))
    assert stats.values() == {"even": pytest.approx(1.0), "single": pytest.approx(0.25)}
