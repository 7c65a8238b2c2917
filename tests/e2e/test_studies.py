"""The studies of benchmarks/reproduce in minutes: the same runs on sums of three numbers up to 4, fewer of them.

What is asserted is a direction that held for every seed tried, by a margin; how much it is, docs/results.md says.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from processes import TESTS

sys.path.insert(0, str(TESTS.parent / "benchmarks" / "reproduce"))

import runner  # noqa: E402
from studies import Study, all_studies  # noqa: E402

from megatron_bai.monitor.rundata import RunData, load_run  # noqa: E402

pytestmark = pytest.mark.live

SMALL = "data.max_terms=3", "data.max_number=4", "data.eval_prompts=4"
STEPS = {"pretrained": 200, "instruct": 40, "reasoning": 80}
FAST = "trainer.learning_rate=1e-3", "rollout.max_new_tokens=64"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # has the reward function
        yield tmp_path_factory.mktemp("studies")


def run(directory: Path, study: Study, updates: int, *variants: str) -> list[RunData]:
    """The study's runs on the small task, seed 0."""
    made = {
        name: (*words, *SMALL, "supervised.length=64", f"trainer.steps={STEPS[name]}")
        for name, words in study.checkpoints.items()
    }
    small = replace(study, checkpoints=made, settings=(*study.settings, *SMALL, *FAST), prompts=4, evaluations=0)
    assert runner.run_study(directory, small, [0], updates, variants) == 0
    return [load_run(runner.run_dir(directory, study.name, variant, 0), variant, "") for variant in variants]


def change(found: RunData, name: str) -> float:
    """From the mean of the first two steps to that of the last two, as a share of the former."""
    values = [value for value in found.series(name)[1] if value is not None]
    return fmean(values[-2:]) / fmean(values[:2]) - 1


def test_merging_keeps_the_length_that_the_reasoning_checkpoint_alone_loses(directory: Path) -> None:
    """arXiv 2509.00309: lengths collapse from paradigm 3, and do not from BAI."""
    study = all_studies(directory)["bai"]
    function = "reward=function", "reward.function=judging:judged"
    words = [word for word in study.settings if not word.startswith("reward")]
    study = replace(study, settings=(*words, *function), judged=False)
    alone, merged = run(directory, study, 24, "reasoning", "bai-0.5")
    assert change(alone, "response_length_mean") < -0.2
    assert change(merged, "response_length_mean") > 0.5 * change(alone, "response_length_mean")
    assert merged.series("response_length_mean")[1][0] < alone.series("response_length_mean")[1][0]


def test_replay_and_clipping_slow_a_collapse_of_many_updates_a_step(directory: Path) -> None:
    """arXiv 2512.01374: eight updates a step; 2510.11370: what replay removes of the KL."""
    study = all_studies(directory)["minirl"]
    words = [word for word in study.settings if not word.startswith(("init", "model"))]
    start = f"init.checkpoint={directory}/checkpoints/pretrained"
    made = {"pretrained": all_studies(directory)["bai"].checkpoints["pretrained"]}
    study = replace(study, checkpoints=made, served="pretrained", settings=(*words, "init=checkpoint", start))
    bare, replayed = run(directory, study, 24, "n8-none-noclip", "n8-r3")
    rewards = [each.series("reward_mean")[1] for each in (bare, replayed)]
    assert rewards[0][0] == rewards[1][0] > 0.2  # of the same rollout, right answers to learn from
    assert sum(rewards[0][1:]) < 0.6 * sum(rewards[1][1:])
    live, forced = (fmean(replayed.series(name)[1]) for name in ("kl_k3_live", "kl_k3"))
    assert forced < 0.7 * live
