"""Patches that compute what upstream does in another way, beside upstream on random inputs (`upstream_worker.py`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOLERANCE = {"torch.float32": 1e-6, "torch.bfloat16": 8e-3}  # of values about 1

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("upstream_worker.py")], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_attention_of_a_batch_is_that_of_its_sequences(cases: list[dict[str, Any]]) -> None:
    """Decoding, whole prompts and parts of prompts, 1 to 300 tokens, all kinds of grouped queries; what other sequences
    left in the cache is NaN and must not matter."""
    found = [case for case in cases if case["what"] == "attention"]
    assert {case["case"] for case in found} == {"decode", "prefill", "chunk"} and len(found) == 18
    assert not [case for case in found if not case["error"] < TOLERANCE[case["dtype"]]]


def test_grouped_experts_are_the_loop_over_experts(cases: list[dict[str, Any]]) -> None:
    """One token and many, experts without tokens among them; rows that grouped_mm refuses are upstream's."""
    found = [case for case in cases if case["what"] == "experts"]
    assert [case["upstream"] for case in found] == [0, 0, 1] * 3
    assert not [case for case in found if not case["error"] < TOLERANCE[case["dtype"]]]


def test_norms_and_rotations_are_those_of_many_operators(cases: list[dict[str, Any]]) -> None:
    """With and without a residual, part of a head rotated or all of it, both ways to pair its elements."""
    found = [case for case in cases if case["what"] in ("norms", "rotation")]
    assert len(found) == 9
    assert not [case for case in found if not case["error"] < TOLERANCE[case["dtype"]] * 10]  # of values up to 10


def test_gates_and_full_width_norms_are_those_of_float64(cases: list[dict[str, Any]]) -> None:
    found = [case for case in cases if case["what"] == "kernels"]
    assert len(found) == 2
    assert not [case for case in found if not case["error"] < TOLERANCE[case["dtype"]] * 10]  # of values up to 10


def test_routers_get_their_layer_and_models_have_the_fixes(cases: list[dict[str, Any]]) -> None:
    known = {case["what"]: case["found"] for case in cases if "found" in case}
    assert {name: known[name] for name in ("layers", "replaced")} == {"layers": [0, 7, 2], "replaced": True}


def test_routes_and_their_weights_go_through_sglangs_own_capturer(cases: list[dict[str, Any]]) -> None:
    """Its rows are as wide again; ids as they were, weights with the factor, to the bit; other layers are untouched."""
    (found,) = (case["found"] for case in cases if case["what"] == "weights")
    assert found == [[5, 3, 4], True, True, False]
