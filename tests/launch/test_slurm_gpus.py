"""A Slurm that hands out GPUs and binds tasks, as a site's does: what the launcher's processes see of them."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import netnodes
import pytest
import slurmd
from processes import TESTS
from slurmd import Slurm

pytestmark = [pytest.mark.distributed, pytest.mark.long]

GPUS = 4
CPUS = max(os.cpu_count() or 1, 2)
# In place of megatron-bai: says where it is, and what it was given.
SHOW = "echo $(hostname): $CUDA_VISIBLE_DEVICES, $(env -u OMP_NUM_THREADS nproc) CPUs, $NCCL_DEBUG $SITE: $*"
# A rank that Slurm starts by itself, and how it chooses its GPU.
TASK = """
import os
from megatron_bai.distributed.devices import device_index
visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
ranks = {"LOCAL_RANK": os.environ["SLURM_LOCALID"]}
print(os.environ["SLURM_LOCALID"], *visible, "->", visible[device_index(len(visible), ranks)])
"""


def shown(directory: Path, job: str) -> str:
    return (directory / f"{job}.out").read_text(errors="replace")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of its own, which no other job is on."""
    if why := netnodes.missing() or slurmd.missing():
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("slurm")
    with netnodes.two_nodes(directory) as nodes, slurmd.slurm(directory, nodes, TESTS.parent, GPUS) as started:
        yield started


def test_the_task_of_a_node_has_all_its_gpus_and_cpus(cluster: Slurm, tmp_path: Path) -> None:
    """What a site wants comes from its file, at submission and in the job; the environment is not the checkout's."""
    venv, site = tmp_path / "venv" / "bin", tmp_path / "site.sh"
    venv.mkdir(parents=True)
    for name, text in (("megatron-bai", SHOW), ("python", f'exec {sys.executable} "$@"')):
        (venv / name).write_text(f"#!/bin/bash\n{text}\n")
        (venv / name).chmod(0o755)
    example = (cluster.root / "launch" / "site.example.sh").read_text()
    site.write_text(
        re.sub("SBATCH_ACCOUNT=.*|SBATCH_TIMELIMIT=.*", "NCCL_DEBUG=INFO", example)
        .replace("SBATCH_PARTITION=gpu", "SBATCH_PARTITION=high")
        .replace("SBATCH_GRES=gpu:8", f"SBATCH_GRES=gpu:{GPUS}")
        + f"export MEGATRON_BAI_VENV={venv.parent}\nSITE=$SITE+ # once more each time\nexport SITE\n"
    )
    script = f'. {site} && sbatch --parsable --nodes=2 --chdir={tmp_path} --output=%j.out "$@"'
    words = [cluster.root / "launch" / "slurm" / "torchrun.sbatch", "--processes", 2, "train", "a=b"]
    job = cluster.run("bash", "-c", script, "submit", *words).strip()
    assert cluster.ended(job) == "COMPLETED", shown(tmp_path, job) + cluster.logs()
    assert "Partition=high" in cluster.shown(job)
    gpus = ",".join(map(str, range(GPUS)))
    lines = sorted(shown(tmp_path, job).splitlines())
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"node{number}: {gpus}, {CPUS} CPUs, INFO ++: torchrun --rdzv-backend c10d"), lines
        assert line.endswith("--nproc-per-node 2 --max-restarts 0 --shutdown-timeout 250 --redirects 3 --tee 0:3 train "
                             "a=b trainer.grace_s=240")  # fmt: skip
    assert len(lines) == 2


def test_a_task_that_sees_one_gpu_takes_it(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    task = f"PYTHONPATH={TESTS.parent} srun {sys.executable} task.py"
    for options, chosen in (
        (["--gpus-per-task=1"], ["0 0 -> 0", "1 1 -> 1"]),
        (["--gres=gpu:2"], ["0 0 1 -> 0", "1 0 1 -> 1"]),
    ):
        job = cluster.sbatch("--ntasks-per-node=2", *options, f"--chdir={tmp_path}", "--output=%j.out", "--wrap", task)
        assert cluster.ended(job) == "COMPLETED", shown(tmp_path, job) + cluster.logs()
        assert sorted(shown(tmp_path, job).splitlines()) == chosen
