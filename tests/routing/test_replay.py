"""Replay in a live Megatron-Core model, against plain torch."""

from typing import Any

import pytest
import reference
import torch
from moe import MODEL
from processes import TESTS, launch

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    path = tmp_path_factory.mktemp("replay") / "facts.pt"
    launch(TESTS / "routing" / "replay_worker.py", path)
    return torch.load(path)


def test_replaying_what_the_router_chose_changes_no_bit(facts: Facts) -> None:
    live, replayed = facts["identity"]["live"], facts["identity"]["replayed"]
    assert torch.equal(replayed["logits"], live["logits"]) and torch.equal(replayed["loss"], live["loss"])
    assert replayed["gradients"].keys() == live["gradients"].keys()
    for name, gradient in live["gradients"].items():
        assert gradient.any() and torch.equal(replayed["gradients"][name], gradient), name


def test_what_is_recorded_is_what_the_router_did(facts: Facts) -> None:
    recorded, maps = facts["identity"]["recorded"], facts["identity"]["live_maps"]
    assert sorted(recorded) == list(range(MODEL.num_layers))
    for layer, chosen in recorded.items():
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
    assert found == {"handles": 2 * MODEL.num_layers, "first are": True, "touched": [], "rows": 0}


def test_recording_and_replaying_a_first_update_changes_no_bit_of_it(facts: Facts) -> None:
    """R2 reduces staleness only, and before the first update there is none (arXiv 2512.01374)."""
    assert facts["updates"]["r2"] == facts["updates"]["none"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("a layer is missing", "RuntimeError: routing replay bound MoE layers [0, 1, 3], the model has 4"),
        ("a layer too few in the signature", "bound MoE layers [0, 1, 2, 3], the model has 5"),
        ("bypass", "RuntimeError: the router of MoE layer 2 bypassed replay in "),
        ("nothing runs", "RuntimeError: routers of MoE layers [0, 1, 2, 3] did not run"),
        ("one is skipped", "RuntimeError: routers of MoE layers [1] did not run"),
        ("twice", "RuntimeError: the router of MoE layer 0 ran twice"),
        ("recorded twice", "RuntimeError: the router of MoE layer 0 ran twice"),
        ("duplicates", "RuntimeError: the router of MoE layer 3 bypassed replay in 144 rows"),
        ("incomplete", "KeyError: 3"),
        ("interrupted", "ZeroDivisionError: in the body of replay"),
        ("interrupted recording", "ZeroDivisionError: in the body of record"),
    ],
)
def test_replay_that_did_not_happen_is_an_error_and_leaves_the_routers_free(
    fault: str, said: str, facts: Facts
) -> None:
    assert said in facts["failures"][fault]
    assert "LEFT" not in facts["failures"][fault] and "AFTERWARDS" not in facts["failures"][fault]
