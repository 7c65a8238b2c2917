"""The studies of benchmarks/reproduce in minutes: the same runs on sums of three numbers up to 4, fewer of them.

What is asserted is a direction, by a margin; how much it is, docs/results.md says.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from command import all_succeeded
from processes import TESTS

sys.path.insert(0, str(TESTS.parent / "benchmarks" / "reproduce"))

import runner  # noqa: E402
import servers  # noqa: E402
from studies import CHECKPOINTS, Study, all_studies  # noqa: E402

from megatron_bai.monitor.rundata import RunData, load_run  # noqa: E402

pytestmark = pytest.mark.live

SMALL = "data.max_terms=3", "data.max_number=4", "data.eval_prompts=4"
STEPS = {"pretrained": 200, "instruct": 30, "reasoning": 80}
SERVED = "rollout.dtype=bfloat16", "rollout.sync_tolerance=1", "rollout.max_new_tokens=64"


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


def run(directory: Path, study: Study, updates: int, *variants: str) -> list[RunData]:
    """The study's runs on the small task, seed 0, at a higher learning rate."""
    study = replace(study, settings=(*study.settings, *SMALL, "trainer.learning_rate=1e-3"), evaluations=0)
    targets = {variant: runner.run_dir(directory, study.name, variant, 0) for variant in variants}
    cases = {variant: ["train", *study.overrides(variant, 0, updates, target)] for variant, target in targets.items()}
    all_succeeded(directory / study.name, cases)
    return [load_run(target, variant, "") for variant, target in targets.items()]


def change(found: RunData, name: str) -> float:
    """From the mean of the first two steps to that of the last two, as a share of the former."""
    values = [value for value in found.series(name)[1] if value is not None]
    return fmean(values[-2:]) / fmean(values[:2]) - 1


def test_merging_keeps_the_length_that_the_reasoning_checkpoint_alone_loses(
    directory: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arXiv 2509.00309: lengths collapse from paradigm 3, and do not from BAI."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # has the reward function
    study = all_studies(directory)["bai"]
    kept = [word for word in study.settings if not word.startswith(("reward", "rollout", "objective.critic_warmup"))]
    reward = "reward=function", "reward.function=judging:judged"
    more = *reward, *SERVED, "objective.critic_warmup=1"
    study = replace(study, settings=(*kept, *more, f"rollout.urls=[{server}]"))
    alone, merged = run(directory, study, 20, "reasoning", "bai-0.5")
    assert change(alone, "response_length_mean") < -0.2
    assert change(merged, "response_length_mean") > 0.5 * change(alone, "response_length_mean")


def test_replay_and_clipping_slow_a_collapse_of_many_updates_a_step(directory: Path, server: str) -> None:
    """arXiv 2512.01374: eight updates a step; 2510.11370: what replay removes of the KL."""
    study = all_studies(directory)["minirl"]
    kept = [word for word in study.settings if not word.startswith(("init", "model"))]
    start = "init=checkpoint", f"init.checkpoint={directory}/checkpoints/pretrained"
    study = replace(study, settings=(*kept, *start, *SERVED, f"rollout.urls=[{server}]"))
    bare, replayed = run(directory, study, 16, "n8-none-noclip", "n8-r3")
    lost, held = (each.series("reward_mean")[1] for each in (bare, replayed))
    assert lost[0] == held[0] > 0.2  # of the same rollout, right answers to learn from
    assert lost[1] < 0.6 * held[1]
    live, forced = (fmean(replayed.series(name)[1]) for name in ("kl_k3_live", "kl_k3"))
    assert forced < 0.7 * live
