"""The job scripts of launch/slurm under a real Slurm of two nodes."""

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


def test_a_mistake_is_one_line(submit: Callable[..., str], cluster: Slurm, tmp_path: Path) -> None:
    jobs = [
        submit(["--nodes=1"], "torchrun.sbatch"),
        cluster.submit(f"--chdir={tmp_path}", f"--output={tmp_path}/%j.out", SCRIPTS / "torchrun.sbatch", "train"),
    ]
    assert [cluster.ended(job) for job in jobs] == ["FAILED", "FAILED"]
    assert said(tmp_path, jobs[0]) == "torchrun.sbatch: error: give what launch/torchrun.sh should run\n"
    assert said(tmp_path, jobs[1]) == f"torchrun.sbatch: error: submit from the checkout, not from {tmp_path}\n"
