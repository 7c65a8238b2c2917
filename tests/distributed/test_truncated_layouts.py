"""Of draws from some ids alone, scores and gradients are the same in every layout, and those of plain torch."""

import pytest
import reference
import torch
from distributed.test_layouts import Layouts, relative
from distributed.worker import (
    CASES,
    COOLED,
    ENDS,
    HELD,
    LENGTH,
    PACKED,
    QUICK,
    SAMPLES,
    TEMPERATURE,
    drawn_rollouts,
    problem,
)
from moe import MODEL, SIGNATURE
from tiers import tiered

from megatron_bai.rl import objectives
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch

pytestmark = pytest.mark.distributed
each_kind = pytest.mark.parametrize("draws", ["kept", "held"])
NOWHERE = -1e9  # a logit


@each_kind
@pytest.mark.parametrize("case", tiered([name for name in CASES | PACKED if name != "one"], QUICK))
def test_draws_from_some_ids_are_the_same_in_every_layout(case: str, draws: str, layouts: Layouts) -> None:
    one, other = layouts["one"]["drawn"][draws], layouts[case]["drawn"][draws]
    for name in ("logprobs", "entropy"):
        ours = other["scores"][name]
        assert ours.shape == (SAMPLES, LENGTH) and ours.any()
        torch.testing.assert_close(ours, one["scores"][name], rtol=0, atol=1e-5)
    assert other["first"] == pytest.approx(one["first"], rel=3e-6, abs=1e-6)
    gap, name = relative(other["gradient"], one["gradient"])
    assert gap <= 2e-5, name


@each_kind
def test_draws_from_some_ids_are_those_of_plain_torch(draws: str, layouts: Layouts) -> None:
    """Scores and an update are of a softmax in float64 in which all other ids have no part."""
    one = layouts["one"]["drawn"][draws]
    weights = reference.load(layouts.directory / "one" / "hf")
    rollouts, advantages, noise = problem()
    rollouts = drawn_rollouts(rollouts, draws)
    batch = from_samples(rollouts, advantages, LENGTH, 0, SIGNATURE)
    scores = reference.logits(weights, MODEL, batch.tokens, batch.routes) / TEMPERATURE
    excluded = torch.zeros_like(scores, dtype=torch.bool)
    for i, sample in enumerate(rollouts):
        first = sample.prompt_length - 1
        for t in range(first, len(sample.tokens) - 1):
            if draws == "kept":
                excluded[i, t] = True
                excluded[i, t, [int(token) for token in sample.kept_ids[t - first] if token >= 0]] = False
            elif t < first + HELD:
                excluded[i, t, list(ENDS)] = True
    assert excluded.any() and not excluded.all()
    scores = scores.masked_fill(excluded, NOWHERE)
    logprobs = torch.nn.functional.pad(reference.next_logprobs(scores, batch.tokens), (0, 1))
    p = scores.log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)
    there = batch.response_mask if draws == "kept" else batch.targets >= 0
    for name, wanted in (("logprobs", logprobs), ("entropy", entropy)):
        torch.testing.assert_close(one["scores"][name].double(), (wanted * there).detach(), rtol=0, atol=1e-5)
    batch = make_training_batch(make_scored_batch(batch, logprobs.detach() + torch.from_numpy(noise)))
    total, _ = objectives.batch_loss(objectives.get("dapo"), COOLED, logprobs, batch, entropy)
    loss = total / batch.loss_mask.sum()
    loss.backward()
    assert one["first"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    gap, name = relative(one["gradient"], {name: tensor.grad for name, tensor in weights.items()})
    assert gap <= 1e-4, name
