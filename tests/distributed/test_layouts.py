"""The same training step in every parallel layout, and in plain torch without Megatron-Core.

Tolerances, all in fp32, with the largest difference seen between the layouts on the CPU in brackets:

- loss and gradient norm of each of three updates, relative: 3e-6 [4.3e-7];
- log-probabilities and entropy, absolute: 1e-5 nats [1.4e-6];
- every gradient tensor, relative to its largest element: 2e-5 [2.2e-6];
- updated parameters: Adam's first step is rate · g / (|g| + 1e-8), which turns the rounding of a gradient near zero
  into as much as 2 · rate. So parameters whose gradient is above 1e-4 of their tensor's largest are held to 1e-3 of
  the rate, which is 1e-6 [3e-8]; of the others one in 1000 may be off by more [3e-5 of them], none by more than
  2 · rate [0.04 · rate].
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from distributed.worker import (
    CASES,
    COOLED,
    LEARNING_RATE,
    LEFT_OUT,
    LENGTH,
    OBJECTIVES,
    QUICK,
    SAMPLES,
    SHIFTED,
    TEMPERATURE,
    UPDATES,
    from_rollouts,
    problem,
)
from moe import MODEL, SIGNATURE
from processes import Layouts
from tiers import tiered

from megatron_bai.config import Minirl
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
from megatron_bai.rl.objectives import minirl

pytestmark = pytest.mark.distributed
MODES = ("none", "r3")
OTHERS = [name for name in CASES if name != "one"]
each_mode = pytest.mark.parametrize("mode", MODES)
each_other = pytest.mark.parametrize("case", tiered(OTHERS, QUICK))


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of a tensor's elements over the largest element of that tensor, and its name."""
    assert a.keys() == b.keys()
    return max((float((a[name] - b[name]).abs().max() / b[name].abs().max()), name) for name in b)


@each_mode
@each_other
def test_losses_norms_and_statistics_are_the_same(case: str, mode: str, layouts: Layouts) -> None:
    one, other = layouts["one"][mode], layouts[case][mode]
    assert len(other["updates"]) == UPDATES
    for ours, theirs in zip(other["updates"], one["updates"]):
        assert ours == pytest.approx(theirs, rel=3e-6, abs=1e-6)
    assert other["first"] == pytest.approx(one["first"], rel=3e-6, abs=1e-6)
    assert 0 < one["first"]["clip_fraction"] < 0.5 and one["first"]["loss"] != one["updates"][1]["loss"]


@each_mode
@each_other
def test_log_probabilities_and_entropy_are_the_same(case: str, mode: str, layouts: Layouts) -> None:
    for name in ("logprobs", "entropy"):
        ours, theirs = layouts[case][mode]["scores"][name], layouts["one"][mode]["scores"][name]
        assert ours.shape == theirs.shape == (SAMPLES, LENGTH)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@each_mode
@each_other
def test_every_gradient_is_the_same(case: str, mode: str, layouts: Layouts) -> None:
    gap, name = relative(layouts[case][mode]["gradient"], layouts["one"][mode]["gradient"])
    assert gap <= 2e-5, name


@each_mode
@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_the_norm_reported_is_that_of_the_whole_gradient(case: str, mode: str, layouts: Layouts) -> None:
    found = layouts[case][mode]
    whole = torch.cat([gradient.flatten() for gradient in found["gradient"].values()])
    assert found["first"]["grad_norm"] == pytest.approx(float(whole.norm()), rel=3e-6)


@each_mode
@each_other
def test_updated_parameters_are_the_same(case: str, mode: str, layouts: Layouts) -> None:
    one, other = layouts["one"][mode], layouts[case][mode]
    gaps, clear = [], []
    for name, gradient in one["gradient"].items():
        gaps.append((other["updated"][name] - one["updated"][name]).abs().flatten())
        clear.append((gradient.abs() > 1e-4 * gradient.abs().max()).flatten())
    gap, well_conditioned = torch.cat(gaps), torch.cat(clear)
    assert well_conditioned.float().mean() > 0.95
    assert gap[well_conditioned].max() <= 1e-3 * LEARNING_RATE
    assert gap.max() <= 2 * LEARNING_RATE and (gap > 1e-3 * LEARNING_RATE).float().mean() < 0.001


@each_mode
@each_other
def test_parameters_stay_the_same_over_several_updates(case: str, mode: str, layouts: Layouts) -> None:
    one, other = layouts["one"][mode]["trained"], layouts[case][mode]["trained"]
    gap = torch.cat([(other[name] - one[name]).abs().flatten() for name in one])
    assert gap.max() <= 2 * UPDATES * LEARNING_RATE and (gap > 1e-2 * LEARNING_RATE).float().mean() < 0.001


