"""`objective=ppo` through the trainer's loop, on rollouts that are given: in one process and in a virtual pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ppo_worker import LAYOUTS, STEPS, WARMUP
from processes import TESTS, launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ppo")
    launch(TESTS / "distributed" / "ppo_worker.py", directory)
    return {processes: torch.load(Path(directory) / f"{processes}.pt") for processes in LAYOUTS}


each = pytest.mark.parametrize("processes", LAYOUTS)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@each
def test_without_advantage_and_error_nothing_moves(processes: int, found: dict[int, dict[str, Any]]) -> None:
    nothing, (first, second, *_) = found[processes]["nothing"], found[processes]["weights"]
    assert nothing["grad_norm"] == nothing["critic_grad_norm"] == nothing["loss"] == nothing["value_error"] == 0
    assert "explained_variance" not in nothing  # of returns that are all equal
    for model in ("actor", "critic"):
        assert moved(first[model], second[model]) == set()


@each
def test_the_warm_up_trains_the_critic_alone(processes: int, found: dict[int, dict[str, Any]]) -> None:
    _, before, warm, after = found[processes]["weights"]
    assert moved(before["actor"], warm["actor"]) == set()
    assert moved(before["critic"], warm["critic"]) == set(before["critic"])
    assert moved(warm["actor"], after["actor"]) == set(warm["actor"])
    steps = found[processes]["steps"]
    assert ["grad_norm" in step for step in steps] == [False] * WARMUP + [True] * (STEPS - WARMUP)
    assert all(step["route_coverage"] == 1 for step in steps)  # r3: every row that a pass should have replayed


@each
def test_the_critic_learns_what_the_rewards_are(processes: int, found: dict[int, dict[str, Any]]) -> None:
    """Of responses that are given and the same at every step: rounding moves its errors by 1e-6 of themselves (and the
    next test holds them to 1e-3 between layouts), while the bounds leave a factor of three."""
    steps = found[processes]["steps"]
    assert steps[0]["explained_variance"] == pytest.approx(0, abs=1e-9) and steps[0]["value_mean"] == 0
    assert steps[-1]["value_error"] < 0.05 * steps[0]["value_error"]
    assert steps[-1]["explained_variance"] > 0.9


def test_every_step_is_the_same_in_both_layouts(found: dict[int, dict[str, Any]]) -> None:
    for one, two in zip(found[1]["steps"], found[2]["steps"]):
        names = {name for name in one if not name.startswith(("seconds", "tokens_per"))}
        assert {"value_clip_fraction", "discrepancy", "staleness"} <= names or one["step"] <= WARMUP
        ours, theirs = ({name: step[name] for name in names} for step in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
        assert {"seconds_values", "seconds_update_critic"} <= one.keys()
        assert one["critic_learning_rate"] == 1e-2 and one.get("learning_rate", 1e-4) == 1e-4


def test_checkpoints_of_actor_and_critic_are_not_taken_for_one_another(found: dict[int, dict[str, Any]]) -> None:
    faults = found[1]["faults"]
    assert faults["critic as critic"] == "nothing"
    assert faults["actor as critic"].startswith("objective.critic_checkpoint: ")
    assert "has no value_head.weight: it is the checkpoint of another kind of model" in faults["actor as critic"]
    assert "has no output_layer.weight: it is the checkpoint of another kind of model" in faults["critic as actor"]
    assert faults["nowhere"].startswith("objective.critic_checkpoint: no checkpoint at ")
