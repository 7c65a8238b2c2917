"""examples/replay_in_own_loop.py forces what the library's replay and Megatron-Core's handles do, in each layout."""

from typing import Any

import pytest
import torch
from processes import TESTS, launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[Any, Any]]:
    path = tmp_path_factory.mktemp("own_loop") / "facts"
    launch(TESTS / "routing" / "own_loop_worker.py", path)
    return {world: torch.load(path.with_name(f"facts.{world}")) for world in (1, 2)}


def require_equal(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 0.0) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=tolerance, abs=0)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for key, gradient in wanted["gradients"].items():
        gap = (found["gradients"][key] - gradient).abs().max()
        assert gap <= tolerance * gradient.abs().max(), (key, float(gap))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_it_is_the_librarys_own_replay_bit_for_bit(world: int, recompute: bool, facts: Any) -> None:
    require_equal(facts[world]["own", recompute], facts[world]["forced", recompute])


def test_it_is_a_forward_with_forced_routes(facts: Any) -> None:
    require_equal(facts[1]["own", False], facts[1]["native", False])


@pytest.mark.parametrize("recompute", [False, True])
def test_two_stages_are_one_process(recompute: bool, facts: Any) -> None:
    require_equal(facts[2]["own", recompute], facts[1]["own", False], tolerance=2e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_every_row_is_counted_and_nothing_is_left(world: int, recompute: bool, facts: Any) -> None:
    found, rows = facts[world]["own", recompute], facts[world]["plain", recompute]
    assert found["rows"] == rows > 0 and found["recomputed"] == recompute * rows and not found["held"]


def test_chunks_of_an_interleaved_schedule_read_their_own_batches(facts: Any) -> None:
    found = facts[2]["interleaved"]
    for own, forced in zip(found["own"], found["forced"]):
        assert own["losses"] == forced["losses"] and len(own["gradients"]) > 10
        assert all(torch.equal(a, b) for a, b in zip(own["gradients"], forced["gradients"]))
        assert any(gradient.abs().max() > 0 for gradient in own["gradients"])
    assert all(counted == known for counted, known in found["rows"])


def test_what_is_refused(facts: Any) -> None:
    assert facts[1]["refusals"] == {
        "without": "the router of layer 0 was run more often than the 0 micro-batches with routes",
        "narrow": "routes are torch.int64 (2, 16, 4, 1), the model needs [B, T, 4, 2]",
        "outside": "routes are installed outside a schedule: call the one that `wrap` returned",
    }


def test_it_runs_as_a_script() -> None:
    lines = [
        line.split() for line in launch(TESTS.parent / "examples" / "replay_in_own_loop.py", fresh=True).splitlines()
    ]
    counts = [line for line in lines if line[0] == "replayed"]
    assert len(counts) == 3 and counts[-1][1] == counts[-1][3] == str(3 * 3 * (15 + 8) * 4)
