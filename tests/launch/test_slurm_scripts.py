"""Slurm's scripts with stand-ins for Slurm: what they start, in which environment, image and site."""

import shutil
import subprocess
from pathlib import Path

import pytest
from processes import TESTS

LAUNCH = TESTS.parent / "launch"
STUBS = {  # no controller answers, so that a job is that of the checkout it starts in
    "bin/scontrol": '[ "$2" = hostnames ] && echo node1 || { echo "Unable to contact slurm controller" >&2; exit 1; }',
    "bin/srun": 'echo "srun: $*" >&2\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
    "checkout/.venv/bin/megatron-bai": 'echo megatron-bai of the checkout: "$@"',
    "checkout/launch/torchrun.sh": 'echo torchrun.sh of the checkout: "$@", SITE=$SITE',
    "image/launch/torchrun.sh": 'echo torchrun.sh of the image: "$@"',
    "elsewhere/bin/megatron-bai": 'echo megatron-bai elsewhere: "$@"',
}
IMAGE = ["--container-image", "here.sqsh"]
SCRIPTS = ("serve.sbatch", "torchrun.sbatch")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Slurm's programs, a checkout and another environment."""
    for name, text in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "checkout/launch/slurm").mkdir()
    shutil.copy(LAUNCH / "slurm/step.sh", tmp_path / "checkout/launch/slurm/step.sh")
    return tmp_path


def run(tree: Path, script: str, *words: str, **variables: object) -> "subprocess.CompletedProcess[str]":
    """A job of one node in the checkout, as Slurm starts it: from a copy of the script."""
    copy = shutil.copy(LAUNCH / "slurm" / script, tree / "slurm_script")
    environment = {"PATH": f"{tree}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
    environment |= {"SLURM_JOB_NODELIST": "node1"} | {name: str(value) for name, value in variables.items()}
    return subprocess.run([copy, *words], env=environment, cwd=tree / "checkout", capture_output=True, text=True)


@pytest.mark.parametrize(
    "script, said",
    [
        ("serve.sbatch", "megatron-bai of the checkout: serve a=b\n"),
        ("torchrun.sbatch", "torchrun.sh of the checkout: --grace 240 a=b, SITE=\n"),
    ],
)
def test_a_controller_that_does_not_answer(script: str, said: str, tree: Path) -> None:
    done = run(tree, script, "a=b")
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert "srun: " in done.stderr and "--container" not in done.stderr


def test_an_environment_that_is_named_is_taken_or_missed(tree: Path) -> None:
    named = {"MEGATRON_BAI_VENV": tree / "elsewhere"}
    shutil.copy(LAUNCH / "torchrun.sh", tree / "checkout/launch/torchrun.sh")
    for script, words in (("serve.sbatch", ["a=b"]), ("torchrun.sbatch", ["--processes", "1", "train", "a=b"])):
        done = run(tree, script, *words, **named)
        assert done.returncode == 0 and done.stdout.startswith("megatron-bai elsewhere: "), done.stderr
        assert "a=b" in done.stdout and "--log-dir" not in done.stdout
        done = run(tree, script, *words, MEGATRON_BAI_VENV=tree / "nowhere")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"error: MEGATRON_BAI_VENV is {tree}/nowhere, and there is no bin/megatron-bai in it" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_in_an_image(script: str, tree: Path) -> None:
    checkout = f"{tree}/checkout"
    wanted = f"--container-image=here.sqsh --container-workdir={checkout} --container-mounts={checkout}:{checkout},"
    wanted += f"{checkout}/launch:{checkout}/launch,/data:/data"
    variables = {"MEGATRON_BAI_IMAGE": "overruled.sqsh", "MEGATRON_BAI_MOUNTS": "/data:/data"}
    inside = {"MEGATRON_BAI_VENV": f"{tree}/elsewhere", "MEGATRON_BAI_LAUNCH": f"{tree}/image/launch"}
    done = run(tree, script, *IMAGE, "a=b", **variables, **inside)
    command = "elsewhere/bin/megatron-bai serve a=b" if script == "serve.sbatch" else "image/launch/torchrun.sh --grace"
    assert f"{wanted} {tree}/{command}" in done.stderr
    done = run(
        tree, script, "--processes", "2", "--container-mounts", "/data:/data", *IMAGE, "verb", "--flag", "a=b", **inside
    )
    assert wanted in done.stderr and "--processes 2 verb --flag a=b" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_contradicts_a_step_is_one_line(script: str, tree: Path) -> None:
    for words, variables, says in (
        (["--container-image"], {}, "--container-image needs a value"),
        (["--container-mounts", "/data:/data", "a=b"], {}, "mounts (/data:/data) are of a container"),
        (["a=b"], {"MEGATRON_BAI_SITE": f"{tree}/none.sh"}, f"MEGATRON_BAI_SITE is {tree}/none.sh, and there is no"),
    ):
        done = run(tree, script, *words, **variables)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[1:] and done.stderr.splitlines()[1].startswith(f"{script}: error: {says}")
        assert len(done.stderr.splitlines()) == 2  # the first is scontrol's


def test_a_sites_file_reaches_what_is_started(tree: Path) -> None:
    site = tree / "checkout/launch/site.sh"
    site.write_text("unset NO_SUCH && false\nexport SITE=$UNSET-here\nexport MEGATRON_BAI_IMAGE=site.sqsh\n")
    for variables in ({}, {"MEGATRON_BAI_SITE": site}):
        done = run(tree, "torchrun.sbatch", "a=b", **variables)
        assert "--container-image=site.sqsh" in done.stderr and "SITE=-here" in done.stdout, done.stderr
    assert "--container-image=here.sqsh" in run(tree, "torchrun.sbatch", *IMAGE, "a=b").stderr


def test_the_example_of_a_site_can_be_sourced() -> None:
    """In a strict shell too; it names itself, and every variable of ours that it mentions is one that is read."""
    example = LAUNCH / "site.example.sh"
    script = f'set -euo pipefail; . "{example}"; echo "$MEGATRON_BAI_SITE"; env | grep -c ^SBATCH_'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.split() == [str(example), "5"]
    read = "".join(path.read_text() for path in LAUNCH.rglob("*") if path.is_file() and path != example)
    named = {word.split("=")[0] for word in example.read_text().split() if word.startswith("MEGATRON_BAI_")}
    assert len(named) == 5 and all(f"${{{name}" in read for name in named)
