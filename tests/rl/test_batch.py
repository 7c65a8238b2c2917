"""Samples become padded arrays in which position t belongs to token t + 1, and routes to token t."""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.rl.batches.batch import from_samples, from_sft
from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
from megatron_bai.rl.batches.token_batch import make_token_batch, padded_length
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.turns import Turn
from megatron_bai.routing.routes import RouteSignature, VersionSpan

SIGNATURE = RouteSignature(moe_layers=3, num_experts=16, topk=2)
PAD = 63


def sample(total: int, prompt: int, seed: int) -> Sample:
    """`total` tokens of which the first `prompt` are the prompt's; everything in it is telling."""
    random = np.random.default_rng(seed)
    return Sample(
        prompt_index=0,
        tokens=random.integers(0, 60, total),
        prompt_length=prompt,
        logprobs=-random.exponential(1, total - prompt).astype(np.float32),
        routes=np.argsort(random.random((total - 1, 3, 16)), axis=-1)[..., :2].astype(np.uint8),
        spans=(),
        finish="stop",
        reward=seed / 7 if seed % 3 else None,
    )


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=5)


@given(shapes, st.integers(0, 4), st.integers(0, 2**31))
def test_every_field_lies_where_its_token_is(shape: list[tuple[int, int]], spare: int, seed: int) -> None:
    samples = [sample(max(2, p + r), p, seed + i) for i, (p, r) in enumerate(shape)]
    length = max(len(s.tokens) for s in samples) + spare
    advantages = np.random.default_rng(seed).normal(size=len(samples))
    batch = from_samples(samples, advantages, length, PAD, SIGNATURE)
    assert batch.tokens.shape == (len(samples), length) and len(batch) == len(samples)
    for i, s in enumerate(samples):
        total = len(s.tokens)
        for t in range(length):
            assert batch.tokens[i, t] == (s.tokens[t] if t < total else PAD)
            is_response = s.prompt_length <= t + 1 < total
            assert bool(batch.response_mask[i, t]) == bool(batch.usable_mask[i, t]) == is_response
            wanted = s.logprobs[t + 1 - s.prompt_length] if is_response else 0
            assert batch.infer_logprobs[i, t] == wanted
            assert bool(batch.routed[i, t]) == (t < total - 1)
            if t < total - 1:
                assert batch.routes[i, t].tolist() == s.routes[t].tolist()
        assert batch.sample_advantages[i] == np.float32(advantages[i])
        assert batch.rewards[i] == np.float32(s.reward or 0)
    assert int(batch.response_mask.sum()) == sum(len(s.response) for s in samples)


def conversation(weight: float = 0.0) -> Sample:
    """Two prompt tokens; turns of three and two tokens, and a reply of two between."""
    mask = np.array([True] * 3 + [False] * 2 + [True] * 2)
    one = sample(9, 2, 1)
    return replace(
        one,
        logprobs=np.where(mask, one.logprobs, 0),
        sampled_mask=mask,
        turns=(Turn(0, 3, num_reply_tokens=2, reward=0.5), Turn(5, 7, reward=2.0)),
        turn_weight=weight,
        spans=(VersionSpan("3", 0, 3), VersionSpan("5", 3, 7)),
    )


def test_what_an_environment_said_is_in_no_mask_and_has_routes() -> None:
    batch = from_samples([conversation(), sample(9, 2, 2)], np.zeros(2), 10, PAD, SIGNATURE)
    wanted = [False, True, True, True, False, False, True, True, False, False]
    assert batch.response_mask[0].tolist() == batch.usable_mask[0].tolist() == batch.loss_mask[0].tolist()
    assert batch.response_mask[0].tolist() == wanted and int(batch.response_mask[1].sum()) == 7
    assert not batch.infer_logprobs[0][~batch.response_mask[0]].any()
    assert batch.routed[0].tolist() == [True] * 8 + [False] * 2 and not batch.missing.any()
    assert batch.turn_rewards is None  # the reward has nothing of the environment's


def test_ages_are_those_of_sampled_tokens() -> None:
    batch = from_samples([conversation()], np.zeros(1), 10, PAD, SIGNATURE, version=6)
    assert batch.version_age[0].tolist() == [0, 3, 3, 3, 0, 0, 1, 1, 0, 0]


