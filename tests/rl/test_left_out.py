"""What the loss leaves out, and the reference policy's weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from moe import SIGNATURE, samples

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import collect
from megatron_bai.rl.batch import from_samples
from megatron_bai.rl.reference import Reference

REWARDS = np.array([0.0, 1, 0, 0, 1, 1, 1, 1])  # two groups of four
CUT = (0, 5)  # at the token limit


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
    counted = collect._counted(finished, REWARDS, np.ones(8, dtype=bool), 4, config.Minirl(**options), stats)
    assert np.nonzero(~counted)[0].tolist() == left_out
    assert stats.values() == {"left_out_fraction": len(left_out) / 8}


def test_samples_without_reward_and_those_with_nothing_to_compare_are_left_out() -> None:
    finished = [SimpleNamespace(finish="stop") for _ in range(8)]
    valid = np.array([True, False, True, True, False, False, True, False])
    counted = collect._counted(finished, REWARDS, valid, 4, config.Minirl(), Stats())
    assert np.nonzero(~counted)[0].tolist() == [1, 4, 5, 6, 7]


def test_what_is_left_out_is_in_no_count_but_is_still_measured_before() -> None:
    rollouts = samples(8, np.random.default_rng(0))
    counted = np.array([i not in (3, 6) for i in range(8)])
    batch = from_samples(rollouts, REWARDS, 24, 0, SIGNATURE, counted=counted)
    lengths = [len(sample.response) for sample in rollouts]
    assert batch.mask.sum(1).tolist() == lengths
    assert batch.prompts.tolist() == [0] * 4 + [1] * 4
    assert batch.prompt_tokens.tolist() == [sum(lengths[:4])] * 4 + [sum(lengths[4:])] * 4
    parts = batch.split(3)
    batch.leave_out()
    kept = [length * bool(count) for length, count in zip(lengths, counted)]
    assert torch.cat([part.mask.sum(1) for part in parts]).tolist() == kept  # parts are views
    assert batch.prompt_tokens.tolist() == [sum(kept[:4])] * 4 + [sum(kept[4:])] * 4


def test_the_reference_keeps_the_first_weights_and_gives_the_actor_its_own_back() -> None:
    module = torch.nn.Linear(3, 4)
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    places = [parameter.data_ptr() for parameter in module.parameters()]
    reference = Reference(SimpleNamespace(modules=[module]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1
    own = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    for _ in range(2):
        with pytest.raises(KeyError), reference():
            assert torch.equal(torch.nn.utils.parameters_to_vector(module.parameters()), flat)
            raise KeyError
        assert torch.equal(torch.nn.utils.parameters_to_vector(module.parameters()), own)
    assert [parameter.data_ptr() for parameter in module.parameters()] == places  # views of Megatron's buffers
