"""The job scripts of launch/slurm under a real Slurm of two nodes."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurmd
from launching import TORCHRUN, TRAIN, Run
from netnodes import Node
from slurmd import Slurm

from megatron_bai.model import manifest

pytestmark = pytest.mark.distributed

SCRIPTS = TORCHRUN.parent / "slurm"
ROOT = TORCHRUN.parents[1]


@pytest.fixture(scope="module")
def cluster(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if why := slurmd.missing():
        pytest.skip(why)
    with slurmd.slurm(tmp_path_factory.mktemp("slurm"), nodes) as started:
        yield started


@pytest.fixture
def submit(cluster: Slurm, tmp_path: Path) -> Callable[..., str]:
    """Submit a script from the checkout; gives the job's number. Its output is `said`."""

    def call(options: list[str], script: str, *words: object) -> str:
        return cluster.submit(f"--chdir={ROOT}", f"--output={tmp_path}/%j.out", *options, SCRIPTS / script, *words)

    return call


def said(directory: Path, job: str) -> str:
    path = directory / f"{job}.out"
    return path.read_text(errors="replace") if path.exists() else ""


def test_shortly_before_its_time_limit_a_run_is_queued_again(
    submit: Callable[..., str], cluster: Slurm, reference: Run, tmp_path: Path
) -> None:
    """On two nodes. Supervised training begins again, and computes what one node does."""
    words = ["--processes", 1, "--logs", tmp_path / "logs", *TRAIN, f"run.dir={tmp_path}"]
    job = submit(["--nodes=2"], "torchrun.sbatch", *words)
    cluster.until(lambda: (tmp_path / "logs").is_dir(), job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm does when the time is nearly up
    assert cluster.ended(job) == "COMPLETED", said(tmp_path, job)
    assert "Restarts=1" in cluster.shown(job) and f"saved {tmp_path}" in said(tmp_path, job)
    assert Run(tmp_path, []).steps == reference.steps


def test_a_merge_in_two_processes(submit: Callable[..., str], cluster: Slurm, reference: Run, tmp_path: Path) -> None:
    made = reference.directory / "pretrained"
    words = [f"merge.pretrained={made}", f"merge.members=[{made},{made}]", f"merge.output={tmp_path}/actor"]
    words = ["--processes", 2, "--logs", tmp_path / "logs", "merge", "experiment=demo", f"run.dir={tmp_path}", *words]
    job = submit([], "torchrun.sbatch", *words)
    assert cluster.ended(job) == "COMPLETED", said(tmp_path, job)
    manifest.verify(tmp_path / "actor")


@pytest.mark.live
def test_a_run_that_is_preempted_saves_and_goes_on(submit: Callable[..., str], cluster: Slurm, tmp_path: Path) -> None:
    """Reinforcement learning on two nodes, with the server on one of them."""
    settings = ["trainer.steps=6", "trainer.prompts_per_step=2", "trainer.group_size=2", "trainer.mini_batches=1"]
    settings += ["trainer.micro_batch_size=4", "trainer.eval_every=0", "rollout.max_new_tokens=8", "init=random"]
    settings += ["rollout.start_timeout_s=600"]
    words = ["--processes", 1, "--logs", tmp_path / "logs", "train", "experiment=demo", *settings]
    job = submit(["--nodes=2"], "torchrun.sbatch", *words, "rollout.host=0.0.0.0", f"run.dir={tmp_path}/run")
    cluster.until(lambda: "step    1/6" in said(tmp_path, job), job)
    cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    assert cluster.ended(job) == "COMPLETED", said(tmp_path, job)
    text, summary = said(tmp_path, job), json.loads((tmp_path / "run" / "summary.json").read_text())
    (stopped,) = re.findall(r"stopped after step (\d), as SIGTERM asked", text)
    assert "Restarts=1" in cluster.shown(job) and f"going on from {tmp_path}/run/checkpoints/step-0000{stopped}" in text
    assert summary["complete"] and summary["resumed"] == [int(stopped)]
    assert [step["step"] for step in summary["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [step["weight_version"] for step in summary["steps"]] == [0, 1, 2, 3, 4, 5]


def test_a_mistake_is_one_line(submit: Callable[..., str], cluster: Slurm, tmp_path: Path) -> None:
    jobs = [
        submit(["--nodes=1"], "torchrun.sbatch"),
        cluster.submit(f"--chdir={tmp_path}", f"--output={tmp_path}/%j.out", SCRIPTS / "torchrun.sbatch", "train"),
    ]
    assert [cluster.ended(job) for job in jobs] == ["FAILED", "FAILED"]
    assert said(tmp_path, jobs[0]) == "torchrun.sbatch: error: give what launch/torchrun.sh should run\n"
    assert said(tmp_path, jobs[1]) == f"torchrun.sbatch: error: submit from the checkout, not from {tmp_path}\n"
