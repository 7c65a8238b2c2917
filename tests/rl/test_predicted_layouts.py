"""Predictors of routes in the live model: every layout learns the same, from what the routers did, and predicts.

Tolerances, with the largest difference seen in brackets: log-probabilities 1e-5 nats [1.0e-6], metrics 1e-4 relative
[8e-7], predictors 1e-4 of a layer's largest element [1.5e-5]; against autograd in float64 1e-4 of it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe import MODEL
from prediction_worker import CASES, DRIFTS, ROUNDS, SCALE
from processes import TESTS, launch

pytestmark = [pytest.mark.distributed, pytest.mark.long]
each_case = pytest.mark.parametrize("case", CASES)
each_other = pytest.mark.parametrize("case", [name for name in CASES if name != "one"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prediction")
    launch(TESTS / "rl" / "prediction_worker.py", path)
    return path


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, Any]:
    return {path.stem: torch.load(path) for path in directory.glob("*.pt")}


def test_predictors_of_0_change_no_bit_of_r2(found: dict[str, Any]) -> None:
    assert found["one"]["zero"] == {"same": True}


@each_other
def test_every_layout_learns_the_same(case: str, found: dict[str, Any]) -> None:
    one, other = found["one"], found[case]
    for step in range(ROUNDS):
        torch.testing.assert_close(other["scores"][step], one["scores"][step], rtol=0, atol=1e-5)
        assert other["metrics"][step] == pytest.approx(one["metrics"][step], rel=1e-4, abs=1e-6)
        ours, theirs = other["weights"][step], one["weights"][step]
        assert ours.keys() == theirs.keys() and len(theirs) == MODEL.num_layers
        for layer, (weight,) in theirs.items():
            assert (ours[layer][0] - weight).abs().max() <= 1e-4 * weight.abs().max(), (step, layer)
    changed = [metrics["predict_changed_fraction"] for metrics in one["metrics"]]
    assert changed[0] == 0 and min(changed[1:]) > 0.02


@each_case
def test_all_ranks_of_a_layer_hold_the_same_bits(case: str, found: dict[str, Any]) -> None:
    copies = CASES[case].processes // CASES[case].parallel.pipeline
    for weights in found[case]["weights"]:
        for copy in weights.values():
            assert len(copy) == copies and all(torch.equal(copy[0], other) for other in copy) and copy[0].any()


@each_case
def test_saved_predictors_go_on_with_the_same_bits_and_in_any_layout(case: str, found: dict[str, Any]) -> None:
    assert all(found[case]["resumed"])
    for layer, (weight,) in found["one"]["weights"][-1].items():
        assert all(torch.equal(copy, weight) for copy in found[case]["from one"][layer])


def test_it_learns_from_what_the_routers_saw_and_did(found: dict[str, Any]) -> None:
    """Inputs and logits of the recorded pass and logits of the update, from hooks, in float64 by autograd."""
    wiring = found["one"]["wiring"]
    losses, correct, kept = [], [], wiring["kept"]
    assert 0 < kept.sum() < len(kept)
    for layer, ((hidden, before), (_, now)) in wiring["seen"].items():
        hidden, before, now = hidden[kept], before[kept], now[kept]
        weight = torch.zeros(MODEL.num_experts, MODEL.hidden_size, dtype=torch.float64, requires_grad=True)
        predicted = (before + hidden @ weight.T).softmax(dim=-1)
        current = now.softmax(dim=-1)
        loss = (current * (current / predicted).log()).sum(dim=-1).mean()
        loss.backward()
        gap = (wiring["weights"][layer].double() / -SCALE - weight.grad).abs().max() / weight.grad.abs().max()
        assert gap < 1e-4, (layer, float(gap))
        losses.append(float(loss.detach()))
        own, later = (values.topk(MODEL.moe_topk).indices.sort().values for values in (before, now))
        correct.append(float((own == later).all(dim=-1).double().mean()))
    metrics, mean = wiring["metrics"], sum(correct) / len(correct)
    assert metrics["predict_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["predict_correct_fraction_r2"] == metrics["predict_correct_fraction"] == pytest.approx(mean)
    assert metrics["predict_changed_fraction"] == 0 and mean < 1


def test_a_steady_drift_of_the_routers_is_predicted(found: dict[str, Any]) -> None:
    """Where W moves by the same D each step, the predictor that learned D gives the later route."""
    first, later = found["one"]["drift"][0], found["one"]["drift"][DRIFTS // 2 :]
    mean = {name: sum(step[name] for step in later) / len(later) for name in first}
    assert first["predict_correct_fraction"] == first["predict_correct_fraction_r2"] < 1
    assert mean["predict_correct_fraction"] > mean["predict_correct_fraction_r2"] < 1
    assert mean["predict_loss"] < 0.5 * first["predict_loss"] and mean["predict_changed_fraction"] > 0


def test_the_loop_is_that_of_r2_until_predictors_have_learned(found: dict[str, Any]) -> None:
    r2, predicted = found["loop-False"], found["loop-True"]
    names = [name for name in r2["steps"][0] if not name.startswith("seconds_") and name != "tokens_per_second"]
    first, second, third = predicted["steps"]
    assert [first[name] for name in names] == [r2["steps"][0][name] for name in names]
    assert all(torch.equal(first, r2["weights"][0][name]) for name, first in predicted["weights"][0].items())
    assert not all(torch.equal(last, r2["weights"][2][name]) for name, last in predicted["weights"][2].items())
    added = {"predict_loss", "predict_changed_fraction", "predict_correct_fraction", "predict_correct_fraction_r2"}
    assert first.keys() - r2["steps"][0].keys() == added
    assert first["predict_changed_fraction"] == 0 < min(second["predict_changed_fraction"], third["predict_loss"])
    assert [step["route_coverage"] for step in predicted["steps"]] == [1.0] * 3
    assert set(predicted["stateful"]) - set(r2["stateful"]) == {"route_prediction"}
