"""A wheel of the package, installed beside the dependencies and used where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from megatron_bai import __version__
from megatron_bai.cli.verbs import VERBS

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# What `plan` says of experiments that it is not for.
REFUSED = {
    "demo_pretrained": "plan is for reinforcement learning",
    "demo_instruct": "plan is for reinforcement learning",
    "demo_reasoning": "plan is for reinforcement learning",
    "demo": "no checkpoint at",  # nothing was merged here
    "gap_pretrained": "plan is for reinforcement learning",
    "gap": "no checkpoint at",  # nothing was trained here
    "tools_pretrained": "plan is for reinforcement learning",
    "tools": "no checkpoint at",
    "qwen3_30b": "choose init=checkpoint or init=merge",  # what the two others are made from
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def pinned(*locks: str) -> dict[str, str]:
    """Return the releases that files in `requirements/` name, by distribution."""
    lines = [line for lock in locks for line in (ROOT / "requirements" / lock).read_text().split()]
    return {canonicalize_name(name): release for name, release in (line.split("==") for line in lines)}


def dependencies(place: Path) -> Path:
    """Link what is installed after the README's first command: nothing of test.lock, and not this package."""
    extra = {*pinned("test.lock"), "megatron-bai"}
    hidden = {
        name for name, owners in packages_distributions().items() if extra.issuperset(map(canonicalize_name, owners))
    }
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        of = canonicalize_name(path.name.partition("-")[0]) if path.suffix == ".dist-info" else ""
        if of not in extra and path.stem not in hidden and "__editable__" not in path.name:
            (place / path.name).symlink_to(path)
    return place


