"""Replay in a live Megatron-Core model, against plain torch."""

from typing import Any

import pytest
import reference
import torch
from moe import MODEL
from routing.replay_worker import LENGTH

pytestmark = pytest.mark.distributed

Facts = dict[str, Any]


def test_replaying_what_the_router_chose_changes_no_bit(facts: Facts) -> None:
    live, replayed = facts["identity"]["live"], facts["identity"]["replayed"]
    assert torch.equal(replayed["logits"], live["logits"]) and torch.equal(replayed["loss"], live["loss"])
    assert replayed["gradients"].keys() == live["gradients"].keys()
    for name, gradient in live["gradients"].items():
        assert gradient.any() and torch.equal(replayed["gradients"][name], gradient), name


def test_what_is_recorded_is_what_the_router_did(facts: Facts) -> None:
    recorded, maps = facts["identity"]["recorded"], facts["identity"]["live_maps"]
    assert recorded.dtype == torch.uint8 and recorded.shape[1:] == (MODEL.num_layers, MODEL.moe_topk)
    for layer, chosen in enumerate(recorded.long().unbind(dim=1)):
        assert torch.equal(torch.zeros_like(maps[layer]).scatter(1, chosen, True), maps[layer])


def test_every_row_of_every_layer_uses_exactly_the_experts_it_was_given(facts: Facts) -> None:
    forced = facts["forced"]
    b, length = forced["tokens"].shape
    exact = 0
    for layer in range(MODEL.num_layers):
        used = forced["maps"][layer].unflatten(0, (length, b))
        for i in range(b):
            for t in range(length):
                wanted = set(forced["routes"][i, t, layer].tolist())
                exact += set(used[t, i].nonzero()[:, 0].tolist()) == wanted
    assert exact == b * length * MODEL.num_layers


def test_the_forced_experts_are_not_the_routers_own(facts: Facts) -> None:
    maps, live = facts["forced"]["maps"], facts["identity"]["live_maps"]
    other = sum(int((maps[layer] != live[layer]).any(dim=1).sum()) for layer in maps)
    assert other > 0.8 * sum(len(rows) for rows in maps.values())


def test_rows_are_counted_where_the_rollout_recorded_them(facts: Facts) -> None:
    forced = facts["forced"]
    assert 0 < forced["counted"] < forced["tokens"].numel()
    assert forced["rows"] == forced["counted"] * MODEL.num_layers


def test_outputs_and_all_gradients_are_those_of_plain_torch_with_the_same_experts(facts: Facts) -> None:
    forced = facts["forced"]
    weights = {name: tensor.double().requires_grad_() for name, tensor in forced["weights"].items()}
    logits = reference.logits(weights, MODEL, forced["tokens"], forced["routes"])
    (logits * forced["cotangent"].double()).sum().backward()
    torch.testing.assert_close(forced["logits"].double(), logits.detach(), rtol=0, atol=1e-4)
    assert forced["gradients"].keys() == weights.keys()
    for name, weight in weights.items():
        gap = (forced["gradients"][name] - weight.grad).abs().max() / weight.grad.abs().max()
        assert gap < 2e-5, (name, float(gap))


def test_router_weights_keep_their_gradient_under_replay(facts: Facts) -> None:
    gates = {name: g for name, g in facts["forced"]["gradients"].items() if name.endswith("mlp.gate.weight")}
    assert len(gates) == MODEL.num_layers
    assert all(gradient.abs().amax(dim=1).min() > 0 for gradient in gates.values())  # of every expert


def test_nothing_is_left_in_megatrons_queues(facts: Facts) -> None:
    assert facts["identity"]["held"] == [] and facts["forced"]["held"] == []


def test_routers_of_an_abandoned_model_are_not_replayed_into(facts: Facts) -> None:
    found = facts["orphans"]
    assert found == {"handles": 3 * MODEL.num_layers, "first are": True, "touched": [], "rows": 0}


