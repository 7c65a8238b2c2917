"""Samples share rows of a fixed number of tokens, and an empty row is worth nothing."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from moe import MODEL, SIGNATURE, samples

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.micro_batches import first_fit, make_mini_batches, pack_rows, split_alike
from megatron_bai.rl.batches.stages import TrainingBatch, make_scored_batch, make_training_batch
from megatron_bai.rl.objectives import aggregate
from megatron_bai.rl.policy.forward_backward import _packed_seq_params


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(20, 60))
def test_every_sequence_is_in_one_row_and_no_two_rows_fit_into_one(lengths: list[int], row: int) -> None:
    rows = first_fit(lengths, row)
    assert sorted(index for held in rows for index in held) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in held) for held in rows]
    assert all(0 < tokens <= row for tokens in filled)
    assert len(rows) < 2 or sum(sorted(filled)[:2]) > row


def test_rows_hold_the_longest_first() -> None:
    assert first_fit([7, 24, 16, 18, 6], 24) == [[1], [3, 4], [2, 0]]
    assert first_fit([], 24) == []


@pytest.fixture
def world() -> Iterator[None]:
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def drawn(count: int = 8) -> TrainingBatch:
    random = np.random.default_rng(7)
    rollouts = from_samples(samples(count, random), random.normal(size=count), 24, 0, SIGNATURE)
    return make_training_batch(make_scored_batch(rollouts))


def settings(row: int, **parallel: int) -> config.Config:
    trainer = config.Trainer(mini_batches=2, micro_batch_size=2, tokens_per_micro_batch=row)
    return config.Config(model=MODEL, trainer=trainer, parallel=config.Parallel(**parallel))


def test_mini_batches_keep_their_samples_and_their_order(world: None) -> None:
    whole, stats = drawn(), Stats()
    batch, minis = make_mini_batches(whole, settings(24), stats)
    held = [sorted(number for micro in mini for number in micro.sample_index.tolist()) for mini in minis]
    assert held == [[0, 1, 2, 3], [4, 5, 6, 7]]
    micros = [micro for mini in minis for micro in mini]
    assert torch.cat([micro.sample_index for micro in micros]).tolist() == batch.sample_index.tolist()
    assert torch.equal(batch.tokens, whole.tokens[batch.sample_index]) and torch.equal(
        batch.loss_mask, whole.loss_mask[batch.sample_index]
    )
    padding = 1 - int(whole.lengths.sum()) / (24 * len(micros))
    assert stats.values() == {"padding_fraction": pytest.approx(padding)}


@pytest.mark.parametrize("row", [0, 24])
def test_a_later_stage_lies_in_the_rows_of_the_earlier_one(row: int, world: None) -> None:
    batch, minis = make_mini_batches(drawn(), settings(row), Stats())
    later = replace(batch, old_logprobs=torch.randn(batch.tokens.shape))
    parts = split_alike(later, minis)
    assert [[part.packing for part in mini] for mini in parts] == [[micro.packing for micro in mini] for mini in minis]
    pairs = [(part, micro) for mini, micros in zip(parts, minis, strict=True) for part, micro in zip(mini, micros)]
    assert all(torch.equal(part.pack(part.tokens), micro.pack(micro.tokens)) for part, micro in pairs)
    assert torch.equal(torch.cat([part.old_logprobs for part, _ in pairs]), later.old_logprobs)


def test_samples_are_counted_where_tokens_are_not(world: None) -> None:
    whole, stats = drawn(), Stats()
    batch, minis = make_mini_batches(whole, settings(0), stats)
    assert batch is whole and [[len(micro) for micro in mini] for mini in minis] == [[2, 2], [2, 2]]
    assert stats.values() == {"padding_fraction": pytest.approx(1 - int(whole.lengths.sum()) / (8 * 24))}


def test_an_interleaved_schedule_gets_a_row_a_stage(world: None) -> None:
    _, minis = make_mini_batches(drawn(), settings(24, pipeline=2, virtual_pipeline=2), Stats())
    assert all(len(mini) % 2 == 0 for mini in minis) and any(len(micro) == 0 for mini in minis for micro in mini)


def test_a_sample_longer_than_a_row_is_refused_by_name(world: None) -> None:
    with pytest.raises(UserError, match=r"sample of 24 tokens .*tokens_per_micro_batch \(23\).*max_new_tokens"):
        make_mini_batches(drawn(), settings(23), Stats())


OBJECTIVES = (config.Sft, config.Minirl, config.Sequence, config.Grpo, config.Dapo, config.Cispo, config.Gspo)


@pytest.mark.parametrize("chosen", [kind() for kind in OBJECTIVES], ids=lambda chosen: chosen.name)
def test_an_empty_row_adds_nothing_to_any_objective(chosen: config.Objective) -> None:
    empty, full = pack_rows(drawn(), [0, 8], 128)
    objective = objectives.get(chosen.name)
    fed = torch.randn(1, 128, requires_grad=True)
    total, stats = objectives.batch_loss(objective, chosen, empty.unpack(fed), empty, empty.unpack(fed))
    (gradient,) = torch.autograd.grad(total, fed)
    assert total == 0 and not gradient.any() and stats.values() == {}
    mean = objective.mean(chosen)
    assert aggregate.loss_denominator([empty, full], mean) == aggregate.loss_denominator([full], mean) > 0


def test_attention_is_told_where_samples_begin_and_that_the_rest_is_one_more() -> None:
    (micro,) = pack_rows(drawn(), [8], 128)
    found = _packed_seq_params(micro.packing, torch.device("cpu"))
    assert found.qkv_format == "thd" and found.cu_seqlens_q.dtype is torch.int32
    assert found.cu_seqlens_q.tolist() == np.cumsum([0, 7, 4, 18, 10, 7, 24, 16, 18, 24]).tolist()
    assert found.cu_seqlens_kv is found.cu_seqlens_q and found.max_seqlen_q == found.max_seqlen_kv == 24
