"""The studies of benchmarks/reproduce in short: two steps of a few variants each, on sums of three numbers up to 4.

What a run learns depends on its seed and on how the processor rounds, so nothing of that is asserted: docs/results.md
has it, over seeds, from the long form. Nor are two runs compared: a server's log-probabilities depend on which requests
share a batch. Here is what holds of each run whatever is learned: identities between two measurements of a rollout,
and that the settings in which variants differ took effect.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import all_succeeded
from processes import TESTS

sys.path.insert(0, str(TESTS.parent / "benchmarks" / "reproduce"))

import runner  # noqa: E402
import servers  # noqa: E402
from studies import CHECKPOINTS, GROUP, Study, all_studies  # noqa: E402

from megatron_bai.monitor.summary import read_summary  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]

SMALL = "data.max_terms=3", "data.max_number=4", "data.eval_prompts=4"
STEPS = {"pretrained": 60, "instruct": 5, "reasoning": 5}
ACROSS = "gap-global-0.01"  # its routers are as unsure after two steps as they are random
SERVED = "rollout.dtype=bfloat16", "rollout.sync_tolerance=1", "rollout.max_new_tokens=64"
JUDGED = "reward=function", "reward.function=judging:judged"  # responses of other lengths earn other rewards
DISCREPANCY = "kl_k1", "kl_k3", "f_1.5", "f_2", "f_5", "perplexity_ratio", "perplexity_ratio_max", "ess_discrepancy"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the three checkpoints."""
    directory = tmp_path_factory.mktemp("studies")
    made = directory / "checkpoints"
    common = [*SMALL, f"run.dir={made}", "supervised.length=64"]
    cases = {
        name: ["train", *CHECKPOINTS[name], *common, f"trainer.steps={steps}", f"trainer.save={made / name}"]
        for name, steps in STEPS.items()
    }
    all_succeeded(directory / "supervised", cases)
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[str]:
    """For both studies: a run gives it its own weights."""
    with servers.policy(directory / "checkpoints" / "pretrained", list(SERVED), directory / "servers") as url:
        yield url


@pytest.fixture(scope="module")
def gap(directory: Path) -> Path:
    """With the checkpoint of the study across the gap."""
    made = directory / "checkpoints"
    words = [*CHECKPOINTS[ACROSS], *SMALL, f"run.dir={made}", "supervised.length=64"]
    all_succeeded(directory / "across", {ACROSS: ["train", *words, "trainer.steps=2", f"trainer.save={made / ACROSS}"]})
    return directory


def shorten(study: Study, *words: str) -> Study:
    """Two prompts an update, short responses."""
    return replace(study, settings=(*study.settings, "rollout.max_new_tokens=16", *words), prompts=2)


def run(directory: Path, study: Study, *variants: str) -> list[dict[str, Any]]:
    """The summaries of two steps of the study's variants, seed 0, on the small task."""
    study = replace(study, settings=(*study.settings, *SMALL), evaluations=0)
    targets = {variant: runner.run_dir(directory, study.name, variant, 0) for variant in variants}
    updates = {variant: 2 * study.variants[variant].updates_per_step for variant in variants}
    cases = {
        variant: ["train", *study.overrides(variant, 0, updates[variant], target)]
        for variant, target in targets.items()
    }
    all_succeeded(directory / study.name, cases)
    for variant, target in targets.items():
        assert runner.is_done(target, 2)
        check(read_summary(target), study, variant)
    return [read_summary(target) for target in targets.values()]


def check(summary: dict[str, Any], study: Study, variant: str) -> None:
    """What holds of every variant: its own number of updates and samples, and the bounds of its metrics."""
    updates = study.variants[variant].updates_per_step
    assert summary["mini_batches"] == updates
    assert [step["weight_version"] for step in summary["steps"]] == [0, 1]
    for step in summary["steps"]:
        lengths = {int(name.split("/")[1]): n for name, n in step.items() if name.startswith("responses_by_length/")}
        assert sum(lengths.values()) == updates * study.prompts * GROUP
        pooled = sum(n * step[f"reward_by_length/{low}"] for low, n in lengths.items()) / sum(lengths.values())
        assert pooled == pytest.approx(step["reward_mean"], rel=1e-6, abs=1e-6)
        assert step["response_length_mean"] == pytest.approx(step["response_tokens"] / sum(lengths.values()))
        assert 0 < step["response_length_mean"] <= step["response_length_max"] <= 64
        assert step["kl_k3"] > 0 and 1 >= step["f_1.5"] >= step["f_2"] >= step["f_5"] >= 0
        assert 0 < step["ess_discrepancy"] <= 1
        assert ("ess" in step) == ("grad_norm" in step) and 0 < step.get("ess", 1) <= 1


