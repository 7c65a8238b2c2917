"""Every kind of router of Megatron-Core keeps its weights' formula and its gradient under replay, as in torch."""

from typing import Any

import pytest
import torch
from routing.router_cases import EXPERTS, GROUPS, KINDS, TOPK
from torch import Tensor

from megatron_bai.compat.releases import MEGATRON, megatron_release
from megatron_bai.errors import UserError
from megatron_bai.routing.replay import preflight

pytestmark = pytest.mark.distributed

Facts = dict[str, Any]
GRAPHED = megatron_release().graph_setting
each_kind = pytest.mark.parametrize("kind", KINDS)


def weights(kind: str, logits: Tensor, ids: Tensor) -> Tensor:
    """`[rows, topk]` weights of the experts `ids`, from the definitions in the configuration's names."""
    settings = KINDS[kind]
    if settings.get("moe_router_score_function") == "sigmoid":  # the bias chooses, it does not weigh
        scores = logits.sigmoid().gather(1, ids)
        found = scores / scores.sum(dim=1, keepdim=True)
    elif settings.get("moe_router_pre_softmax"):
        found = logits.softmax(dim=1).gather(1, ids)
    else:
        found = logits.gather(1, ids).softmax(dim=1)
    return found * settings.get("moe_router_topk_scaling_factor", 1.0)


@each_kind
def test_forced_weights_and_gradients_are_those_of_plain_torch(kind: str, facts: Facts) -> None:
    found = facts["routers"]["kinds"][kind]
    inputs = {name: value.double() for name, value in found["inputs"].items()}
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    logits = hidden[:, 0] @ weight.T
    probs = torch.zeros_like(logits).scatter(1, found["ids"], weights(kind, logits, found["ids"]))
    (probs * inputs["cotangent"]).sum().backward()
    forced = found["forced"]
    torch.testing.assert_close(forced["probs"].double(), probs.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(forced["weight"].double(), weight.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(forced["hidden"].double(), hidden.grad, rtol=0, atol=1e-5)
    assert torch.equal(forced["map"], torch.zeros_like(forced["map"]).scatter(1, found["ids"], True))


@each_kind
def test_no_forced_expert_has_a_zero_weight(kind: str, facts: Facts) -> None:
    """Weights gathered from scores that were zeroed outside the live top-k would be."""
    found = facts["routers"]["kinds"][kind]
    outside = ~found["live"]["map"].gather(1, found["ids"])
    assert outside.float().mean() > 0.5
    assert (found["forced"]["probs"].gather(1, found["ids"]) > 0).all()
    if "groups" in kind:  # the forced experts break the limit that the live ones obey
        spread = [len(set(row)) for row in (found["ids"] // (EXPERTS // GROUPS)).tolist()]
        assert max(spread) > 1
        live = found["live"]["map"].nonzero()[:, 1].view(-1, TOPK) // (EXPERTS // GROUPS)
        assert all(len(set(row)) == 1 for row in live.tolist())


@each_kind
def test_replaying_the_live_choice_changes_no_bit(kind: str, facts: Facts) -> None:
    found = facts["routers"]["kinds"][kind]
    assert all(torch.equal(found["replayed"][name], value) for name, value in found["live"].items())
    assert found["live"]["weight"].any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bias" in kind])
def test_the_expert_bias_moves_by_what_the_router_would_choose_without_padding(kind: str, facts: Facts) -> None:
    """Megatron counts a pass with gradients, once, and the experts that were forced; the forward without any is not."""
    found = facts["routers"]["kinds"][kind]
    wanted = found["live"]["map"][found["counted"]].sum(dim=0)
    forced = torch.bincount(found["ids"][found["counted"]].flatten(), minlength=EXPERTS)
    assert torch.equal(found["load"].long(), wanted) and not torch.equal(wanted, forced)


def test_dense_layers_shift_no_route_and_multi_token_prediction_takes_none(facts: Facts) -> None:
    sparse = facts["routers"]["sparse"]
    assert sparse["layers"] == [1, 2] and sparse["columns"] == [0, 1]
    assert len(sparse["numbers"]) == 3
    for column, layer in enumerate(sparse["layers"]):
        chosen = sparse["maps"][f"decoder.layers.{layer}.mlp.router"]
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, sparse["ids"][:, column].long(), True))
    predicting = sparse["maps"][f"mtp.layers.0.{megatron_release().mtp_layer}.mlp.router"]
    for column in sparse["columns"]:
        wanted = torch.zeros_like(predicting).scatter(1, sparse["ids"][:, column].long(), True)
        assert not torch.equal(predicting, wanted)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("dense", ["num_moe_experts"]),
        ("off", ["moe_enable_routing_replay=False"]),
        ("fusion", ["moe_router_fusion"]),
        ("sinkhorn", ["moe_router_load_balancing_type=sinkhorn"]),
        ("quantile", ["moe_router_load_balancing_type=quantile"]),
        ("capacity", ["moe_expert_capacity_factor"]),
        ("padded capacity", ["moe_expert_capacity_factor"]),
        ("random scores", ["moe_router_force_load_balancing"]),
        ("graphed layer", [GRAPHED]),
        ("graphed router", [GRAPHED]),
        ("graphed iteration", [GRAPHED]),
        ("overlap", ["overlap_moe_expert_parallel_comm"]),
        ("two at once", ["moe_router_fusion", "moe_expert_capacity_factor"]),
    ],
)
def test_what_bypasses_or_breaks_replay_is_refused_by_name(setting: str, named: list[str], facts: Facts) -> None:
    said = facts["routers"]["checks"][setting]
    assert isinstance(said, str) and all(name in said for name in named), said


def test_what_only_some_releases_have_is_refused_there(facts: Facts) -> None:
    """What the row of the installed release names, and nothing else of a later one's."""
    checks = facts["routers"]["checks"]
    names = {name for row in MEGATRON.values() for name in row.refused_settings}
    found = {name for name in names if name in checks}
    assert found == set(megatron_release().refused_settings)
    for name in found:
        assert f"{name}=0.5: {megatron_release().refused_settings[name]}" in checks[name]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("nothing", ""),
        ("graphed attention", ""),
        ("auxiliary loss of zero", ""),
        ("auxiliary loss", "moe_aux_loss_coeff"),
        ("auxiliary losses", "moe_aux_loss_coeff"),
        ("moving bias", ""),
    ],
)
def test_what_only_misleads_is_a_warning(setting: str, named: str, facts: Facts) -> None:
    said = facts["routers"]["checks"][setting]
    assert isinstance(said, list) and [warning.partition(" ")[0] for warning in said] == [named] * bool(named)


@pytest.mark.parametrize("release", MEGATRON)
def test_what_came_with_a_release_is_refused_from_it_on(release: str, facts: Facts) -> None:
    """Whichever is installed: its row alone decides."""
    said, is_later = facts["routers"]["later"][release], not release.startswith("0.16")
    assert ("moe_router_force_biased=0.5: it replaces the live logits" in said["biased"]) == is_later
    assert ("the router of layer 0 is an InferenceTopKRouter, which answers in" in said["router"]) == is_later
    assert is_later or said == {"biased": "nothing", "router": "nothing"}


def test_another_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_version()
    monkeypatch.setattr(preflight.releases, "installed_megatron", lambda: "0.15.3")
    with pytest.raises(UserError, match=r"run with megatron-core 0\.16\.0, 0\.16\.1, .*, but 0\.15\.3 is installed"):
        preflight.check_version()
