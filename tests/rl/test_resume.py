"""A run that is killed and started again is the run that was not killed, and nothing else is ever gone on from.

Runs in another layout take the same step to the tolerances of `distributed/test_layouts.py`; seen on the CPU, of loss
and gradient norm 3e-7 relative, of moments 6e-7 of their tensor's largest, of weights 6e-8 at a rate of 1e-3.
"""

import json
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from moe import MODEL
from processes import TESTS, launch
from resume_worker import LAYOUTS, MOMENTS, STEPS
from training_states import same, tensors

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.run_log import RunLog
from megatron_bai.rl import checkpointing
from megatron_bai.rl.validate_settings import validate_settings
from megatron_bai.routing.store.route_store import RouteStore
from megatron_bai.utils.flatten import flatten

pytestmark = [pytest.mark.distributed, pytest.mark.long]
RATE = config.Trainer().learning_rate
TINY = config.Model(*[2] * 10)
Note = Callable[[str, str, str, float | None], None]  # the fixture `fault`


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    launch(TESTS / "rl" / "resume_worker.py", path)
    return path


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "found.json").read_text())


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("seconds_") and k != "tokens_per_second"} for r in records]


@pytest.mark.parametrize("how", ["killed", "background"])
@pytest.mark.parametrize("name", ["layout", "half"])
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    name: str, how: str, found: dict[str, Any], directory: Path
) -> None:
    """TP 2 · EP 2 in float32, and bfloat16 with master weights and predicted routes; saved at once or behind."""
    unbroken, killed = found[f"{name}-unbroken"], found[f"{name}-{how}"]
    assert set(killed["runs"][0]["codes"]) == {-9} and set(killed["runs"][1]["codes"]) == {0}
    assert killed["summary"]["resumed"] in ([[2]] if how == "killed" else [[1], [2]])  # or before one counted
    assert unbroken["summary"]["resumed"] == [] and killed["summary"]["complete"]
    last = f"checkpoints/step-{STEPS:05}"
    assert same(directory / f"{name}-unbroken" / last, directory / f"{name}-{how}" / last)
    files = [directory / f"{name}-{run}" / last / "route_predictors" for run in ("unbroken", how)]
    ours, theirs = (sorted((path.name, path.read_bytes()) for path in each.glob("*")) for each in files)
    assert ours == theirs and len(ours) == (MODEL.num_layers if name == "half" else 0)
    assert untimed(killed["metrics"]) == untimed(unbroken["metrics"]) == untimed(killed["summary"]["steps"])
    assert [record["step"] for record in killed["metrics"]] == list(range(1, STEPS + 1))
    assert all(record["grad_norm"] > 0 and record["kl_reference"] > 0 for record in killed["metrics"])


def _of_sampling_weights(name: str) -> bool:
    start = ("kl_k", "f_", "perplexity_ratio", "ess_discrepancy", "logprob_gap", "discrepancy", "staleness")
    return name.startswith(start) and not name.endswith("_stale")


def test_samples_of_later_steps_are_in_the_checkpoint(found: dict[str, Any], directory: Path) -> None:
    """Partial rollouts, a step ahead: a killed run goes on with what it had sampled. What it cannot say is how far the
    engines were apart in the batch that weights sampled which it has no longer."""
    unbroken, killed = found["stale-unbroken"], found["stale-killed"]
    assert killed["runs"][0]["codes"][0] == -9 and set(killed["runs"][1]["codes"]) == {0}
    assert killed["summary"]["resumed"] == [2] and unbroken["summary"]["complete"]
    last = f"checkpoints/step-{STEPS + 1:05}"
    assert same(directory / "stale-unbroken" / last, directory / "stale-killed" / last)
    one, other = untimed(unbroken["metrics"]), untimed(killed["metrics"])
    for ours, theirs in zip(one, other, strict=True):
        if ours["step"] == 3:
            assert {"kl_k3", "discrepancy", "staleness"} <= ours.keys() - theirs.keys()
            ours = {name: ours[name] for name in ours if not _of_sampling_weights(name)}
        assert ours == theirs
    assert [step["route_coverage"] for step in one] == [1.0] * (STEPS + 1) and one[0]["stale_fraction"] == 0
    assert all(0 < step["stale_fraction"] <= 1 <= step["version_age_max"] for step in one[1:])
    assert max(step["version_age_max"] for step in one) > 1, "no sample needed more than one step"
    assert all(step["kl_k3"] != step["kl_k3_stale"] for step in one[1:])
    kept = [path.name for path in (directory / "stale-unbroken/checkpoints/step-00002/rollouts").iterdir()]
    assert kept == ["replica-00000-of-00001.npz"]