def test_a_study_of_merges_starts_from_the_merge(directory: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """arXiv 2509.00309: PPO from the reasoning checkpoint alone and from BAI, with a critic that begins alone."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")  # has the reward function
    study = all_studies(directory)["bai"]
    kept = [word for word in study.settings if not word.startswith(("reward", "rollout", "objective.critic_warmup"))]
    more = *JUDGED, *SERVED, "objective.critic_warmup=1"
    study = replace(study, settings=(*kept, *more, f"rollout.urls=[{server}]"))
    alone, merged = run(directory, study, "reasoning", "bai-0.5")
    assert Path(alone["init"]) == directory / "checkpoints" / "reasoning" and "provenance" not in alone
    assert Path(merged["init"]) == directory / "merges" / "bai-0.5" == Path(merged["provenance"]).parent
    for summary in (alone, merged):
        first, second = summary["steps"]
        assert "grad_norm" not in first and first["critic_grad_norm"] > 0  # the critic's first step is its own
        assert second["grad_norm"] > 0 and second["critic_grad_norm"] > 0
        assert all(step["route_coverage"] is None for step in summary["steps"])
        assert 0 <= second["clip_fraction"] <= 1 and 0 <= second["value_clip_fraction"] <= 1


def test_variants_of_replay_differ_in_what_they_force(
    directory: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arXiv 2512.01374: eight updates a step, without replay and clip, with R2 and with R3, of fp8 weights served."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    study = all_studies(directory)["minirl"]
    kept = [word for word in study.settings if not word.startswith(("init", "model"))]
    start = "init=checkpoint", f"init.checkpoint={directory}/checkpoints/pretrained"
    study = replace(study, settings=(*kept, *start, *SERVED, *JUDGED, f"rollout.urls=[{server}]"))
    bare, recorded, replayed = (found["steps"] for found in run(directory, study, "n8-none-noclip", "n8-r2", "n8-r3"))
    for name in DISCREPANCY:  # nothing of the server's is forced in the first two: their pass is the live one
        assert all(step[f"{name}_live"] == step[name] for step in (*bare, *recorded)), name
    assert all(step["route_mismatch"] > 0 for step in (*bare, *recorded, *replayed))
    assert [step["route_coverage"] for step in (*bare, *recorded, *replayed)] == [None] * 2 + [1.0] * 4
    for step in replayed:  # where routes differ, other experts compute
        assert step["kl_k3"] != step["kl_k3_live"] > 0
    for step in bare:
        assert "clip_fraction" not in step
    for step in (*recorded, *replayed):
        parts = step["clip_fraction_positive"] + step["clip_fraction_negative"]
        assert step["clip_fraction"] == pytest.approx(parts) and 0 <= step["clip_fraction"] <= 1
    for step in (*bare, *recorded, *replayed):  # of eight updates a step seven have another policy than sampled
        assert step["grad_norm"] > 0 and step["staleness_ratio_max"] > 1


def test_the_gap_is_one_of_routes_and_of_their_weights(gap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """arXiv 2510.11370's table for routers that a load-balancing loss trained: fp8 served, nothing learned."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    study = shorten(all_studies(gap)["gap"])
    [summary] = run(gap, study, "global-0.01-fp8")
    assert Path(summary["init"]) == gap / "checkpoints" / ACROSS
    for step in summary["steps"]:
        assert step["route_coverage"] == 1 and step["tokens_route_mismatch"] >= step["route_mismatch"] > 0
        assert step["experts_effective"] <= 64
        # Where routes differ, and where their weights do, others compute: three distances of one rollout
        for name in ("kl_k3", "logprob_gap"):
            assert len({step[name], step[f"{name}_live"], step[f"{name}_weights"]}) == 3, name
            assert min(step[name], step[f"{name}_live"], step[f"{name}_weights"]) > 0
        assert 0 < step["route_weight_gap"] <= step["route_weight_gap_max"] <= 1


def test_guards_of_the_routes_are_what_they_say_across_the_gap(gap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniRL with RSPO's ratio, with routers that stay, and DPPO with R3: two updates a step, fp8 served."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    study = all_studies(gap)["gap_rl"]
    with servers.policy(gap / "checkpoints" / ACROSS, list(study.settings), gap / "servers") as url:
        study = shorten(study, *JUDGED, f"rollout.urls=[{url}]")
        found = run(gap, study, "minirl-n2-rspo", "minirl-n2-frozen", "dppo-n2-r3")
    assert [summary["objective"] for summary in found] == ["minirl", "minirl", "dppo"]
    shifted, frozen, replayed = (summary["steps"] for summary in found)
    for step in (*shifted, *frozen):  # nothing of the server's is forced: the pass is the live one
        assert step["route_coverage"] is None and all(step[f"{name}_live"] == step[name] for name in DISCREPANCY)
    for step in replayed:
        assert step["route_coverage"] == 1 and step["kl_k3"] != step["kl_k3_live"] > 0
    for step in (*shifted, *frozen, *replayed):
        assert step["route_mismatch"] > 0 and step["grad_norm"] > 0 and step["staleness_ratio_max"] > 1
        assert 0 <= step["clip_fraction"] <= 1
    for step in shifted:  # the second update's routers are others than the first's
        assert 0 < step["router_shift_mean"] < 1 and 0 <= step["router_shift_floor_fraction"] <= 1
    assert all("router_shift_mean" not in step for step in (*frozen, *replayed))
    assert all(step["divergence_mean"] >= 0 for step in replayed)  # of the trust region that DPPO masks by
