"""Every preset composes and is valid, its batches divide, and a GPU has what it needs, by `plan`'s arithmetic."""

import re
from itertools import product
from pathlib import Path

import pytest

from megatron_bai import config
from megatron_bai.cli import compose, plan
from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.memory_plan import run_plan

DOCS = Path(__file__).parents[2] / "docs" / "presets.md"
CLUSTERS, UPDATES, REPLAY = ("gpus_8", "gpus_16", "gpus_32"), ("n1", "n2", "n4", "n8"), ("none", "r2", "r3")
MINIRL = "experiment=qwen3_30b_minirl"
BAI = "experiment=qwen3_30b_bai_ppo"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    config.register_schema()


def composed(*words: str) -> Config:
    return compose.compose(list(words))


def total(settings: Config) -> float:
    return sum(run_plan.gpu_bytes(settings, run_plan.validate_plan(settings)).values()) / run_plan.GB


def test_every_experiment_composes() -> None:
    names = [path.stem for path in (config.conf_dir() / "experiment").glob("*.yaml")]
    assert {"demo", "qwen3_30b_minirl", "qwen3_30b_bai_ppo"} <= set(names)
    for name in names:
        assert composed(f"experiment={name}").run.name


@pytest.mark.parametrize(("cluster", "updates"), list(product(CLUSTERS, UPDATES)))
def test_minirl_in_the_papers_settings(cluster: str, updates: str) -> None:
    """arXiv 2512.01374: mini-batches of 64 prompts × 16 responses, N = 1, 2, 4, 8; none, R2 and R3."""
    settings = composed(MINIRL, f"cluster={cluster}", f"updates={updates}")
    for settings.replay.mode in REPLAY:
        trainer, objective, processes = settings.trainer, settings.objective, run_plan.validate_plan(settings)
        assert trainer.mini_batches == int(updates[1:]) and processes == int(cluster[5:])
        assert trainer.prompts_per_step == 64 * trainer.mini_batches and trainer.group_size == 16
        assert isinstance(objective, config.Minirl)
        assert (objective.clip_low, objective.clip_high, objective.is_max) == (0.2, 0.27, 5.0)
        assert (objective.advantage, trainer.eval_samples) == ("centred", 32)
        assert total(settings) <= settings.cluster.memory_gb == 80


def test_bai_in_the_papers_settings() -> None:
    """arXiv 2509.00309: a merge, then PPO with 8 updates a step on 512 of 4096 responses, rates 1e-6, 1600 steps."""
    settings = composed(BAI)
    trainer, objective = settings.trainer, settings.objective
    assert isinstance(objective, config.Ppo) and isinstance(settings.init, config.MergeInit)
    assert (settings.merge.weights, trainer.steps, trainer.mini_batches) == ([0.5, 0.5], 1600, 8)
    assert trainer.prompts_per_step * trainer.group_size == 4096
    assert (trainer.learning_rate, objective.critic_learning_rate) == (1e-6, None)
    assert total(settings) <= 80
    for cluster in ("gpus_8", "gpus_16"):  # where two models do not fit, plan says so
        assert total(composed(BAI, f"cluster={cluster}")) > 80
        with pytest.raises(UserError, match="GB are needed of a GPU, and cluster.memory_gb is 80: .*parallel"):
            plan.run(composed(BAI, f"cluster={cluster}"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["updates=n1", "trainer.prompts_per_step=66"], r"prompts_per_step \(66\) is not a multiple of .* \(1 × 4\)"),
        (["cluster.processes=12"], r"processes \(12\) is not a multiple of parallel.expert"),
        (["parallel.tensor=8"], r"model.num_query_groups \(4\) is not a multiple of parallel.tensor \(8\)"),
        (["rollout.max_new_tokens=16000"], r"a sample may have 18048 tokens, more than .* \(16384\)"),
        (["rollout.tensor=16"], r"rollout.tensor \(16\) is more than the GPUs of the first machine \(8\)"),
        (["rollout.servers=2"], "rollout.servers is 2: on GPUs .* would all begin at the first one"),
        (["rollout.sync=group"], "NCCL takes no two ranks on one GPU"),
        (["objective=sft", "trainer.tokens_per_micro_batch=0"], "plan is for reinforcement learning"),
        (["parallel.recompute=none"], r"GB are needed of a GPU"),
    ],
)
def test_plan_refuses_by_name(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan.run(composed(MINIRL, *words))


def test_plan_prints_what_the_docs_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"```\n(model  .*?)```", DOCS.read_text(), re.S).group(1)
    monkeypatch.setenv("COLUMNS", "160")
    plan.run(composed(MINIRL))
    printed = capsys.readouterr().out
    lines, expected = ([line.split() for line in text.splitlines() if line.strip()] for text in (printed, shown))
    assert lines == expected


def test_the_docs_totals_are_plans() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|.*\| ([\d.]+) \|$", DOCS.read_text(), re.M)
    assert len(rows) == 4
    for experiment, cluster, said in rows:
        assert float(said) == pytest.approx(total(composed(f"experiment={experiment}", f"cluster={cluster}")), abs=0.05)


def test_training_on_another_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megatron_bai.rl import session

    session._validate_processes(config.Cluster(), 3)
    session._validate_processes(config.Cluster(processes=3), 3)
    with pytest.raises(UserError, match="cluster.processes is 16, and 8 were started"):
        session._validate_processes(config.Cluster(processes=16), 8)