def source(place: Path) -> Path:
    """Copy what a package is built from."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("megatron_bai", "conf", "launch"):
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    return place


def built(tree: Path, place: Path) -> Path:
    """Build the wheel of a source tree."""
    command = [*PIP, "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", place, tree]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = place.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tree, tmp_path_factory.mktemp("wheel"))


@dataclass(frozen=True)
class Installation:
    """The package in a `site-packages` of its own, with an unrelated `conf/` and `pyproject.toml` beside it."""

    prefix: Path
    site: Path
    environment: dict[str, str]
    results: dict[tuple[str, ...], dict[str, str | int]]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Install the wheel and call everything that the tests look at, in one process and an empty directory."""
    prefix = tmp_path_factory.mktemp("prefix")
    site = prefix / "lib" / "python3" / "site-packages"
    subprocess.run(
        [*PIP, "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel], check=True, timeout=300
    )
    (site / "conf" / "experiment").mkdir(parents=True)
    (site / "conf" / "config.yaml").write_text("another: project's\n")
    (site / "pyproject.toml").write_text('[project]\nname = "other"\n')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    environment["PYTHONPATH"] = f"{site}:{dependencies(tmp_path_factory.mktemp('dependencies'))}"
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    empty = tmp_path_factory.mktemp("empty")
    lines = [[], *([verb, "--help"] for verb in VERBS), ["doctor"], merge(tmp_path_factory.mktemp("merge"))]
    lines += [["plan", f"experiment={name}"] for name in EXPERIMENTS]
    # -S: without the .pth of an editable installation; -P: without the directory of the script.
    done = subprocess.run(
        [sys.executable, "-S", "-P", Path(__file__).with_name("wheel_worker.py"), site],
        input=json.dumps(lines), capture_output=True, text=True, timeout=600, cwd=empty, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not any(empty.iterdir()), "a verb wrote into the directory that it was called in"
    results = {tuple(words): result for words, result in zip(lines, json.loads(done.stdout), strict=True)}
    return Installation(prefix, site, environment, results)


def merge(place: Path) -> list[str]:
    """Write three checkpoints of one tiny tensor each. Returns the command line that merges them."""
    for value, name in enumerate(("pretrained", "instruct", "reasoning")):
        (place / name).mkdir()
        save_file({"model.norm.weight": torch.full((4,), float(value))}, place / name / "model.safetensors")
        (place / name / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return ["merge", "experiment=demo", f"run.dir={place}"]


def test_every_module_and_every_data_file_is_in_the_wheel(tree: Path, wheel: Path) -> None:
    wanted = {
        f"megatron_bai/{path.relative_to(tree / 'megatron_bai')}" for path in (tree / "megatron_bai").rglob("*.py")
    }
    wanted |= {f"megatron_bai/{path.relative_to(tree)}" for path in (tree / "conf").rglob("*.yaml")}
    wanted |= {f"megatron_bai/{path.relative_to(tree)}" for path in (tree / "launch").rglob("*") if path.is_file()}
    assert {name for name in files(wheel) if ".dist-info/" not in name} == wanted | {"megatron_bai/py.typed"}


def test_a_source_distribution_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    script = "import sys, setuptools.build_meta; setuptools.build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=tree, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    again = built(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert again.name == wheel.name and files(again) == files(wheel)


def files(wheel: Path) -> dict[str, int]:
    """Return the check sums of a wheel's files, but for the record of them."""
    with zipfile.ZipFile(wheel) as opened:
        return {each.filename: each.CRC for each in opened.infolist() if not each.filename.endswith("/RECORD")}


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(opened.read(name).decode())
    assert (about["Name"], about["Version"], about["Requires-Python"]) == ("megatron-bai", __version__, ">=3.11")
    requirements = [Requirement(line) for line in about.get_all("Requires-Dist")]
    locked = pinned("cpu.lock", "test.lock") | {"torch": torch.__version__.partition("+")[0]}
    for requirement in requirements:
        pin = locked.get(canonicalize_name(requirement.name))
        assert requirement.extras or not pin or requirement.specifier.contains(pin), (
            f"{requirement} and the lock's {pin}"
        )
        assert pin or requirement.marker, f"{requirement} is not in the lock"


def test_the_command_says_where_experiments_and_scripts_are(installed: Installation) -> None:
    found = installed.results[()]
    assert (found["code"], found["err"]) == (0, "")
    assert str(installed.site / "megatron_bai" / "conf" / "experiment") in found["out"]
    assert str(installed.site / "megatron_bai" / "launch") in found["out"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(installed: Installation, verb: str) -> None:
    found = installed.results[verb, "--help"]
    assert (found["code"], found["err"]) == (0, "") and VERBS[verb].summary in found["out"]


def test_doctor_finds_all_requirements(installed: Installation) -> None:
    found = installed.results["doctor",]
    assert (found["code"], found["err"]) == (0, "") and "The main job can run here" in found["out"]
    assert "pip install 'megatron-bai[math]'" in found["out"]


def test_pip_check_names_what_an_image_lacks(wheel: Path, tmp_path: Path) -> None:
    """As docs/install.md says: beside other releases of the engines, without Hydra and zlib-ng."""
    site = tmp_path / "site"
    install = [*PIP, "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, timeout=300)
    for name, release in (("torch", "2.9.0"), ("pyyaml", "6.0.2")):
        (site / f"{name}-{release}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
        (site / f"{name}-{release}.dist-info" / "METADATA").write_text(metadata)
    (site / "pip").symlink_to(Path(sysconfig.get_path("purelib")) / "pip")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pip", "--disable-pip-version-check", "check"],
        env={"PYTHONPATH": str(site)}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lacks = set(re.findall(r"^megatron-bai \S+ requires ([\w-]+), which is not installed", done.stdout, re.M))
    assert done.returncode == 1 and {"hydra-core", "zlib-ng"} <= lacks and not lacks & {"torch", "pyyaml"}, done
    assert re.search(r"^megatron-bai \S+ has requirement torch==\S+ but you have torch 2\.9\.0", done.stdout, re.M)
    assert lacks <= pinned_for_gpus()


def pinned_for_gpus() -> set[str]:
    """Return the distributions of `requirements/gpu.lock`."""
    lines = (ROOT / "requirements" / "gpu.lock").read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]) for line in lines if re.match(r"[\w.-]+==", line)}


def test_checkpoints_are_merged(installed: Installation) -> None:
    (words,) = [words for words in installed.results if words[:2] == ("merge", "experiment=demo")]
    found = installed.results[words]
    assert found["code"] == 0, found["err"]
    merged = load_file(Path(words[2].partition("=")[2]) / "actor" / "model.safetensors")
    assert merged["model.norm.weight"].tolist() == [0.75] * 4  # .5 × 0 + .5 × (.5 × 1 + .5 × 2)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_planned_or_refused_for_what_it_is(installed: Installation, experiment: str) -> None:
    found = installed.results["plan", f"experiment={experiment}"]
    if reason := REFUSED.get(experiment):
        assert found["code"] == 2 and reason in found["err"]
    else:
        assert (found["code"], found["err"]) == (0, "") and re.search(r"total +[\d.]+ GB", found["out"])


@pytest.fixture
def stubs(installed: Installation) -> Path:
    """Programs in the environment's `bin` that say what they are called with."""
    place = installed.prefix / "bin"
    place.mkdir(exist_ok=True)
    (place / "megatron-bai").write_text('#!/bin/sh\necho megatron-bai of the environment: "$@"\n')
    (place / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    launch = installed.site / "megatron_bai" / "launch"
    shown = f'echo "JobId=7"; echo "   Command={launch}/slurm/$SCRIPT --some words/slurm/$SCRIPT"'
    (place / "scontrol").write_text(f'#!/bin/sh\n[ "$2" = job ] && {{ {shown}; }} || echo node1\n')
    for path in place.iterdir():
        path.chmod(0o755)
    return place


def test_the_scripts_use_the_environment_that_they_are_installed_in(
    installed: Installation, stubs: Path, tmp_path: Path
) -> None:
    """torchrun.sh itself, and Slurm's scripts as Slurm runs them: copies somewhere else."""
    launch = installed.site / "megatron_bai" / "launch"
    path = "/usr/bin:/bin"
    assert not shutil.which("megatron-bai", path=path)
    own = subprocess.run(
        [launch / "torchrun.sh", "--processes", "2", "train", "experiment=demo"],
        env={"PATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    starter = "megatron-bai of the environment: torchrun"
    assert own.stdout.startswith(f"{starter} --standalone --nproc-per-node 2"), own.stderr
    assert " train experiment=demo trainer.grace_s=20" in own.stdout
    only = tmp_path / "slurm"  # srun and scontrol, as on every node
    only.mkdir()
    for name in ("srun", "scontrol"):
        (only / name).symlink_to(stubs / name)
    for script, said in (
        ("torchrun.sbatch", starter),
        ("serve.sbatch", "megatron-bai of the environment: serve"),
    ):
        copy = shutil.copy(launch / "slurm" / script, tmp_path / "slurm_script")
        environment = {"PATH": f"{only}:{path}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SCRIPT": script}
        environment["SLURM_JOB_NODELIST"] = "node1"
        done = subprocess.run(
            [copy, "train"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stdout.startswith(said), done.stderr
