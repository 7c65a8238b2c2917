"""PPO's critic and the actor it advises: the same in every parallel layout, and in plain torch without Megatron-Core.

Tolerances as in `test_layouts.py`, with the largest difference seen between the layouts on the CPU in brackets: values,
returns and advantages 1e-5 absolute [1.1e-6]; gradients 2e-5 of a tensor's largest element [3.5e-6].
"""

import numpy as np
import pytest
import reference
import torch
from distributed.test_layouts import each_other, relative
from distributed.worker import CASES, LEFT_OUT, LENGTH, PPO, QUICK, REWARDS, SAMPLES, problem
from moe import MODEL, SIGNATURE
from processes import Layouts
from tiers import tiered

from megatron_bai.rl import objectives
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import RolloutBatch, make_scored_batch, make_training_batch
from megatron_bai.rl.objectives.ppo import critic_loss

pytestmark = pytest.mark.distributed
NAMES = ("values", "returns", "advantages")


@pytest.mark.long
def test_a_critic_starts_with_the_actors_weights_and_values_of_0(layouts: Layouts) -> None:
    """Of the layouts that are given no checkpoint."""
    actor = {name: tensor.float() for name, tensor in reference.load(layouts.directory / "one" / "hf").items()}
    for case in (case for case in CASES if not CASES[case].loads):
        start = dict(layouts[case]["ppo"]["start"])
        assert not start.pop("score.weight").any()
        assert start.keys() == actor.keys() - {"lm_head.weight"}
        assert all(torch.equal(start[name], actor[name]) for name in start)


@pytest.mark.parametrize("case", tiered([case for case in CASES if CASES[case].loads], QUICK))
def test_a_critics_checkpoint_loads_in_another_layout(case: str, layouts: Layouts) -> None:
    start, saved = layouts[case]["ppo"]["start"], layouts[CASES[case].loads]["ppo"]["weights"]
    assert start.keys() == saved.keys() and start["score.weight"].any()
    assert all(torch.equal(start[name], saved[name]) for name in start)


@each_other
def test_values_and_advantages_are_the_same(case: str, layouts: Layouts) -> None:
    one, other = layouts["one"]["ppo"], layouts[case]["ppo"]
    for name in NAMES:
        assert other[name].shape == one[name].shape == (SAMPLES, LENGTH)
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)
    assert other["statistics"] == pytest.approx(one["statistics"], rel=1e-5, abs=1e-6)


@each_other
def test_the_gradients_of_critic_and_actor_are_the_same(case: str, layouts: Layouts) -> None:
    one, other = layouts["one"]["ppo"], layouts[case]["ppo"]
    assert other["update"] == pytest.approx(one["update"], rel=3e-6, abs=1e-6)
    assert other["actor"][0] == pytest.approx(one["actor"][0], rel=3e-6, abs=1e-6)
    for ours, theirs in ((other["gradient"], one["gradient"]), (other["actor"][1], one["actor"][1])):
        gap, name = relative(ours, theirs)
        assert gap <= 2e-5, name


@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_the_norm_reported_is_that_of_the_critics_whole_gradient(case: str, layouts: Layouts) -> None:
    found = layouts[case]["ppo"]
    whole = torch.cat([gradient.flatten() for gradient in found["gradient"].values()])
    assert found["update"]["grad_norm"] == pytest.approx(float(whole.norm()), rel=3e-6)
    assert found["diverged"] == []


def batch() -> tuple[RolloutBatch, torch.Tensor]:
    rollouts, _, noise = problem()
    counted = np.array([sample not in LEFT_OUT for sample in range(SAMPLES)])
    made = from_samples(rollouts, None, LENGTH, 0, SIGNATURE, in_loss=counted)
    return made, torch.from_numpy(noise)


def estimate(values: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns and whitened advantages, by the recursion of the returns: R_t = r_t + γ((1 − λ)·V_{t+1} + λ·R_{t+1})."""
    returns = np.zeros_like(values)
    for i, tokens in enumerate(map(np.flatnonzero, mask)):
        value = target = 0.0
        for place, t in enumerate(reversed(tokens)):
            reward = REWARDS[i] if place == 0 else 0.0
            target = reward + PPO.gamma * ((1 - PPO.lam) * value + PPO.lam * target)
            value, returns[i, t] = values[i, t], target
    counted = mask & (~np.isin(np.arange(SAMPLES), LEFT_OUT))[:, None]
    raw = (returns - values)[counted]
    return returns, np.where(counted, (returns - values - raw.mean()) / (raw.std() + 1e-8), 0)


def test_a_critics_update_is_that_of_plain_torch(layouts: Layouts) -> None:
    """Values, targets and all gradients of one process against a dense model in float64, with a head on top."""
    found = layouts["one"]["ppo"]
    weights = {name: tensor.double().requires_grad_() for name, tensor in found["weights"].items()}
    made, noise = batch()
    mask, loss_mask = made.usable_mask.numpy(), made.loss_mask
    values = reference.values(weights, MODEL, made.tokens)
    returns, advantages = estimate(values.detach().numpy(), mask)
    for name, wanted in zip(NAMES, (values.detach().numpy(), returns, advantages)):
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=0, atol=1e-5)
    old = values.detach() + noise
    losses, stats = critic_loss(values, old, torch.from_numpy(returns), loss_mask, PPO.value_clip)
    (losses.sum() / loss_mask.sum()).backward()
    assert stats.values() == pytest.approx({name: found["update"][name] for name in stats.values()}, rel=1e-5)
    assert 0 < found["update"]["value_clip_fraction"] < 0.5
    gap, name = relative(found["gradient"], {name: tensor.grad for name, tensor in weights.items()})
    assert gap <= 1e-4, name
    v, r = values.detach()[loss_mask], torch.from_numpy(returns)[loss_mask]
    explained = float(1 - (r - v).var() / r.var())
    means = {"value_mean": float(v.mean()), "return_mean": float(r.mean()), "explained_variance": explained}
    assert found["statistics"] == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_an_actors_update_with_advantages_of_tokens_is_that_of_plain_torch(layouts: Layouts) -> None:
    statistics, gradients = layouts["one"]["ppo"]["actor"]
    weights = reference.load(layouts.directory / "one" / "hf")
    made, noise = batch()
    logprobs = torch.nn.functional.pad(
        reference.next_logprobs(reference.logits(weights, MODEL, made.tokens), made.tokens), (0, 1)
    )
    scored = make_scored_batch(made, logprobs.detach() + noise)
    training = make_training_batch(scored, layouts["one"]["ppo"]["advantages"].double())
    total, _ = objectives.batch_loss(objectives.get("ppo"), PPO, logprobs, training)
    loss = total / training.loss_mask.sum()
    loss.backward()
    assert statistics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-7)
    gap, name = relative(gradients, {name: tensor.grad for name, tensor in weights.items()})
    assert gap <= 1e-4, name
