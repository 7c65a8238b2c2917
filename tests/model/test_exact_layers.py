"""With `rollout.exact` a token's log-probability is the same to the last bit, however the batch is arranged."""

from typing import Any

import pytest
import torch
from exact_worker import CASES
from processes import TESTS, launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("exact") / "found.pt"
    launch(TESTS / "model" / "exact_worker.py", file)
    return torch.load(file)


@pytest.mark.parametrize("case", [name for name in CASES if name != "whole"])
def test_no_bit_depends_on_micro_batches_packing_or_recomputation(case: str, found: dict[str, Any]) -> None:
    assert found["whole"]["logprobs"].count_nonzero() > 50
    for scores in ("logprobs", "live"):
        assert torch.equal(found[case][scores], found["whole"][scores])


def test_scores_are_those_of_the_ordinary_layers_to_rounding(found: dict[str, Any]) -> None:
    for scores in ("logprobs", "live", "entropy"):
        torch.testing.assert_close(found["whole"][scores], found["ordinary"][scores], rtol=0, atol=1e-5)
    assert not torch.equal(found["whole"]["logprobs"], found["ordinary"]["logprobs"])  # they are others


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_ordinary_layers(case: str, found: dict[str, Any]) -> None:
    expected = found["ordinary"]["gradient"]
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    assert largest > 1e-3 and found[case]["gradient"].keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[case]["gradient"][name] - tensor).abs().max() / largest
        assert difference < 2e-5, name
    assert found[case]["grad_norm"] == pytest.approx(found["ordinary"]["grad_norm"], rel=1e-4)


def test_replay_sees_every_row_of_exact_layers(found: dict[str, Any]) -> None:
    rows = found["ordinary"]["routed"]
    assert rows > 0 and all(found[case]["routed"] == rows for case in CASES)
    assert [case for case in CASES if found[case]["recomputed"]] == ["full", "moe"]
