"""PPO's losses of actor and critic against their formulas, in float64, without autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import drawn, loss

from megatron_bai import config
from megatron_bai.rl.objectives.ppo import critic_loss


def arrays(seed: int, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(3, 7)) for _ in range(count)], random.random((3, 7)) < 0.6


@given(st.integers(0, 2**31))
def test_the_actor_has_an_advantage_for_each_token(seed: int) -> None:
    """−min(r·A_t, clip(r)·A_t), its mean over all tokens, and its slope −r·A_t where the limit does not hold."""
    case, settings = drawn(5, 7, seed, 0.3), config.Ppo(clip_low=0.2, clip_high=0.3)
    advantages = np.random.default_rng(seed).normal(size=case.mask.shape)
    dirty = replace(case, advantages=np.where(case.mask, advantages, np.nan))
    value, gradient, metrics = loss(settings, dirty)
    tokens = max(case.mask.sum(), 1)
    wanted, slopes, clipped = 0.0, np.zeros_like(advantages), 0
    for i, t in zip(*np.nonzero(case.mask)):
        r, a = np.exp(case.new[i, t] - case.old[i, t]), advantages[i, t]
        limited = min(max(r, 0.8), 1.3) * a
        wanted -= min(r * a, limited) / tokens
        slopes[i, t] = -r * a / tokens if r * a <= limited else 0.0
        clipped += r * a > limited
    assert value == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-12)
    if case.mask.any():
        assert metrics["clip_fraction"] == pytest.approx(clipped / tokens)


@given(st.integers(0, 2**31), st.sampled_from([0.2, 1.0, float("inf")]))
def test_the_critic_gains_nothing_beyond_its_limit(seed: int, clip: float) -> None:
    (new, old, returns), mask = arrays(seed, 3)
    values = torch.from_numpy(new.copy()).requires_grad_()
    given_ = [torch.from_numpy(np.where(mask, each, np.nan)) for each in (old, returns)]
    losses, stats = critic_loss(values, given_[0], given_[1], torch.from_numpy(mask), clip)
    losses.sum().backward()
    bounded = 0
    for i, t in np.ndindex(mask.shape):
        v, v_old, r = new[i, t], old[i, t], returns[i, t]
        limited = min(max(v, v_old - clip), v_old + clip)
        plain, held = (v - r) ** 2, (limited - r) ** 2
        wanted, slope = (held / 2, 0.0) if held > plain else (plain / 2, v - r)
        bounded += held > plain and mask[i, t]
        assert float(losses[i, t]) == pytest.approx(wanted if mask[i, t] else 0, rel=1e-12)
        assert float(values.grad[i, t]) == pytest.approx(slope if mask[i, t] else 0, rel=1e-12)
    if mask.any():
        assert stats.values()["value_clip_fraction"] == pytest.approx(bounded / mask.sum())
        assert stats.values()["value_error"] == pytest.approx(((new - returns)[mask] ** 2).mean())
