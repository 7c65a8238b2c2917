"""SGLang and Megatron-Core compute the same numbers from the same weights, and train on each other's routes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import succeeded, torchrun
from pipeline import Demo

pytestmark = [pytest.mark.live, pytest.mark.distributed, pytest.mark.usefixtures("forked_servers")]


@pytest.fixture(scope="module")
def found(demo: Demo) -> dict[str, Any]:
    """Of one update in float32 on both sides, in two processes: TP 2 × EP 2 with sequence parallelism."""
    directory = demo.logs / "numerics"
    overrides = ["experiment=demo", f"run.dir={directory}", "init=checkpoint", f"init.checkpoint={demo.actor}"]
    changes = [
        "rollout.dtype=float32",
        "rollout.quantize=''",
        "rollout.sync_tolerance=1e-4",
        "rollout.sync=group",
        "trainer.learning_rate=3e-3",
        "replay.weights=server",
    ]
    script = Path(__file__).with_name("numerics.py")
    succeeded(torchrun(directory, 2, script, directory / "found.json", *overrides, *changes))
    return json.loads((directory / "found.json").read_text())


@pytest.mark.parametrize("rollout", ["live", "fresh"])  # of the first weights, of those after an update and a sync
def test_logprobs_and_routes_are_the_same_in_both_engines(found: dict[str, Any], rollout: str) -> None:
    seen = found[rollout]
    # Every token but each sequence's last has a route in every layer, and all were compared: each is the one that
    # Megatron's router prefers where the server's routes were used before it, but for ties, which rounding decides. One
    # that it decides otherwise changes what the tokens after it see, so how many live routes differ has no bound.
    assert seen["routes_wrong"] == 0 and seen["routes"] == seen["routes_expected"] > 1000
    assert seen["routes_tied"] < 0.01 * seen["routes"]
    assert seen["tokens"] > 100 and seen["logprobs_replayed"] <= 1e-4
    assert not seen["routes_different"] or seen["routes_tied"]
    assert seen["logprobs"] <= 1e-4 or seen["routes_different"]


@pytest.mark.parametrize("rollout", ["live", "fresh"])
def test_the_servers_weights_of_experts_are_the_trainers(found: dict[str, Any], rollout: str) -> None:
    """In float32: with the server's routes every router sees the same, to rounding."""
    seen = found[rollout]
    assert seen["weights"] == seen["routes_expected"] * 2 > 2000  # experts a token
    assert 0 < seen["weight_gap"] < 1e-5 and seen["logprobs_weighted"] <= 1e-4


def test_training_uses_exactly_the_servers_experts(found: dict[str, Any]) -> None:
    fresh, stale = found["updates"]
    for update in (fresh, stale):
        assert update["rows_replayed"] == update["rows_used"] == update["rows_expected"] > 1000
    # On the rollout's own weights the live router would choose them anyway; after an update of every weight by the rate
    # it would not.
    assert fresh["live_wrong"] == 0 < stale["live_wrong"]


def test_routers_learn_under_replay(found: dict[str, Any]) -> None:
    for update in found["updates"]:
        assert update["grad_norm"] > 0
        for rank in update["router_gradients"]:
            assert len(rank) == 4 and all(gradient > 0 for gradient in rank.values())


def test_a_sync_brings_the_new_weights_and_their_version(found: dict[str, Any]) -> None:
    assert found["version"] == "0" and found["server_version"] == "1" == str(found["trainer_version"])
    assert found["before"] <= 1e-4 and found["after"] <= 1e-4 and found["sync_gap"] <= 1e-4
    # Before the sync the server had the old weights, and the difference is a hundred times what is allowed after it.
    assert found["unsynced"] > 1e-2 and found["moved"] > 1e-2


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_replay_removes_a_part_of_the_discrepancy_of_a_quantized_server(found: dict[str, Any], form: str) -> None:
    """The direction of arXiv 2510.11370's table; benchmarks/reproduce measures how much.

    Of random weights, so that nothing learned is in it. Over twenty seeds of sampling kl_k3 was .17 of kl_k3_live with
    a standard deviation of .017 for fp8, .06 with .013 for int8: the bound is 19 and more of them away.
    """
    seen = found["quantized"][form]
    assert 1e-4 < seen["sync_gap"] < 0.5  # the server has other values, of the same model
    # What the weights make of the rest has no direction that must be: it is measured in docs/results.md.
    assert all(np.isfinite(seen[f"{name}_weights"]) for name in ("kl_k1", "kl_k3", "f_2", "logprob_gap"))
    assert seen["kl_k3_weights"] > 0 and 1e-4 < seen["route_weight_gap"] < seen["route_weight_gap_max"] < 1
    assert seen["route_mismatch"] > 0.001 and 0 < seen["kl_k3"] < 0.5 * seen["kl_k3_live"]
