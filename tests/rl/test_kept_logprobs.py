"""Over kept ids, and without ids that are held back, log-probabilities and entropy are those of plain torch."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from moe import SIGNATURE, samples
from transformers import MinNewTokensLengthLogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_bai import config
from megatron_bai.rl import session
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.micro_batches import pack_rows
from megatron_bai.rl.policy import kept_logprobs, logprobs, training_engine
from megatron_bai.rl.policy.held_back import HeldBack
from megatron_bai.rl.policy.kept_logprobs import kept_logprobs_and_entropy
from megatron_bai.rollout.kept_ids import NO_ID
from megatron_bai.rollout.sample import Sample

VOCAB, TEMPERATURE, LENGTH = 56, 0.7, 26


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: None)
    alone: Any = SimpleNamespace(all_reduce=lambda *args, **options: None, ReduceOp=dist.ReduceOp)
    for module in (logprobs, kept_logprobs):
        monkeypatch.setattr(module, "dist", alone)


def as_ids(scores: torch.Tensor) -> torch.Tensor:
    """`[N, K]` ids that a warper left finite, filled with `NO_ID`, in no order."""
    kept = [row.isfinite().nonzero()[:, 0] for row in scores]
    kept = [row[torch.randperm(len(row), generator=torch.Generator().manual_seed(len(row)))] for row in kept]
    return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=NO_ID).int()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [(8, 1.0, 0.0), (8, 0.6, 0.0), (20, 0.9, 0.1), (2, 1.0, 0.0)])
def test_they_are_those_after_the_warpers_of_transformers(limits: tuple[int, float, float], dtype: torch.dtype) -> None:
    """And so is the gradient, which is none for ids that were not kept."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 7, VOCAB, generator=generator, dtype=torch.float64) * 3).to(dtype)
    ids = torch.zeros(21, 1, dtype=torch.int64)
    top_k, top_p, min_p = limits
    warped = TopPLogitsWarper(top_p)(ids, logits.double().flatten(0, 1) / TEMPERATURE)
    warped = MinPLogitsWarper(min_p)(ids, TopKLogitsWarper(top_k)(ids, warped))
    kept = as_ids(warped).view(3, 7, -1)
    targets = torch.multinomial(warped.softmax(-1), 1, generator=generator).view(3, 7)
    targets[1, 2] = -1
    kept[2, 3], targets[2, 3] = NO_ID, 5  # as a token of a prompt has it
    weights = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)

    logits.requires_grad_()
    ours = kept_logprobs_and_entropy(logits, targets, kept, TEMPERATURE)
    (gradient,) = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, ours, strict=True)), logits)

    plain = logits.detach().double().requires_grad_()
    there = (targets >= 0) & (kept[..., 0] >= 0)
    excluded = ~warped.isfinite().view(3, 7, VOCAB)
    naive = (plain / TEMPERATURE).masked_fill(excluded, -1e9).log_softmax(-1)
    wanted = naive.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(there, 0)
    entropy = -(naive.exp() * naive).sum(-1).where(there, 0)
    (correct,) = torch.autograd.grad((weights[0] * wanted + weights[1] * entropy).sum(), plain)

    exact = dtype == torch.float64
    for found, right in zip(ours, (wanted, entropy), strict=True):
        assert found.dtype == (torch.float64 if exact else torch.float32)
        torch.testing.assert_close(found.double(), right, rtol=1e-9 if exact else 1e-5, atol=1e-12 if exact else 1e-5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(gradient.double(), correct, rtol=tolerance, atol=tolerance)
    assert not gradient[excluded].any() and not gradient[~there].any()


def with_kept(found: list[Sample], logits: torch.Tensor, top_k: int) -> list[Sample]:
    """Samples of which each token was drawn from its likeliest ids, fewer at each fourth; logits are by sample."""
    truncated = []
    for sample, scores in zip(found, logits, strict=True):
        first = sample.prompt_length - 1
        kept = scores[first : len(sample.tokens) - 1].topk(top_k).indices.int().numpy()
        kept[::4, top_k // 2 :] = NO_ID
        absent = ~(kept == sample.response[:, None]).any(axis=1)
        kept[absent, 0] = sample.response[absent]
        truncated.append(Sample(**{**vars(sample), "kept_ids": kept}))
    return truncated


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_has_each_tokens_ids_at_its_logits(packed: bool) -> None:
    """Position t has what token t + 1 was drawn from, padded, split and packed; tokens of prompts have 0."""
    found = samples(6, np.random.default_rng(0))
    logits = torch.randn(6, LENGTH, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    truncated = with_kept(found, logits, 6)
    batch = from_samples(truncated, None, LENGTH, 0, SIGNATURE)
    assert batch.kept_ids is not None and batch.kept_ids.shape == (6, LENGTH, 6)
    micros = pack_rows(batch, [2, 3, 1], 80) if packed else batch.split(2)
    rows = logits.split([2, 3, 1] if packed else 2)
    scored = [
        training_engine._logprobs_and_entropy(micro.pack(part), micro, TEMPERATURE)
        for micro, part in zip(micros, rows, strict=True)
    ]
    (ours, entropy) = map(torch.cat, zip(*scored, strict=True))
    for i, sample in enumerate(truncated):
        wanted = torch.zeros(2, LENGTH)
        for t, (token, kept) in enumerate(zip(sample.response, sample.kept_ids, strict=True), sample.prompt_length - 1):
            some = kept[kept != NO_ID].tolist()
            naive = (logits[i, t, some] / TEMPERATURE).log_softmax(0)
            wanted[:, t] = torch.stack([naive[some.index(token)], -(naive.exp() * naive).sum()])
        torch.testing.assert_close(torch.stack([ours[i], entropy[i]]), wanted, rtol=1e-5, atol=1e-5)


def test_a_batch_takes_no_token_that_was_not_drawn_from_its_ids() -> None:
    """A row of ids too far left or right is noticed where the batch is made."""
    found = samples(6, np.random.default_rng(0))
    truncated = with_kept(found, torch.randn(6, LENGTH, VOCAB, generator=torch.Generator().manual_seed(2)), 6)
    shifted = Sample(**{**vars(truncated[3]), "kept_ids": np.roll(truncated[3].kept_ids, 1, axis=0)})
    with pytest.raises(AssertionError, match="none of those it was drawn from"):
        from_samples([*truncated[:3], shifted], None, LENGTH, 0, SIGNATURE)
    with pytest.raises(AssertionError, match="were not truncated beside others"):
        from_samples([*truncated[:3], found[3]], None, LENGTH, 0, SIGNATURE)
    assert from_samples(found, None, LENGTH, 0, SIGNATURE).kept_ids is None


def test_tokens_of_an_environment_alone_were_drawn_from_nothing() -> None:
    found = samples(6, np.random.default_rng(0))
    truncated = with_kept(found, torch.randn(6, LENGTH, VOCAB, generator=torch.Generator().manual_seed(2)), 6)[3]
    mask = np.arange(len(truncated.response)) != 1
    kept = truncated.kept_ids.copy()
    kept[1] = NO_ID
    replied = {**vars(truncated), "sampled_mask": mask, "kept_ids": kept}
    batch = from_samples([Sample(**replied)], None, LENGTH, 0, SIGNATURE)
    assert batch.kept_ids is not None and torch.equal((batch.kept_ids >= 0).any(-1), batch.response_mask)
    for wrong in ({"kept_ids": truncated.kept_ids}, {"sampled_mask": None}):
        with pytest.raises(AssertionError, match="none of those it was drawn from"):
            from_samples([Sample(**{**replied, **wrong})], None, LENGTH, 0, SIGNATURE)


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_held_back_are_those_of_transformers(packed: bool) -> None:
    """The first tokens of a response have neither probability nor gradient for end tokens; all others have."""
    least, ends = 3, [1, 40]
    found = samples(6, np.random.default_rng(0))
    for sample in found:  # no end token before the minimum
        sample.tokens[np.isin(sample.tokens, ends)] = 2
    batch = from_samples(found, None, LENGTH, 0, SIGNATURE)
    (micro,) = pack_rows(batch, [6], 160) if packed else batch.split(6)
    logits = torch.randn(6, LENGTH, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[..., ends] += 40  # of which nothing may be left
    weights = torch.randn(2, 6, LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights *= batch.response_mask

    def differentiate(scores: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, scores, strict=True)), logits)[0]

    logits.requires_grad_()
    ours = training_engine._logprobs_and_entropy(
        micro.pack(logits), micro, TEMPERATURE, held_back=HeldBack(least, ends)
    )
    masked = []
    for i, sample in enumerate(found):
        processor = MinNewTokensLengthLogitsProcessor(sample.prompt_length, least, ends, device="cpu")
        masked.append(
            torch.cat([processor(torch.zeros(1, t + 1), logits[i, t : t + 1].clone()) for t in range(LENGTH)])
        )
    naive = (torch.stack(masked) / TEMPERATURE).clamp(min=-1e9).log_softmax(-1)
    targets = batch.targets.clamp(min=0)[..., None]
    wanted = naive.gather(-1, targets)[..., 0], -(naive.exp() * naive).sum(-1)
    mask = batch.response_mask
    for got, right in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got[mask], right[mask], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(differentiate(ours, logits), differentiate(wanted, logits), rtol=1e-9, atol=1e-12)


def test_the_minimum_counts_from_a_responses_first_token_whoever_the_next_are_of() -> None:
    """Tokens of a response that were not sampled count, as where a request is made, and nothing is held back there."""
    batch = from_samples(samples(4, np.random.default_rng(0))[3:], None, LENGTH, 0, SIGNATURE)
    first = int(batch.response_mask[0].int().argmax())
    batch.response_mask[0, first + 1] = False
    assert HeldBack(4, [1]).find_tokens(batch)[0].nonzero()[:, 0].tolist() == [first, first + 2, first + 3]


def test_supervised_training_holds_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minimum is of what servers sample: given texts may end earlier, and would have no probability."""
    monkeypatch.setattr(session, "TrainingEngine", lambda *arguments: arguments[-1])
    actor: Any = None
    device: Any = SimpleNamespace(device="cpu")
    for objective, held in ((config.Minirl(), HeldBack(3, {1})), (config.Sft(), None)):
        settings = config.Config(objective=objective, rollout=config.Rollout(min_new_tokens=3))
        task: Any = SimpleNamespace(end_tokens={1})
        assert session._make_engine(actor, actor, device, settings, task) == held