@each_mode
@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_replicas_hold_the_same_bits_after_training(case: str, mode: str, layouts: Layouts) -> None:
    assert layouts[case][mode]["diverged"] == []


@each_mode
def test_the_gradient_is_that_of_plain_torch(mode: str, layouts: Layouts) -> None:
    """Scores, loss and all gradients of one process against a dense model in float64, with MiniRL on top."""
    one = layouts["one"][mode]
    weights = reference.load(layouts.directory / "one" / "hf")
    rollouts, advantages, noise = problem()
    batch = from_samples(rollouts, advantages, LENGTH, 0, SIGNATURE)
    scores = reference.logits(weights, MODEL, batch.tokens, batch.routes if mode == "r3" else None)
    logprobs = torch.nn.functional.pad(reference.next_logprobs(scores, batch.tokens), (0, 1))
    entropy = torch.distributions.Categorical(logits=scores.detach()).entropy()
    there = batch.targets >= 0
    torch.testing.assert_close(one["scores"]["logprobs"].double(), (logprobs * there).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(one["scores"]["entropy"].double(), entropy * there, rtol=0, atol=1e-5)
    batch = make_training_batch(make_scored_batch(batch, logprobs.detach() + torch.from_numpy(noise)))
    losses, _ = minirl.loss(logprobs, batch, Minirl())
    total = losses.sum()
    (total / SAMPLES).backward()
    assert one["first"]["loss"] == pytest.approx(float(total.detach()) / SAMPLES, rel=1e-5)
    gap, name = relative(one["gradient"], {name: tensor.grad for name, tensor in weights.items()})
    assert gap <= 1e-4, name


each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


@each_objective
@each_other
def test_denominators_of_every_kind_span_ranks_and_micro_batches(case: str, objective: str, layouts: Layouts) -> None:
    one, other = layouts["one"]["objectives"][objective], layouts[case]["objectives"][objective]
    assert other[0] == pytest.approx(one[0], rel=3e-6, abs=1e-6)
    gap, name = relative(other[1], one[1])
    assert gap <= 2e-5, name


@each_objective
def test_other_objectives_gradients_are_those_of_plain_torch(objective: str, layouts: Layouts) -> None:
    """With entropy bonus and KL penalty, through the dense model in float64, and denominators counted by hand."""
    statistics, gradients = layouts["one"]["objectives"][objective]
    weights = reference.load(layouts.directory / "one" / "hf")
    rollouts, advantages, noise = problem()
    counted = np.array([sample not in LEFT_OUT for sample in range(SAMPLES)])
    batch = from_samples(rollouts, advantages, LENGTH, 0, SIGNATURE, in_loss=counted)
    scores = reference.logits(weights, MODEL, batch.tokens)
    logprobs = torch.nn.functional.pad(reference.next_logprobs(scores, batch.tokens), (0, 1))
    old = logprobs.detach() + torch.from_numpy(noise)
    batch = make_training_batch(make_scored_batch(batch, old, None, old + torch.from_numpy(noise)))
    settings = OBJECTIVES[objective]
    entropy = torch.distributions.Categorical(logits=scores).entropy()
    total, _ = objectives.batch_loss(objectives.get(settings.name), settings, logprobs, batch, entropy)
    loss = total / (6 if objective == "sample_mean" else 2)
    loss.backward()
    assert statistics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    gap, name = relative(gradients, {name: tensor.grad for name, tensor in weights.items()})
    assert gap <= 1e-4, name


@each_other
def test_another_temperature_is_the_same_in_every_layout(case: str, layouts: Layouts) -> None:
    one, other = layouts["one"]["cooled"], layouts[case]["cooled"]
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(other["scores"][name], one["scores"][name], rtol=0, atol=1e-5)
    torch.testing.assert_close(other["probe"], one["probe"], rtol=0, atol=1e-5)
    assert other["first"] == pytest.approx(one["first"], rel=3e-6, abs=1e-6)
    gap, name = relative(other["gradient"], one["gradient"])
    assert gap <= 2e-5, name


def test_another_temperature_is_that_of_plain_torch(layouts: Layouts) -> None:
    """Scores and updates are of softmax(logits / 0.7), the probe of softmax(logits)."""
    one = layouts["one"]["cooled"]
    weights = reference.load(layouts.directory / "one" / "hf")
    _, advantages, noise = problem()
    batch = from_rollouts()
    there = batch.targets >= 0
    live = torch.nn.functional.pad(
        reference.next_logprobs(reference.logits(weights, MODEL, batch.tokens), batch.tokens), (0, 1)
    )
    torch.testing.assert_close((one["probe"] * there).double(), (live * there).detach(), rtol=0, atol=1e-5)
    scores = reference.logits(weights, MODEL, batch.tokens, batch.routes) / TEMPERATURE
    logprobs = torch.nn.functional.pad(reference.next_logprobs(scores, batch.tokens), (0, 1))
    entropy = torch.distributions.Categorical(logits=scores).entropy()
    torch.testing.assert_close(one["scores"]["logprobs"].double(), (logprobs * there).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(one["scores"]["entropy"].double(), (entropy * there).detach(), rtol=0, atol=1e-5)
    batch = make_training_batch(make_scored_batch(batch, logprobs.detach() + torch.from_numpy(noise)))
    total, _ = objectives.batch_loss(objectives.get("dapo"), COOLED, logprobs, batch, entropy)
    loss = total / batch.loss_mask.sum()
    loss.backward()
    assert one["first"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    gap, name = relative(one["gradient"], {name: tensor.grad for name, tensor in weights.items()})
    assert gap <= 1e-4, name


@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_a_ratio_beyond_float32_stops_every_rank_where_it_counts(case: str, layouts: Layouts) -> None:
    found = layouts[case]["overflowing"]
    assert found["flat"] == ["nothing"] * CASES[case].processes
    assert len(set(found["counts"])) == 1 and found["counts"][0].startswith("the gradient's norm is ")
    assert found["counts"][0].endswith("the run stops; continue from its last checkpoint")
    assert len(set(found["huge"])) == 1 and "with advantages up to 3e+38: rewards this large" in found["huge"][0]


def test_replayed_and_live_routing_are_different_problems(layouts: Layouts) -> None:
    gap, _ = relative(layouts["one"]["r3"]["gradient"], layouts["one"]["none"]["gradient"])
    assert gap > 0.1
    assert all(gradient.any() for gradient in layouts["one"]["r3"]["gradient"].values())


@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_every_row_that_should_be_replayed_was_counted_once(case: str, layouts: Layouts) -> None:
    routed = sum(len(sample.routes) for sample in problem()[0])
    found = layouts[case]["r3"]
    # Ranks of one tensor group share a sample's rows, ranks of a pipeline its layers; one pass scores, others update.
    assert found["routed"] == routed and found["rows"] == routed * MODEL.num_layers * (1 + UPDATES)
    assert layouts[case]["none"]["rows"] == 0


@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_each_rank_binds_the_layers_of_its_stage(case: str, layouts: Layouts) -> None:
    stages = CASES[case].parallel.pipeline
    per = MODEL.num_layers // stages
    bound = sorted(map(tuple, layouts[case]["r3"]["layers"]))
    wanted = [tuple(range(stage * per, stage * per + per)) for stage in range(stages)]
    assert bound == sorted(wanted * (CASES[case].processes // stages))


@pytest.mark.long
def test_the_dispatcher_is_the_one_asked_for(layouts: Layouts) -> None:
    assert "AlltoAll" in layouts["tp2_ep2"]["dispatcher"]
    assert "AllGather" in layouts["tp2_ep2_allgather"]["dispatcher"]


@pytest.fixture(params=[(case, precision) for case in ("one", "tp2") for precision in (torch.float32, torch.float64)])
def vocabulary(request: pytest.FixtureRequest, layouts: Layouts) -> dict[str, Any]:
    case, precision = request.param
    return layouts[case]["vocabulary"][precision]


def test_scores_over_a_split_vocabulary_are_those_of_the_softmax(vocabulary: dict[str, Any]) -> None:
    """Log-probabilities, entropy and their gradients, together and each alone, beside log_softmax in float64.

    Logits of spread 0, 1, 5 and 30, and of 30 around 1000, where float32 itself is coarse.
    """
    logits, targets = vocabulary["logits"].double().requires_grad_(), vocabulary["targets"]
    logp = (logits / 0.7).log_softmax(-1)
    there = targets >= 0
    logprobs = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * there
    entropy = -(logp.exp() * logp).sum(-1) * there
    assert there.sum() == 40 and entropy[0, 0].item() == pytest.approx(np.log(56))
    exact = vocabulary["logits"].dtype is torch.float64
    for ours, theirs in zip(vocabulary["found"], (logprobs, entropy)):
        assert ours.dtype == vocabulary["logits"].dtype and not ours[~there].any()
        _close(ours, theirs.detach(), exact)
    first, second = ((each * slope).sum() for each, slope in zip((logprobs, entropy), vocabulary["slopes"]))
    for name, total in (("logprobs", first), ("entropy", second), ("both", first + second)):
        (wanted,) = torch.autograd.grad(total, logits, retain_graph=True)
        assert not vocabulary["gradients"][name][~there].any() and wanted[there].any()
        _close(vocabulary["gradients"][name], wanted, exact)


def _close(ours: torch.Tensor, theirs: torch.Tensor, exact: bool) -> None:
    """`[5, …]`, of logits ever larger."""
    for row, tolerance in zip(range(5), [1e-12] * 5 if exact else [1e-6, 1e-6, 1e-5, 1e-5, 2e-3]):
        torch.testing.assert_close(ours[row].double(), theirs[row], rtol=tolerance, atol=tolerance)


def test_scores_do_not_depend_on_the_parts_they_are_computed_in(vocabulary: dict[str, Any]) -> None:
    assert vocabulary["same"]


def test_scores_need_memory_for_three_parts_and_for_the_gradient(vocabulary: dict[str, Any]) -> None:
    part, whole = 8 * vocabulary["width"], 45 * vocabulary["width"]
    made, most = vocabulary["forward"]
    assert set(made) == {part, 5 * vocabulary["width"]} and len(made) >= 12 and most == 3 * part
    made, most = vocabulary["backward"]
    assert sorted(set(made)) == [5 * vocabulary["width"], part, whole] and made.count(whole) == 1
    assert most == whole + 3 * part


def test_statistics_are_summed_over_the_ranks_that_contribute(layouts: Layouts) -> None:
    found = layouts["tp2"]["statistics"]
    # Weights 0 of rank 0; 0 and 1 of rank 1.
    assert found["all"] == [{"mean": pytest.approx(1 / 3), "only": 5.0, "ess": pytest.approx(1 / 3), "top": 1.0}] * 2
    assert found["one"] == [{"mean": 0.5, "only": 5.0, "ess": 0.5, "top": 1.0}] * 2
    assert found["tallies"] == [[{0: 2, 1: 1}, {0: 1, 1: 1}]] * 2
    assert found["own"] == {"mean": 0.0, "top": 0.0}


@pytest.mark.parametrize("case", tiered([name for name, case in CASES.items() if case.loads], QUICK))
def test_rates_follow_their_schedule_and_norms_do_not_decay(case: str, layouts: Layouts) -> None:
    wave = [(1 + math.cos(math.pi * part / 4)) / 2 for part in (1, 2, 3, 4)]
    wanted = {"constant": [1, 1, 1, 1], "linear": [0.75, 0.5, 0.25, 0], "cosine": wave}
    for decay, parts in wanted.items():
        rates = [LEARNING_RATE * part for part in (0.5, 1, *parts)]
        assert layouts[case]["rates"][decay] == pytest.approx(rates, abs=1e-12)
    assert layouts[case]["decays"] == {1: {0.0}, 2: {0.1}}


@each_other
def test_how_far_routers_moved_is_the_same_in_every_layout(case: str, layouts: Layouts) -> None:
    one, other = layouts["one"]["shifted"], layouts[case]["shifted"]
    assert other["still"] <= 1e-6, "nothing has moved before the first update"
    there = from_rollouts().targets >= 0
    torch.testing.assert_close(other["shift"][there], one["shift"][there], rtol=0, atol=1e-5)
    assert other["first"] == pytest.approx(one["first"], rel=3e-6, abs=2e-6)
    gap, name = relative(other["gradient"], one["gradient"])
    assert gap <= 2e-5, name


@each_other
def test_scores_with_the_rollouts_weights_of_experts_are_the_same_in_every_layout(case: str, layouts: Layouts) -> None:
    one, other = layouts["one"]["weighted"], layouts[case]["weighted"]
    there = from_rollouts().targets >= 0
    torch.testing.assert_close(other["logprobs"][there], one["logprobs"][there], rtol=0, atol=1e-5)
    assert other["count"] == one["count"] == int(from_rollouts().routed.sum()) * MODEL.num_layers * MODEL.moe_topk
    assert other["mean"] == pytest.approx(one["mean"], rel=1e-5)
    assert other["largest"] == pytest.approx(one["largest"], rel=1e-5)


def test_scores_with_the_rollouts_weights_of_experts_are_those_of_plain_torch(layouts: Layouts) -> None:
    """Through a dense model in float64, whose routers' own weights are then what the gap is measured from."""
    found, batch, seen = layouts["one"]["weighted"], from_rollouts(), []
    weights, there = reference.load(layouts.directory / "one" / "hf"), from_rollouts().targets >= 0
    given, routed = batch.route_weights.double(), batch.routed
    last = reference.hidden(weights, MODEL, batch.tokens, batch.routes, seen, given)
    scores = reference.next_logprobs(last @ weights["lm_head.weight"].T, batch.tokens).detach()
    torch.testing.assert_close(
        found["logprobs"][:, :-1][there[:, :-1]].double(), scores[there[:, :-1]], rtol=0, atol=1e-5
    )
    forced = layouts["one"]["r3"]["scores"]["logprobs"]
    assert (found["logprobs"] - forced)[there].abs().mean() > 0.01, "with the routers' own weights"
    own = [logits.gather(-1, batch.routes[:, :, i].long()).softmax(-1).detach() for i, logits in enumerate(seen)]
    gaps = (given - torch.stack(own, dim=2)).abs()[routed]
    assert found["mean"] == pytest.approx(float(gaps.mean()), rel=1e-4)
    assert found["largest"] == pytest.approx(float(gaps.max()), rel=1e-4)


@pytest.mark.parametrize(("key", "replayed"), [("shifted", True), ("shifted_live", False)])
def test_how_far_routers_moved_is_that_of_plain_torch(key: str, replayed: bool, layouts: Layouts) -> None:
    """Δ over the experts that the old weights used, and the gradient with its γ, through a dense model in float64."""
    found, seen = layouts["one"][key], ([], [])
    batch, noise = from_rollouts(), problem()[2]
    routes = batch.routes if replayed else None
    old, new = (reference.load(layouts.directory / "one" / name) for name in ("hf", "moved"))
    for weights, logits in ((old, seen[0]), (new, seen[1])):
        last = reference.hidden(weights, MODEL, batch.tokens, routes, logits)
        scores = reference.next_logprobs(last @ weights["lm_head.weight"].T, batch.tokens)
        logprobs = torch.nn.functional.pad(scores, (0, 1))
        if weights is old:
            batch = make_training_batch(make_scored_batch(batch, logprobs.detach() + torch.from_numpy(noise)))
    shift = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for layer, (before, after) in enumerate(zip(*seen)):
        ids = routes[:, :, layer].long() if replayed else before.topk(MODEL.moe_topk, dim=-1).indices
        moved = after.log_softmax(-1).gather(-1, ids) - before.log_softmax(-1).gather(-1, ids)
        shift += moved.detach().abs().mean(-1) / MODEL.num_layers
    there = batch.targets >= 0
    torch.testing.assert_close(found["shift"][there].double(), shift[there], rtol=0, atol=1e-5)
    floored = (-shift[batch.loss_mask]).exp() < SHIFTED.router_shift_min
    assert shift[batch.loss_mask].min() > 0.01 and floored.any() and not floored.all()
    batch = replace(batch, router_shift=shift)
    total, _ = objectives.batch_loss(objectives.get("gspo"), SHIFTED, logprobs, batch)
    (total / SAMPLES).backward()
    assert found["first"]["loss"] == pytest.approx(float(total.detach()) / SAMPLES, rel=1e-5)
    assert found["first"]["router_shift_mean"] == pytest.approx(float((-shift[batch.loss_mask]).exp().mean()), rel=1e-5)
    gap, name = relative(found["gradient"], {name: tensor.grad for name, tensor in new.items()})
    assert gap <= 1e-4, name


@pytest.mark.parametrize("case", tiered(CASES, QUICK))
def test_frozen_routers_keep_every_bit_and_the_rest_learns_as_before(case: str, layouts: Layouts) -> None:
    found, one = layouts[case]["frozen"], layouts["one"]["none"]["gradient"]
    routers = sorted(name for name in one if name.endswith("mlp.gate.weight"))
    assert len(routers) == MODEL.num_layers and found["same"] == routers
    assert not any(found["gradient"][name].any() for name in routers)
    rest = {name: tensor for name, tensor in one.items() if name not in routers}
    gap, name = relative({name: found["gradient"][name] for name in rest}, rest)
    assert gap <= 2e-5, name
    whole = torch.cat([tensor.flatten() for tensor in rest.values()])
    assert found["first"]["grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-5)
    if case == "one":  # neither moments nor master weights
        assert found["optimized"] == whole.numel()