def test_recording_and_replaying_a_first_update_changes_no_bit_of_it(facts: Facts) -> None:
    """R2 reduces staleness only, and before the first update there is none (arXiv 2512.01374)."""
    assert facts["updates"]["r2"] == facts["updates"]["none"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("a layer is missing", "RuntimeError: routing replay bound MoE layers [0, 1, 3], the model has [0, 1, 2, 3]"),
        ("a layer too few", "bound MoE layers [0, 1, 2, 3], the model has [0, 1, 2, 3, 4]"),
        ("two of one layer", "RuntimeError: two routers say they are layer 1"),
        ("no handle", "RuntimeError: the router of layer 1 has no replay handle"),
        ("bypass", "RuntimeError: the router of layer 2 bypassed replay in "),
        ("nothing runs", "RuntimeError: routers of layers [0, 1, 2, 3] ran for [0, 0, 0, 0] of 1 micro-batches"),
        ("nothing is recorded", "RuntimeError: routers of layers [0, 1, 2, 3] did not run"),
        ("one is skipped", "RuntimeError: routers of layers [1] ran for [0] of 1 micro-batches"),
        ("too often", "RuntimeError: the router of layer 0 was run more often than the 1 micro-batches with routes"),
        ("too seldom", "RuntimeError: routers of layers [0, 1, 2, 3] ran for [1, 1, 1, 1] of 2 micro-batches"),
        ("unevenly recorded", "RuntimeError: routers of layers [0, 2, 3] ran for [1, 1, 1] of 2 micro-batches"),
        ("nested", "RuntimeError: routing replay is already recording or forcing"),
        ("duplicates", "ValueError: micro-batch 0: a token has the same expert twice in one layer"),
        ("out of range", "ValueError: micro-batch 0: expert ids from 0 to 8, the model has 8"),
        ("negative", "ValueError: micro-batch 0: expert ids from -1 to 7, the model has 8"),
        ("not ids", "ValueError: micro-batch 0: routes are torch.float32 (144, 4, 2), this rank needs [rows, 4, 2]"),
        ("a layer less", "ValueError: micro-batch 0: routes are torch.uint8 (144, 3, 2), this rank needs [rows, 4, 2]"),
        ("other rows", "RuntimeError: the router of layer 0 sees 144 tokens, its routes are for 143"),
        ("another mask", "ValueError: micro-batch 0: `checked` is torch.bool (143,), not bool [144]"),
        ("interrupted", "ZeroDivisionError: in the body of force"),
        ("interrupted recording", "ZeroDivisionError: in the body of record"),
        ("failing layer", "ZeroDivisionError: in the middle of the model"),
        ("failing router", "ZeroDivisionError: in the middle of the model"),
    ],
)
def test_replay_that_did_not_happen_is_an_error_and_leaves_the_routers_free(
    fault: str, said: str, facts: Facts
) -> None:
    assert said in facts["failures"][fault]
    assert "LEFT" not in facts["failures"][fault] and "AFTERWARDS" not in facts["failures"][fault]


def test_recomputed_passes_replay_their_own_micro_batch(facts: Facts) -> None:
    """Two micro-batches of different size in flight at once: their gradients are those without recomputation."""
    orders = facts["orders"]
    for name, gradient in orders["plain"].items():
        assert gradient.any() and torch.equal(orders["recomputed"][name], gradient), name
    assert orders["recorded"] == [2 * LENGTH, 4 * LENGTH]  # each micro-batch once, not again when recomputed


def test_a_backward_pass_out_of_order_is_an_error(facts: Facts) -> None:
    assert "the router of layer 3 was recomputed with another micro-batch than was due" in facts["orders"]["reversed"]


def test_a_backward_pass_that_never_came_is_an_error(facts: Facts) -> None:
    assert "were recomputed for some of the 2 micro-batches only" in facts["orders"]["half"]


@pytest.mark.parametrize("way", ["plain", "recomputed"])
def test_the_router_chooses_where_there_is_no_route_and_is_forced_everywhere_else(way: str, facts: Facts) -> None:
    partial = facts["partial"]
    live, found = partial["live"], partial[way]
    free = 0
    for layer in range(MODEL.num_layers):
        wanted = torch.zeros_like(found["maps"][layer]).scatter(1, partial["wanted"][:, layer].long(), True)
        same = (found["maps"][layer] == wanted).all(dim=1)
        assert same[~live].all()
        free += int((~same[live]).sum())
    assert free > 0.5 * int(live.sum()) * MODEL.num_layers
    rows = partial["counted"] * MODEL.num_layers
    assert found["counts"] == (rows, rows if way == "recomputed" else 0) and found["held"] == []


