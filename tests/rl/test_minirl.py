"""MiniRL at its limits, and its ablations (arXiv 2512.01374, eq. 7). Its formula is in `test_objectives.py`."""

from dataclasses import replace

import numpy as np
import pytest
from policies import drawn, loss, one_token

from megatron_bai.config import Minirl


def gradient(ratio: float, advantage: float, settings: Minirl | None = None, weight: float = 1.0) -> float:
    """Of a one-token response with the given π_θ/π_old, A and π_θ/μ_old."""
    return float(loss(settings or Minirl(), one_token(ratio, advantage, weight))[1][0, 0])


def test_a_token_is_dropped_just_beyond_its_limit_and_only_on_the_side_its_advantage_names() -> None:
    assert gradient(1.27 - 1e-9, 1.0) == -1.0 and gradient(1.27 + 1e-9, 1.0) == 0.0
    assert gradient(0.8 + 1e-9, -1.0) == 1.0 and gradient(0.8 - 1e-9, -1.0) == 0.0
    assert gradient(0.01, 1.0) == -1.0 and gradient(100.0, -1.0) == 1.0
    assert gradient(100.0, 0.0) == 0.0


def test_a_token_at_its_limit_is_kept() -> None:
    at = Minirl(clip_low=0.0, clip_high=0.0)
    assert gradient(1.0, 1.0, at) == -1.0 and gradient(1.0, -1.0, at) == 1.0


def test_the_token_weight_is_truncated_at_its_maximum_and_not_below() -> None:
    assert gradient(1.0, 2.0, weight=4.99) == pytest.approx(-2 * 4.99, rel=1e-12)
    assert gradient(1.0, 2.0, weight=5.01) == -10.0
    assert gradient(1.0, -2.0, weight=1e6) == 10.0
    assert gradient(1.0, 2.0, weight=1e-6) == pytest.approx(-2e-6, rel=1e-9)
    assert gradient(1.0, 2.0, Minirl(is_max=float("inf")), weight=1e6) == pytest.approx(-2e6, rel=1e-9)


def test_without_clip_no_token_is_dropped_and_none_is_reported() -> None:
    assert gradient(100.0, 1.0, Minirl(clip=False)) == -1.0 and gradient(0.01, -1.0, Minirl(clip=False)) == 1.0
    assert "clip_fraction" not in loss(Minirl(clip=False), one_token(100.0, 1.0))[2]


def test_without_train_infer_is_the_weight_is_the_staleness_alone() -> None:
    for ratio in (0.9, 1.0, 1.2):
        assert gradient(ratio, 1.0, Minirl(train_infer_is=False), weight=3.0) == pytest.approx(-ratio)


def test_a_response_is_divided_by_its_length_only_where_asked() -> None:
    case = replace(drawn(2, 8, 0, 0.0), advantages=np.ones(2), mask=np.arange(8) < np.array([[8], [2]]))
    assert (loss(Minirl(), case)[1][case.mask] == -1 / 2).all()
    normed = loss(Minirl(length_norm=True), case)[1]
    assert normed[0] == pytest.approx(-1 / 16) and normed[1, :2] == pytest.approx(-1 / 4)


def test_the_share_of_dropped_tokens_is_reported() -> None:
    case = drawn(16, 9, 2, 0.4)
    ratio, a = np.exp(case.new - case.old), case.advantages[:, None]
    dropped = ((a > 0) & (ratio > 1.27)) | ((a < 0) & (ratio < 0.8))
    found = loss(Minirl(), case, micro=2)[2]
    assert found["clip_fraction"] == pytest.approx(dropped[case.mask].mean())
    positive, negative = ((dropped & side)[case.mask].mean() for side in (a > 0, a < 0))
    assert positive > 0 and found["clip_fraction_positive"] == pytest.approx(positive)
    assert negative > 0 and found["clip_fraction_negative"] == pytest.approx(negative)
    w = np.exp(case.new - case.infer)[case.mask]
    assert found["ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-9)