def test_rewards_of_earlier_turns_are_at_their_last_tokens_by_their_weight() -> None:
    batch = from_samples([conversation(2.0), sample(9, 2, 2)], np.zeros(2), 10, PAD, SIGNATURE)
    assert batch.turn_rewards is not None
    assert batch.turn_rewards.tolist() == [[0, 0, 0, 1.0, 0, 0, 0, 0, 0, 0], [0.0] * 10]
    failed = from_samples([replace(conversation(2.0), reward=None)], np.zeros(1), 10, PAD, SIGNATURE)
    assert failed.turn_rewards is None
    assert make_training_batch(make_scored_batch(batch)).turn_rewards is not None


def test_an_empty_response_counts_nothing_and_a_single_token_counts_once() -> None:
    batch = from_samples([sample(4, 4, 0), sample(5, 4, 1)], np.zeros(2), 6, PAD, SIGNATURE)
    assert batch.usable_mask.tolist() == [[False] * 6, [False, False, False, True, False, False]]


def test_rows_without_a_route_are_missing_and_padding_is_neither() -> None:
    whole, part = sample(6, 2, 0), sample(5, 2, 1)
    part = replace(part, route_mask=np.array([True, False, False, True]))
    batch = from_samples([whole, part], np.zeros(2), 7, PAD, SIGNATURE)
    assert batch.routed.tolist() == [[True] * 5 + [False] * 2, [True, False, False, True] + [False] * 3]
    assert batch.missing.tolist() == [[False] * 7, [False, True, True] + [False] * 4]
    assert batch.routes[1, 3].tolist() == part.routes[3].tolist() != batch.routes[1, 2].tolist()


def test_a_rank_takes_the_routes_of_its_layers() -> None:
    samples = [sample(6, 2, 0), sample(4, 2, 1)]
    whole = from_samples(samples, np.zeros(2), 7, PAD, SIGNATURE)
    part = from_samples([s.select_layers([0, 2]) for s in samples], np.zeros(2), 7, PAD, SIGNATURE)
    assert torch.equal(part.routes, whole.routes[:, :, [0, 2]]) and torch.equal(part.routed, whole.routed)
    with pytest.raises(AssertionError, match="the routes of different layers"):
        from_samples([samples[0], samples[1].select_layers([0, 2])], np.zeros(2), 7, PAD, SIGNATURE)


def test_a_layer_of_a_samples_routes_keeps_its_number_however_often_layers_are_selected() -> None:
    whole = sample(5, 3, 0)
    part = whole.select_layers([2, 0])
    assert whole.columns is None and part.columns == (2, 0)
    np.testing.assert_array_equal(part.routes, whole.routes[:, [2, 0]])
    again = part.select_layers([0])
    assert again.columns == (0,)
    np.testing.assert_array_equal(again.routes, whole.routes[:, [0]])
    with pytest.raises(ValueError):
        part.select_layers([1])
    with pytest.raises(AssertionError, match="of other layers"):
        whole.append(replace(part, prompt_length=len(part.tokens)))


def test_a_sample_longer_than_the_batch_is_refused() -> None:
    with pytest.raises(ValueError):
        from_samples([sample(9, 4, 0)], np.zeros(1), 6, PAD, SIGNATURE)


def test_parts_are_consecutive_in_every_field() -> None:
    samples = [sample(6, 2, seed) for seed in range(5)]
    batch = make_training_batch(make_scored_batch(from_samples(samples, np.arange(5.0), 6, PAD, SIGNATURE)))
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    for field in fields(batch):
        whole = getattr(batch, field.name)
        if isinstance(whole, torch.Tensor):
            assert torch.equal(torch.cat([getattr(p, field.name) for p in parts]), whole), field.name
        else:
            assert all(getattr(p, field.name) == whole for p in parts), field.name


def test_a_part_may_be_empty_and_samples_keep_their_numbers_in_another_order() -> None:
    samples = [sample(total, 2, seed) for seed, total in enumerate((6, 3, 5))]
    batch = from_samples(samples, np.arange(3.0), 6, PAD, SIGNATURE).reorder([2, 0, 1])
    assert batch.sample_index.tolist() == [2, 0, 1] and batch.sample_advantages.tolist() == [2, 0, 1]
    assert batch.lengths.tolist() == [5, 6, 3]
    none, first, rest = batch.split([0, 1, 2])
    assert len(none) == 0 and none.routes.shape == (0, 6, 3, 2) and rest.sample_index.tolist() == [0, 1]
    assert first.sample_index.tolist() == [2] and torch.equal(first.routes, batch.routes[:1])