@pytest.mark.parametrize("how", ["killed", "background"])
def test_the_routes_of_a_killed_run_are_kept_once(how: str, directory: Path) -> None:
    kept = []
    for name in ("unbroken", how):
        with RouteStore(directory / f"layout-{name}" / "routes") as store:
            assert not store.damage
            kept.append([(entry.step, entry.sample, store.envelope(entry)) for entry in store.entries])
    assert len(kept[0]) == STEPS * 8 and kept[0] == kept[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_in_another_layout(layout: str, found: dict[str, Any], directory: Path) -> None:
    unbroken, other = found["layout-unbroken"], found[f"on-{layout}"]
    said = other["runs"][0]["said"]
    assert set(other["runs"][0]["codes"]) == {0} and other["summary"]["resumed"] == [STEPS - 1]
    assert ("another layout: the random-number generators start anew" in said) == (layout != "tp2_ep2")
    ours, theirs = untimed(other["metrics"])[-1], untimed(unbroken["metrics"])[-1]
    for name in ("loss", "grad_norm", "kl_reference", "entropy", "kl_k3", "reward_mean"):
        assert ours[name] == pytest.approx(theirs[name], rel=3e-6), name
    last = f"checkpoints/step-{STEPS:05}"
    mine, wanted = tensors(directory / f"on-{layout}" / last), tensors(directory / "layout-unbroken" / last)
    for key in (key for key in wanted if not key.startswith("rng_state.")):
        gap = (mine[key] - wanted[key]).abs()
        if ".exp_avg" in key:
            assert gap.max() <= 2e-5 * wanted[key].abs().max(), key
        else:
            assert gap.max() <= 2 * RATE and (gap > 1e-2 * RATE).float().mean() < 0.01, key
    before = tensors(directory / "layout-unbroken" / f"checkpoints/step-{STEPS - 1:05}")
    assert any((wanted[key] - before[key]).abs().max() > 0.1 * RATE for key in wanted if key.startswith("decoder"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_saving_leaves_a_checkpoint_to_go_on_from(
    moment: str, found: dict[str, Any], directory: Path
) -> None:
    killed, plain = found[moment], found["plain"]
    assert killed["runs"][0]["codes"] == [-9] and killed["runs"][1]["codes"] == [0]
    done = moment in ("it is in its place", "the former one is being deleted")
    assert killed["between"]["whole"][-1:] == (["step-00002"] if done else ["step-00001"])
    assert killed["checkpoints"] == killed["whole"] == ["step-00002"] or done
    assert not [name for name in killed["checkpoints"] if name.startswith(".")]
    path = directory / moment.replace(" ", "-")
    assert same(path / "checkpoints/step-00002", directory / "plain/checkpoints/step-00002")
    assert untimed(killed["metrics"]) == untimed(plain["metrics"]) and killed["summary"]["complete"]


def test_the_last_checkpoints_are_kept(found: dict[str, Any]) -> None:
    assert found["plain"]["checkpoints"] == found["plain"]["whole"] == ["step-00002"]
    assert found["layout-unbroken"]["checkpoints"] == ["step-00002", "step-00003"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rate", "/rate holds a run with other settings (trainer.learning_rate was 0.001, is 0.5): set them back"),
        ("objective", "objective.name was minirl, is grpo"),
        ("fewer", "/fewer holds 2 steps of a run, more than trainer.steps=1: raise it"),
        ("newer", "/newer holds a run with other settings (trainer.extra was 3, and this release has no such setting)"),
        (
            "other sources",
            "holds a run with other samples: the content of the tokenizer has changed since: put it back",
        ),
        ("damaged weights", ".distcp is not what was written"),
        ("damaged index", "step-00002/.metadata is not what was written"),
        ("locked", "/locked is being written by another process: let it end first"),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_line_and_changes_nothing(
    name: str, said: str, found: dict[str, Any], fault: Note
) -> None:
    result = found[name]
    lines = result["runs"][0]["said"].splitlines()
    assert [line for line in lines if said in line] == lines and len(lines) == 1 and lines[0].startswith("error: ")
    if name.startswith("damaged"):
        assert "without that directory it begins again from step-00001" in lines[0]
    assert result["checkpoints"] == ["step-00001", "step-00002"] and len(result["metrics"]) == 2
    if name == "locked":
        fault("two runs in one directory", "nothing: the second is refused", f"megatron-bai: {lines[0]}", None)


def test_settings_that_the_run_did_not_have_count_as_their_defaults(found: dict[str, Any]) -> None:
    assert found["older"]["runs"][0]["codes"] == [0] and found["older"]["summary"]["resumed"] == [2]
    ours, theirs = found["older"]["metrics"][-1], found["goes on"]["metrics"][-1]
    assert ours["step"] == theirs["step"] == 3 and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-6)


def test_a_checkpoint_that_does_not_say_what_the_data_contained_is_gone_on_from(found: dict[str, Any]) -> None:
    assert found["no sources"]["runs"][0]["codes"] == [0] and found["no sources"]["summary"]["resumed"] == [2]


def test_a_finished_run_is_done_and_a_longer_one_goes_on(found: dict[str, Any]) -> None:
    assert found["finished"]["runs"][0]["said"].endswith("/finished is complete: nothing to do\n")
    assert found["finished"]["summary"]["complete"] and len(found["finished"]["metrics"]) == 2
    longer = found["goes on"]
    assert longer["summary"]["resumed"] == [2] and len(longer["metrics"]) == 3 and longer["summary"]["complete"]


def test_a_finished_run_without_checkpoints_is_neither_repeated_nor_lengthened(found: dict[str, Any]) -> None:
    first, again, longer = (result["said"] for result in found["none"]["runs"])
    assert "error" not in first and again.endswith("/none is complete: nothing to do\n")
    assert longer.startswith("error: ") and "holds a finished run of 1 steps and no checkpoint to go on from" in longer
    assert found["none"]["checkpoints"] == [] and len(found["none"]["metrics"]) == 1


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_line_and_the_former_checkpoint_is_gone_on_from(
    background: bool, found: dict[str, Any], fault: Note
) -> None:
    result = found[f"full-{background}"]
    lines = [line for line in result["runs"][0]["said"].splitlines() if not line.startswith("[rank 0] step ")]
    assert len(lines) == 1 and "checkpoints/.step-00002.unfinished cannot be written: " in lines[0]
    assert result["whole"] == ["step-00001"]
    assert "step-00001, after step 1" in result["runs"][1]["said"] and result["runs"][1]["codes"] == [0]
    assert not result["real"] or "No space left on device" in lines[0]
    lost = "steps since the last checkpoint, which is whole; the same command goes on from it"
    fault("the disk is full at a checkpoint", lost, f"megatron-bai: {lines[0]}", result["runs"][1]["seconds"])


def test_sigterm_ends_the_step_saves_and_loses_nothing(found: dict[str, Any], fault: Note) -> None:
    """It comes in the second rollout; `save_every` asks for no checkpoint before the third step."""
    asked, again = found["asked"]["runs"]
    assert asked["codes"] == [128 + signal.SIGTERM] and again["codes"] == [0]
    line = asked["said"].splitlines()[-1]
    assert line == "[rank 0] stopped after step 2, as SIGTERM asked: the same command goes on from there"
    assert found["asked"]["between"]["whole"] == ["step-00002"] and len(found["asked"]["between"]["metrics"]) == 2
    assert "step-00002, after step 2" in again["said"] and found["asked"]["summary"]["resumed"] == [2]
    assert [step["step"] for step in found["asked"]["metrics"]] == list(range(1, STEPS + 1))
    fault("SIGTERM with a grace period", "nothing: the step ends and is saved", line, again["seconds"])


def test_the_settings_a_run_writes_down_are_those_it_has(tmp_path: Path) -> None:
    """Also such as YAML spells in its own way."""
    merge = config.Merge(members=["a"], alpha_for={"b": 1.0})
    run = config.Run(dir=str(tmp_path))
    settings = config.Config(run=run, model=TINY, objective=config.Sequence(kl_penalty=1e-6), merge=merge)
    with RunLog(tmp_path, settings, 1, active=True):
        pass
    assert flatten(yaml.safe_load((tmp_path / "config.yaml").read_text())) == flatten(asdict(settings))


def test_every_setting_that_may_change_exists() -> None:
    choices = [config.Config(model=TINY), config.Config(objective=config.Ppo(), reward=config.Function(), model=TINY)]
    environment = config.UserEnvironment()
    choices.append(config.Config(init=config.MergeInit(), reward=config.RewardModel(), env=environment, model=TINY))
    names = {name for settings in choices for name in flatten(asdict(settings))}
    for free in checkpointing.MAY_CHANGE:
        assert any(name == free or free.endswith(".") and name.startswith(free) for name in names), free


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"save_every": -1}, "save_every is -1: .* at least 0"), ({"keep": 0}, "keep is 0: .* at least 1")],
)
def test_settings_of_checkpoints_are_checked(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=f"trainer.{said}"):
        validate_settings(config.Config(model=TINY, trainer=config.Trainer(**wrong)))


