"""Slurm's scripts where its controller does not answer: a job submitted from a checkout starts all the same."""

import shutil
import subprocess
from pathlib import Path

import pytest
from processes import TESTS

LAUNCH = TESTS.parent / "launch"
STUBS = {
    "bin/scontrol": '[ "$2" = hostnames ] && echo node1 || { echo "Unable to contact slurm controller" >&2; exit 1; }',
    "bin/srun": '[ "${1#--}" = "$1" ] || shift\nexec "$@"',
    "checkout/.venv/bin/megatron-bai": 'echo megatron-bai of the checkout: "$@"',
    "checkout/launch/torchrun.sh": 'echo torchrun.sh of the checkout: "$@"',
}


@pytest.mark.parametrize(
    "script, said",
    [
        ("serve.sbatch", "megatron-bai of the checkout: serve a=b\n"),
        ("torchrun.sbatch", "torchrun.sh of the checkout: --grace 240 a=b\n"),
    ],
)
def test_a_controller_that_does_not_answer(script: str, said: str, tmp_path: Path) -> None:
    for name, text in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    copy = shutil.copy(LAUNCH / "slurm" / script, tmp_path / "slurm_script")
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
    environment["SLURM_JOB_NODELIST"] = "node1"
    done = subprocess.run([copy, "a=b"], env=environment, cwd=tmp_path / "checkout", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, said), done.stderr