def test_the_target_of_a_token_is_the_next_of_its_sample() -> None:
    batch = from_samples([sample(4, 2, 0), sample(2, 1, 1)], np.zeros(2), 5, PAD, SIGNATURE)
    (a, b), tokens = batch.targets.tolist(), batch.tokens.tolist()
    assert a == [*tokens[0][1:4], -1, -1] and b == [tokens[1][1], -1, -1, -1, -1]
    assert (batch.targets[batch.response_mask] >= 0).all()  # what the loss counts has one
    assert make_token_batch(batch.tokens).targets[:, -1].tolist() == [-1, -1]


def test_supervised_targets_move_to_the_position_that_predicts_them() -> None:
    tokens = np.arange(10).reshape(2, 5)
    target = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]], dtype=bool)
    batch = from_sft(tokens, target)
    predicted = [int(batch.tokens[i, t + 1]) for i, t in zip(*np.nonzero(batch.loss_mask.numpy()))]
    assert predicted == [1, 2, 9]  # the first token of a row is predicted by nothing
    assert batch.padding.tolist() == [[False] * 3 + [True] * 2, [False] * 5]  # what follows a row's last target


def test_each_stage_has_what_the_former_has_and_adds_to_it() -> None:
    samples = [replace(sample(5, 2, seed), prompt_index=seed // 2) for seed in range(3)]
    in_loss = np.array([True, False, True])
    rollouts = from_samples(samples, np.array([1.0, 2.0, -0.5]), 6, PAD, SIGNATURE, in_loss)
    old, reference = torch.randn(2, 3, 6)
    scored = make_scored_batch(rollouts, old, None, reference)
    training = make_training_batch(scored)
    for former, later in ((rollouts, scored), (scored, training)):
        assert all(getattr(later, field.name) is getattr(former, field.name) for field in fields(former))
    assert scored.old_logprobs is old and scored.reference_logprobs is reference
    assert torch.equal(scored.sampled_logprobs, old)
    assert training.advantages.tolist() == [[1.0] * 6, [2.0] * 6, [-0.5] * 6]
    assert training.prompt_tokens.tolist() == [3, 3, 3]  # of the two samples of a prompt one is left out
    assert not (training.values.any() or training.returns.any() or training.router_shift.any())
    with pytest.raises(FrozenInstanceError):
        training.advantages = old
    of_tokens, values, returns = torch.randn(3, 3, 6)
    training = make_training_batch(scored, of_tokens, values, returns)
    assert training.advantages is of_tokens and training.values is values and training.returns is returns


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        (
            "usable_mask",
            torch.ones(2, 6),
            r"is \[2, 6\] torch.float32 on cpu: \[B = 2, T = 6\] of bool on cpu is needed",
        ),
        ("infer_logprobs", torch.zeros(2, 5), r"is \[2, 5\] .*: \[B = 2, T = 6\] of float"),
        ("sample_advantages", torch.zeros(2, 6), r"is \[2, 6\] .*: \[B = 2\] of float"),
        ("prompt_index", torch.zeros(3, dtype=torch.int64), r"is \[3\] .*: \[B = 2\] of int64"),
        (
            "in_loss",
            torch.ones(2, dtype=torch.bool, device="meta"),
            r"is \[2\] torch.bool on meta: \[B = 2\] of bool on cpu is needed",
        ),
        (
            "route_weights",
            torch.zeros(2, 6, 3, 1),
            r"is \[2, 6, 3, 1\] .*: \[B = 2, T = 6, layers = 3, topk = 2\] of float",
        ),
        ("routes", None, "is None"),
        ("columns", (0, 2), r"routes of 3 layers, and the batch names \(0, 2\)"),
    ],
)
def test_a_field_of_another_shape_type_or_device_is_named_where_the_batch_is_made(
    name: str, wrong: object, says: str
) -> None:
    batch = from_samples([sample(5, 2, 0), sample(4, 1, 1)], np.zeros(2), 6, PAD, SIGNATURE)
    with pytest.raises(ValueError, match=says if name == "columns" else f"RolloutBatch.{name} {says}"):
        replace(batch, **{name: wrong})


@given(st.integers(1, 300), st.integers(1, 16))
def test_padding_is_the_least_that_divides(longest: int, multiple: int) -> None:
    found = padded_length(longest, multiple)
    assert found % multiple == 0 and longest <= found < longest + multiple
