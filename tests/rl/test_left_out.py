"""What the loss leaves out, and the reference policy's weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from moe import SIGNATURE, samples

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.advantages import GroupRewards
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
from megatron_bai.rl.experience import collector
from megatron_bai.rl.policy.weight_copy import WeightCopy
from megatron_bai.rollout.sample import lost_sample
from megatron_bai.routing.missing import apply_missing_policy

REWARDS = np.array([0.0, 1, 0, 0, 1, 1, 1, 1])  # two groups of four
CUT = (0, 5)  # at the token limit
GROUPS = config.Trainer(group_size=4)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, []),
        ({"drop_uniform_groups": True}, [4, 5, 6, 7]),
        ({"mask_overlong": True}, [0, 5]),
        ({"drop_uniform_groups": True, "mask_overlong": True}, [0, 4, 5, 6, 7]),
    ],
)
def test_uniform_groups_and_overlong_responses_are_left_out_where_asked(
    options: dict[str, bool], left_out: list[int]
) -> None:
    finished = [SimpleNamespace(finish="length" if i in CUT else "stop") for i in range(8)]
    stats = Stats()
    settings = config.Config(objective=config.Minirl(**options), trainer=GROUPS)
    counted = collector._samples_in_loss(finished, GroupRewards.of(list(REWARDS[:8]), 4), settings, stats)
    assert np.nonzero(~counted)[0].tolist() == left_out
    assert stats.values() == {"left_out_fraction": len(left_out) / 8}


@pytest.mark.parametrize(
    ("objective", "rule", "left_out"),
    [
        (config.Minirl(), "keep", [1, 8, 9, 10, 11]),
        (config.Minirl(), "drop", [0, 1, 2, 3, 8, 9, 10, 11]),
        (config.Ppo(), "keep", [1, 8, 9, 11]),  # a critic compares a sample with nothing but its value
        (config.Ppo(), "drop", [0, 1, 2, 3, 8, 9, 10, 11]),
    ],
)
def test_samples_without_reward_are_left_out_alone_or_with_their_group(
    objective: config.Policy, rule: str, left_out: list[int]
) -> None:
    """Three groups: one lacks a reward, one lacks none, one has nothing to compare its only one with."""
    finished = [SimpleNamespace(finish="stop") for _ in range(12)]
    rewards = GroupRewards.of([0.0, None, 0, 0, 0.0, 1, 0, 0, None, None, 0.0, None], 4)
    settings = config.Config(objective=objective, rollout=config.Rollout(incomplete_groups=rule), trainer=GROUPS)
    counted = collector._samples_in_loss(finished, rewards, settings, Stats())
    assert np.nonzero(~counted)[0].tolist() == left_out


def test_a_lost_sample_is_padding_to_everything_but_its_group() -> None:
    there = samples(3, np.random.default_rng(0))
    gone = lost_sample(there[0].prompt_index, there[0].tokens[: there[0].prompt_length], SIGNATURE, "no server")
    batch = from_samples([*there, gone], REWARDS[:4], 24, 0, SIGNATURE, in_loss=np.array([True, True, True, False]))
    alone = from_samples(there, REWARDS[:3], 24, 0, SIGNATURE)
    assert not (batch.response_mask[3].any() or batch.routed[3].any() or batch.missing[3].any())
    assert batch.lengths[3] == there[0].prompt_length and (batch.targets[3] >= 0).sum() == batch.lengths[3] - 1
    for name in ("tokens", "response_mask", "usable_mask", "loss_mask", "infer_logprobs", "routed"):
        assert torch.equal(getattr(batch, name)[:3], getattr(alone, name)), name
    assert apply_missing_policy("strict", batch.usable_mask, batch.routed, batch.missing)[1].num_missing == 0


def test_what_is_left_out_is_in_no_count_but_is_still_measured_before() -> None:
    rollouts = samples(8, np.random.default_rng(0))
    counted = np.array([i not in (3, 6) for i in range(8)])
    batch = from_samples(rollouts, REWARDS, 24, 0, SIGNATURE, in_loss=counted)
    lengths = [len(sample.response) for sample in rollouts]
    training = make_training_batch(make_scored_batch(batch))
    assert batch.prompt_index.tolist() == [0] * 4 + [1] * 4
    kept = [length * bool(count) for length, count in zip(lengths, counted)]
    for part in (batch, training):
        assert part.usable_mask.sum(1).tolist() == lengths and part.loss_mask.sum(1).tolist() == kept
    assert torch.equal(training.mask, training.loss_mask)
    assert torch.cat([part.prompt_tokens for part in training.split(3)]).tolist() == (
        [sum(kept[:4])] * 4 + [sum(kept[4:])] * 4
    )


def test_the_reference_keeps_the_first_weights_and_gives_the_actor_its_own_back() -> None:
    module = torch.nn.Linear(3, 4)
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    places = [parameter.data_ptr() for parameter in module.parameters()]
    reference = WeightCopy(SimpleNamespace(modules=[module]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1
    own = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    for _ in range(2):
        with pytest.raises(KeyError), reference.swapped_in():
            assert torch.equal(torch.nn.utils.parameters_to_vector(module.parameters()), flat)
            raise KeyError
        assert torch.equal(torch.nn.utils.parameters_to_vector(module.parameters()), own)
    assert [parameter.data_ptr() for parameter in module.parameters()] == places  # views of Megatron's buffers
