"""`--multirun`: every combination is a job with a directory of its own, and one that fails costs the others nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bai.cli import compose, entry_point, multirun
from megatron_bai.errors import UserError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The command lines of jobs, which are not run here; the second one fails."""
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = []

    def ended(command: list[str]) -> int:
        commands.append(command[1:])
        return 7 if len(commands) == 2 else 0

    monkeypatch.setattr(multirun, "_run_job", ended)
    return commands


def run_jobs(verb: str, *words: str) -> None:
    entry_point._dispatch([verb, *words])


def test_jobs_are_all_combinations_and_a_failure_is_named_at_the_end(
    started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"1 of 4 jobs failed: replay.mode=none,run.seed=1 \(exit code 7\)$"):
        run_jobs("train", "experiment=demo", "--multirun", "replay.mode=none,r3", "run.seed=0,1")
    name = "replay.mode=r3,run.seed=1"
    assert started[-1] == ["-m", "megatron_bai", "train", "experiment=demo", "replay.mode=r3", "run.seed=1",
                           f"run.dir='runs/demo/{name}'"]  # fmt: skip
    assert len({command[-1] for command in started}) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] replay.mode=none,run.seed=0" and lines[-1] == "3 of 4 jobs succeeded"
    settings = compose.compose(started[-1][3:])  # what a job is told is what was composed, quotes and all
    assert settings.run.dir == f"runs/demo/{name}" and settings.merge.output == f"runs/demo/{name}/actor"


def test_a_job_of_several_processes_is_started_by_torchrun(started: list[list[str]]) -> None:
    with pytest.raises(UserError, match="1 of 2"):
        run_jobs("train", "-m", "cluster.processes=2,1", "parallel.expert=1")
    assert started[0][:4] == ["-m", "megatron_bai", "torchrun", "--standalone"]
    assert started[1][:3] == ["-m", "megatron_bai", "train"]


def test_a_list_of_texts_is_said(started: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="1 of 2"):
        run_jobs("merge", "-m", "merge.output=1e5,'b,c'")
    assert capsys.readouterr().out.startswith("merge.output: 2 values; one that has a comma is quoted")
    assert [command[3] for command in started] == ["merge.output=1e5", "merge.output='b,c'"]


def test_choices_ranges_and_what_paths_cannot_hold(started: list[list[str]]) -> None:
    words = ["+data.template_options.a=choice('x/y','z')", "trainer.steps=range(1,3)"]
    names = [name for name, _ in multirun.combinations(words)]
    assert names == [f"data.template_options.a={a},trainer.steps={n}" for a in ("x_y", "z") for n in (1, 2)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--multirun", "trainer.steps=3"], "nothing to vary"),
        (["train", "--multirun", "objective=minirl,nonsense"], "objective/nonsense"),
        (["train", "--multirun", "trainer.stepz=1,2"], "trainer.stepz"),
        (["train", "--multirun", "--cfg", "trainer.steps=1,2"], "'--cfg'"),
        (
            ["train", "--multirun", "trainer.steps=1,2", "trainer.save=x"],
            "trainer.save is x in the jobs trainer.steps=1",
        ),
        (["merge", "--multirun", "merge.alpha=0.1,0.5", "merge.output=x"], "merge.output is x in the jobs merge"),
        (["train", "--multirun", "run.name=a/b,a_b", "run.dir=c"], "run.dir is c/run.name=a_b in the jobs"),
    ],
)
def test_what_cannot_be_is_refused_before_a_job_starts(words: list[str], says: str, started: list[list[str]]) -> None:
    with pytest.raises(UserError, match=says):
        run_jobs(*words)
    assert started == []


def test_torchrun_is_not_wrapped_around_a_sweep(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="leave out torchrun and set cluster.processes"):
        run_jobs("train", "--multirun", "run.seed=0,1")


@pytest.mark.live
@pytest.mark.long
def test_a_sweep_of_real_runs(tmp_path: Path) -> None:
    """The first job's layout does not fit its one process; the second trains on two and leaves a checkpoint."""
    words = ["objective=sft", "cluster.processes=1,2", "parallel.expert=2", "trainer.steps=1", "supervised.rows=2"]
    command = [sys.executable, "-m", "megatron_bai", "train", "--multirun", *words, "trainer.micro_batch_size=1"]
    done = subprocess.run(
        [*command, "trainer.save=${run.dir}/model"], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    says = [line for line in done.stderr.splitlines() if line.startswith("megatron-bai: error: ")]
    assert "number of processes (1) is not a multiple of parallel.expert" in says[0]
    assert says[1:] == ["megatron-bai: error: 1 of 2 jobs failed: cluster.processes=1 (exit code 2)"]
    assert done.stdout.splitlines()[-1] == "1 of 2 jobs succeeded"
    runs = tmp_path / "runs" / "default"
    assert not (runs / "cluster.processes=1" / "model").exists()
    assert json.loads((runs / "cluster.processes=2" / "model" / "manifest.json").read_text())
    lines = (runs / "cluster.processes=2" / "model-log" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
