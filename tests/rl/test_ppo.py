"""PPO's losses of actor and critic against their formulas, in float64, without autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.rl.objectives.ppo import actor_loss, critic_loss


def arrays(seed: int, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(3, 7)) for _ in range(count)], random.random((3, 7)) < 0.6


@given(st.integers(0, 2**31))
def test_the_actor_has_an_advantage_for_each_token(seed: int) -> None:
    (new, noise, advantages), mask = arrays(seed, 3)
    old = new + noise
    logprobs = torch.from_numpy(new.copy()).requires_grad_()
    given_ = [torch.from_numpy(np.where(mask, each, np.nan)) for each in (old, advantages)]
    losses, stats = actor_loss(logprobs, *given_, torch.from_numpy(mask), low=0.2, high=0.3)
    losses.sum().backward()
    clipped = 0
    for i, t in np.ndindex(mask.shape):
        r, a = np.exp(new[i, t] - old[i, t]), advantages[i, t]
        limited = min(max(r, 0.8), 1.3) * a
        wanted, slope = (-r * a, -r * a) if r * a <= limited else (-limited, 0.0)
        clipped += slope == 0 and mask[i, t]
        assert float(losses[i, t]) == pytest.approx(wanted if mask[i, t] else 0, rel=1e-12)
        assert float(logprobs.grad[i, t]) == pytest.approx(slope if mask[i, t] else 0, rel=1e-12)
    if mask.any():
        assert stats.values()["clip_fraction"] == pytest.approx(clipped / mask.sum())


@given(st.integers(0, 2**31), st.sampled_from([0.2, 1.0, float("inf")]))
def test_the_critic_gains_nothing_beyond_its_limit(seed: int, clip: float) -> None:
    (new, old, returns), mask = arrays(seed, 3)
    values = torch.from_numpy(new.copy()).requires_grad_()
    given_ = [torch.from_numpy(np.where(mask, each, np.nan)) for each in (old, returns)]
    losses, stats = critic_loss(values, *given_, torch.from_numpy(mask), clip)
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