def test_supervised_training_has_nothing_to_go_on_from() -> None:
    settings = config.Config(model=TINY, objective=config.Sft(), trainer=config.Trainer(save_every=1))
    with pytest.raises(UserError, match="trainer.save_every is for reinforcement learning"):
        validate_settings(settings)


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_record_that_does_not_reach_the_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if damage != "gone":
        path.write_text('{"step": 1}\n' + {"cut": '{"st', "other": '{"step": 3}\n'}[damage])
    with pytest.raises(UserError, match="metrics.jsonl"):
        RunLog(tmp_path, config.Config(model=TINY), 3, active=True, after=2)


def test_an_alarm_saves_a_checkpoint_or_stops_the_run_with_one(found: dict[str, Any]) -> None:
    alarmed = [step["step"] for step in found["checkpoint"]["metrics"] if "alarms" in step]
    assert alarmed and [step["step"] for step in found["checkpoint"]["metrics"]] == [1, 2, 3]
    assert found["checkpoint"]["whole"] == [f"step-{step:05}" for step in alarmed]  # save_every is 0
    stop = found["stop"]
    assert stop["whole"] == [f"step-{alarmed[0]:05}"]
    assert [step["step"] for step in stop["metrics"]] == list(range(1, alarmed[0] + 1))
    assert f"error: stopped by an alarm at step {alarmed[0]}, which is saved: " in stop["runs"][0]["said"]
    assert stop["summary"]["complete"] is False
    again = found["stopped"]
    assert again["summary"]["complete"] is True and [m["step"] for m in again["metrics"]] == [1, 2, 3]
    # The detectors went on where they were: the same alarms as in the run that was never stopped.
    told = [[(a["detector"], a["metric"], a["evidence"]) for a in step.get("alarms", ())] for step in again["metrics"]]
    assert told == [
        [(a["detector"], a["metric"], a["evidence"]) for a in step.get("alarms", ())]
        for step in found["checkpoint"]["metrics"]
    ]