def test_the_routers_own_weights_given_back_change_no_bit(facts: Facts) -> None:
    found = facts["weights"]
    assert torch.equal(found["own"], found["plain"]) and torch.equal(found["after"], found["plain"])
    assert found["held"] == []
    # what other rows are given has no effect, nor is it measured
    checked = found["checked"].unflatten(0, (LENGTH, -1)).T
    assert not checked.all() and torch.equal(found["elsewhere"], found["plain"])
    count = int(checked.sum()) * MODEL.num_layers * MODEL.moe_topk
    assert found["gaps"][:2] == [(0.0, count, 0.0)] * 2


def test_given_weights_are_what_experts_outputs_are_summed_with(facts: Facts) -> None:
    """The first layer's output is linear in them: that of random weights is the sum of its experts' by themselves."""
    found = facts["weights"]
    mixed, *alone = (output[found["checked"]] for output in found["outputs"])
    weights = found["mixed"][found["checked"]]
    by_hand = sum(weights[:, slot, None] * output for slot, output in enumerate(alone))
    torch.testing.assert_close(mixed, by_hand, rtol=1e-5, atol=1e-6)
    assert mixed.abs().max() > 1e-3 and min(gap[2] for gap in found["gaps"][2:]) > 0.1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gradient", "RuntimeError: weights are replaced in passes without gradient alone"),
        ("other rows", "ValueError: micro-batch 0: weights are torch.float32"),
        ("a layer less", "ValueError: micro-batch 0: weights are torch.float32"),
        ("not floats", "ValueError: micro-batch 0: weights are torch.int64"),
        ("too seldom", "RuntimeError: routers ran for [1, 1, 1, 1] of 2 micro-batches with weights"),
        ("too often", "RuntimeError: a router ran more often than the 1 micro-batches with weights"),
    ],
)
def test_weights_that_are_not_of_the_pass_are_refused(name: str, said: str, facts: Facts) -> None:
    assert facts["weights"]["said"][name].startswith(said)


def test_live_rows_are_recomputed_as_they_were_chosen(facts: Facts) -> None:
    plain, recomputed = facts["partial"]["plain"], facts["partial"]["recomputed"]
    assert torch.equal(recomputed["loss"], plain["loss"])
    assert all(torch.equal(recomputed["gradients"][name], gradient) for name, gradient in plain["gradients"].items())


def test_a_batch_without_any_route_is_a_live_one(facts: Facts) -> None:
    assert torch.equal(facts["partial"]["all_live"], facts["partial"]["free"])


def test_the_trainer_stops_at_a_missing_route_unless_told_what_to_do(facts: Facts) -> None:
    training, counts = facts["training"], facts["training"]["counts"]
    assert training["r3 strict"].startswith(
        f"{counts['missing']} of {counts['fed']} tokens of the rollouts have no route"
    )


@pytest.mark.parametrize("policy", ["mask", "live"])
def test_the_trainer_counts_and_reports_missing_routes(policy: str, facts: Facts) -> None:
    found, counts = facts["training"][f"r3 {policy}"], facts["training"]["counts"]
    assert 0 < counts["masked"] < counts["missing"]
    assert found["route_missing"] == pytest.approx(counts["missing"] / counts["fed"])
    masked = counts["masked"] if policy == "mask" else 0
    assert found["route_masked"] == pytest.approx(masked / counts["tokens"])
    assert found["route_coverage"] == 1.0 and found["grad_norm"] > 0  # of the rows that have a route


def test_the_trainers_own_routes_lack_none(facts: Facts) -> None:
    assert facts["training"]["r2 strict"]["route_coverage"] == 1.0
    assert "route_missing" not in facts["training"]["r2 strict"]
    assert facts["training"]["none strict"]["route_coverage"] is None
    losses = [facts["training"][name]["loss"] for name in ("r3 mask", "r3 live", "r2 strict")]
    assert len(set(losses)) == 3
