"""R2 and R3 give the loss and the gradient of one process in every layout, whatever is recomputed.

Tolerances in fp32, with the largest difference seen in brackets: loss 3e-6 relative [2.0e-7]; log-probabilities 1e-5
nats [1.2e-6]; every gradient tensor 2e-5 of its largest element [1.7e-6].
"""

from typing import Any

import pytest
import torch
from moe import MODEL
from processes import TESTS, launch
from routing.layouts_worker import LAYOUTS, QUICK, REFERENCE, SAMPLES, Name, runs
from tiers import tiered, wants_long

from megatron_bai.routing.layout import stage_layers

pytestmark = pytest.mark.distributed
Facts = dict[Name | str, dict[str, Any]]
ALL = [name for layout in LAYOUTS for name in runs(layout)]
NOW = [name for name in ALL if name[0] in QUICK]
FORCED = [name for name in ALL if name[4] != "none"]


@pytest.fixture(scope="module")
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    path = tmp_path_factory.mktemp("layouts") / "facts"
    launch(TESTS / "routing" / "layouts_worker.py", path, *(() if wants_long(request.session, "facts") else QUICK))
    found: Facts = {}
    for part in sorted(path.parent.glob("facts.*")):
        found |= torch.load(part)
    return found


def identify(name: Name) -> str:
    return "-".join(map(str, name))


@pytest.mark.parametrize("name", tiered(ALL, NOW), ids=identify)
def test_loss_scores_and_gradients_are_those_of_one_process(name: Name, facts: Facts) -> None:
    found, one = facts[name], facts[REFERENCE[name[4]]]
    assert found["loss"] == pytest.approx(one["loss"], rel=3e-6)
    torch.testing.assert_close(found["logprobs"], one["logprobs"], rtol=0, atol=1e-5)
    assert found["gradient"].keys() == one["gradient"].keys()
    for key, gradient in one["gradient"].items():
        gap = (found["gradient"][key] - gradient).abs().max() / gradient.abs().max()
        assert gap <= 2e-5, (key, float(gap))


@pytest.mark.parametrize("name", tiered(FORCED, NOW), ids=identify)
def test_every_row_is_forced_once_and_recomputed_once_and_nothing_is_left(name: Name, facts: Facts) -> None:
    _, recompute, _, _, mode = name
    found, rows = facts[name], facts[name]["real"] * MODEL.num_layers
    assert found["real"] == facts[REFERENCE[mode]]["real"] > SAMPLES
    assert found["rows"] == rows and found["scored"] == (rows if mode == "r3" else 0)
    assert found["recomputed"] == (rows if recompute in ("full", "moe") else 0)
    assert found["held"] == []


@pytest.mark.parametrize("layout", tiered(LAYOUTS, QUICK))
def test_each_rank_binds_the_layers_of_its_chunks(layout: str, facts: Facts) -> None:
    chosen = LAYOUTS[layout]
    stages, chunks = chosen.sizes.get("pipeline", 1), chosen.sizes.get("virtual_pipeline", 1)
    wanted = [stage_layers(MODEL.num_layers, stage, stages, chunks) for stage in range(stages)]
    assert sorted(facts[layout]["bound"]) == sorted(wanted * (chosen.processes // stages))


@pytest.mark.parametrize("layout", tiered(LAYOUTS, QUICK))
def test_each_rank_receives_its_replicas_samples_with_the_routes_of_its_own_layers(layout: str, facts: Facts) -> None:
    chosen, found = LAYOUTS[layout], facts[layout]
    assert found["right"] == [True] * chosen.processes
    assert found["layers"] == [{MODEL.num_layers // chosen.sizes.get("pipeline", 1)}] * chosen.processes


def test_the_three_modes_are_different_problems(facts: Facts) -> None:
    gradients = [facts[REFERENCE[mode]]["gradient"] for mode in ("none", "r2", "r3")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        gaps = [(gradients[a][key] - gradients[b][key]).abs().max() / g.abs().max() for key, g in gradients[a].items()]
        assert max(gaps) > 0.1


@pytest.mark.parametrize("mode", ["r2", "r3"])
def test_recomputing_changes_no_bit_on_one_process(mode: str, facts: Facts) -> None:
    plain = facts["one", "none", "alltoall", 4, mode]
    for recompute in ("full", "selective"):
        again = facts["one", recompute, "alltoall", 4, mode]
        assert again["loss"] == plain["loss"]
        assert all(torch.equal(again["gradient"][key], gradient) for key, gradient in plain["gradient"].items())
