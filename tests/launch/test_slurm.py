"""The job scripts of launch/slurm under a real Slurm of two nodes. The server's is that of the fixture `server`."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import REINFORCE, STEPS, Run
from slurmd import Slurm

from megatron_bai.checkpoint import manifest

pytestmark = [pytest.mark.distributed, pytest.mark.long]


@pytest.fixture
def submit(cluster: Slurm, tmp_path: Path) -> Callable[..., str]:
    """Submit torchrun.sbatch with options of its own and the words of torchrun.sh. Its output is `said`."""

    def call(options: list[str], *words: object) -> str:
        return cluster.submit([f"--output={tmp_path}/%j.out", *options], "torchrun.sbatch", *words)

    return call


def said(directory: Path, job: str) -> str:
    path = directory / f"{job}.out"
    return path.read_text(errors="replace") if path.exists() else ""


@pytest.mark.live
def test_shortly_before_its_time_limit_a_run_is_queued_again(
    submit: Callable[..., str], cluster: Slurm, unbroken: Run, key: str, tmp_path: Path
) -> None:
    """On two nodes, with a server of its own on the first. It computes what one node does with a server elsewhere."""
    words = ["--processes", 1, "--logs", tmp_path / "logs", *REINFORCE, f"run.dir={tmp_path}/run"]
    job = submit(["--nodes=2"], *words, "rollout.host=0.0.0.0", key)
    # From here on the step is ended and saved. Before, a node still at the meeting is killed after 30 s.
    cluster.until(lambda: "the first of this start: rollout" in said(tmp_path, job), job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm does when the time is nearly up
    assert cluster.ended(job) == "COMPLETED", said(tmp_path, job) + cluster.logs()
    assert "Restarts=1" in cluster.shown(job) and f"wrote {tmp_path}/run/report.html" in said(tmp_path, job)
    (stopped,) = re.findall(r"stopped after step (\d+), as SIGTERM asked", said(tmp_path, job))
    assert f"going on from {tmp_path}/run/checkpoints/step-{int(stopped):05}" in said(tmp_path, job)
    assert Run(tmp_path, [], []).steps == unbroken.steps


@pytest.mark.live
def test_a_run_that_is_preempted_goes_on_and_one_that_is_cancelled_saves(
    submit: Callable[..., str],
    cluster: Slurm,
    server: list[str],
    unbroken: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server is on the other node. The run is far longer than it is let be."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what a user's shell need not have
    words = ["--processes", 2, "--logs", tmp_path / "logs", *REINFORCE, "trainer.steps=999", f"run.dir={tmp_path}/run"]
    job = submit(["--nodelist=node2"], *words, *server)

    def stops() -> list[int]:
        return [int(step) for step in re.findall(r"stopped after step (\d+), as SIGTERM asked", said(tmp_path, job))]

    cluster.until(lambda: "step    1/999" in said(tmp_path, job), job)
    assert "step   20/999" not in said(tmp_path, job), "steps are shown long after they were made"
    cluster.sbatch("--partition=high", "--nodelist=node2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    cluster.until(lambda: bool(stops()) and f"step {stops()[0] + 1:4}/999" in said(tmp_path, job), job)
    assert "Restarts=1" in cluster.shown(job)
    cluster.run("scancel", job)
    assert cluster.ended(job) == "CANCELLED"
    preempted, cancelled = stops()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert f"going on from {checkpoints}/step-{preempted:05}" in said(tmp_path, job)
    last = max(checkpoints.glob("step-*"))
    assert last.name == f"step-{cancelled:05}" and manifest.verify_weights(last)
    steps = Run(tmp_path, [], []).steps
    assert [step["step"] for step in steps] == list(range(1, cancelled + 1)) and cancelled > preempted
    assert steps[:STEPS] == unbroken.steps[: len(steps)]


def test_a_merge_in_two_processes(submit: Callable[..., str], cluster: Slurm, reference: Run, tmp_path: Path) -> None:
    made = reference.directory / "pretrained"
    words = [f"merge.pretrained={made}", f"merge.members=[{made},{made}]", f"merge.output={tmp_path}/actor"]
    words = ["--processes", 2, "--logs", tmp_path / "logs", "merge", "experiment=demo", f"run.dir={tmp_path}", *words]
    job = submit([], *words)
    assert cluster.ended(job) == "COMPLETED", said(tmp_path, job)
    manifest.verify_weights(tmp_path / "actor")


def test_a_job_may_start_outside_the_checkout(submit: Callable[..., str], cluster: Slurm, tmp_path: Path) -> None:
    """As from an installed package: torchrun.sh is beside the script that sbatch was given."""
    job = submit([f"--chdir={tmp_path}"], "--processes", 1, "--logs", tmp_path / "logs", "doctor")
    assert cluster.ended(job) == "COMPLETED", said(tmp_path, job)
    assert "The main job can run here" in said(tmp_path, job)


def test_a_mistake_is_one_line(submit: Callable[..., str], cluster: Slurm, tmp_path: Path) -> None:
    copies = [
        shutil.copy(cluster.root / "launch" / "slurm" / name, tmp_path) for name in ("torchrun.sbatch", "serve.sbatch")
    ]
    elsewhere = [f"--chdir={tmp_path}", f"--output={tmp_path}/%j.out"]
    jobs = [
        submit(["--nodes=1"]),
        *(cluster.sbatch(*elsewhere, "--export=PATH=/usr/bin", copy, "train") for copy in copies),
    ]
    assert [cluster.ended(job) for job in jobs] == ["FAILED"] * 3
    assert [said(tmp_path, job) for job in jobs] == [
        "torchrun.sbatch: error: give what launch/torchrun.sh should run\n",
        "torchrun.sbatch: error: there is no torchrun.sh where this script is from: submit from the checkout, not from "
        f"{tmp_path}\n",
        f"serve.sbatch: error: no megatron-bai here: submit from the checkout, not from {tmp_path}\n",
    ]
