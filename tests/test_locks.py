"""What pyproject asks for and what the locks name agree: no index is asked, the metadata of what is installed helps."""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_bai.compat.releases import MEGATRON, SERVERS, TAKEN

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINUX_312 = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}
HERE = {**LINUX_312, "python_version": "3.11", "python_full_version": "3.11.0"}
NOT_ON_A_CPU = {"transformer-engine"}


def pinned(*locks: str) -> dict[str, str]:
    """Return the releases that locks name, by canonical name; a line that is no pin, or a second one, is an error."""
    pins: dict[str, str] = {}
    for lock in locks:
        for line in (ROOT / "requirements" / lock).read_text().splitlines():
            if line.startswith("#"):
                continue
            assert (match := re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)), f"{lock}: {line!r} is no pin"
            name = canonicalize_name(match[1])
            assert name not in pins, f"{name} is pinned twice in {locks}"
            pins[name] = match[2]
    return pins


def requirements(*extras: str) -> Iterator[Requirement]:
    """Yield what pyproject asks for with these extras."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return map(Requirement, lines)


def unmet(asked: Iterable[Requirement], pins: dict[str, str], environment: dict[str, str]) -> list[str]:
    """Return the requirements that hold in the environment and that the pins do not meet."""
    wrong = []
    for requirement in asked:
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": ""}):
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None or not requirement.specifier.contains(pin, prereleases=True):
            wrong.append(f"{requirement} and {pin}")
    return wrong


def test_the_gpu_lock_has_what_the_gpu_extra_asks_for() -> None:
    assert not unmet(requirements("gpu"), pinned("gpu.lock"), LINUX_312)


@pytest.mark.parametrize("lock, environment", [("cpu.lock", HERE), ("cpu-py312.lock", LINUX_312)])
def test_the_cpu_locks_have_what_they_install(lock: str, environment: dict[str, str]) -> None:
    pins = pinned(lock, "test.lock")
    asked = (r for r in requirements("gpu", "datasets", "math") if r.name not in NOT_ON_A_CPU)
    asked = (r for r in asked if pins.get(canonicalize_name(r.name)) not in TAKEN.get(r.name, ()))
    assert not unmet(asked, pins, environment)


def test_the_cpu_lock_of_newer_pythons_has_the_newest_engines() -> None:
    pins = pinned("cpu-py312.lock")
    newest = {"megatron-core": list(MEGATRON)[-1], "sglang": list(SERVERS)[-1]}
    assert {name: pins[name] for name in newest} == newest
    assert pins["torch"] in TAKEN["torch"] and pins["transformers"] in TAKEN["transformers"]


def test_what_the_locked_releases_ask_for_is_in_the_gpu_lock() -> None:
    """As far as the same ones are installed here: SGLang's metadata, above all, which pins what others leave open."""
    pins, checked, wrong = pinned("gpu.lock"), set(), {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if pins.get(name) == distribution.version.partition("+")[0]:
            checked.add(name)
            if missing := unmet(map(Requirement, distribution.requires or []), pins, LINUX_312):
                wrong[name] = missing
    assert len(checked) > 20 and not wrong


def test_transformer_engine_is_built_for_the_cuda_of_torch() -> None:
    pins = pinned("gpu.lock")
    cuda = {name for name in pins if re.fullmatch(r"nvidia-(cudnn|nccl|cusparselt)-cu\d+", name)}
    (major,) = {name[-2:] for name in cuda}
    assert {name for name in pins if name.startswith("transformer-engine-cu")} == {f"transformer-engine-cu{major}"}
    assert any(f"core_cu{major}" in requirement.extras for requirement in requirements("gpu"))


def test_every_python_that_is_claimed_may_install_it() -> None:
    claimed = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python ::" in line]
    assert "3.12" in claimed and f"{sys.version_info[0]}.{sys.version_info[1]}" in claimed
    assert all(Requirement(f"x{PROJECT['requires-python']}").specifier.contains(python) for python in claimed)
