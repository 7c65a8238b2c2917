"""Report what this machine has, what each missing component disables, and whether the main job can run.

Versions are compared with the package's own requirements (its installed metadata), so a pin is written in one place.
Nothing heavy is imported: packages are asked for their metadata, the GPU driver for its devices, and processes of their
own for what must be imported.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table
from rich.text import Text

from megatron_bai import compat, project_files
from megatron_bai.cli.findings import FAULT, OK, WITHOUT, Finding
from megatron_bai.cli.kernel_findings import find_kernels
from megatron_bai.compat.patch import Patch
from megatron_bai.compat.releases import TAKEN, describe_row, installed_megatron
from megatron_bai.config import Backend, Config
from megatron_bai.errors import UserError
from megatron_bai.utils.terminal_text import make_console

_PACKAGE = "megatron-bai"
_MARKS = {OK: ("✓", "green"), WITHOUT: ("–", "yellow"), FAULT: ("✗", "red")}

# What the main job cannot do without the requirements that deserve a line of their own.
_PURPOSES = {
    "torch": "tensors, collectives and every checkpoint",
    "megatron-core": "the training engine",
    "transformers": "tokenizers and the Hugging Face format",
    "sglang": "rollouts: the inference engine",
}
_ENGINES = ("megatron-core", "sglang")  # whose releases have rows in the table
# Optional: import name → what is lost without it. None of these is needed on a CPU.
_OPTIONAL = {
    "flash_attn": ("flash attention in training; unfused attention is used", "pip install flash-attn"),
}
# Optional on every machine: import name → what is lost without it.
_EXTRAS = {
    "datasets": ("data=dataset from Parquet or datasets.save_to_disk (JSON Lines is read)", "datasets"),
    "math_verify": ("reward=math_verify", "math"),
}


@dataclass(frozen=True)
class Machine:
    """The hardware. `gpus` as the driver names them; `cpu_flags` as in /proc/cpuinfo; `memory_gib` 0 if unknown."""

    gpus: tuple[str, ...]
    cores: int
    memory_gib: float
    cpu_flags: frozenset[str]
    compiler: str | None

    @classmethod
    def detect(cls) -> "Machine":
        """Detect this machine's hardware."""
        affinity = getattr(os, "sched_getaffinity", None)  # what this process may use, not what the machine has
        return cls(
            gpus=_gpus(),
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            memory_gib=_memory_gib(),
            cpu_flags=_cpu_flags(),
            compiler=next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
        )


def run(config: Config) -> None:
    """Print the findings.

    Raises:
        SystemExit: with code 1, the main job cannot run here.
    """
    machine = Machine.detect()
    findings = [*collect_findings(config.backend, machine)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "piece", "found", "what it means"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark, colour = _MARKS[finding.state]
        table.add_row(Text(mark, style=colour), Text(finding.piece), Text(finding.found), Text(finding.note))
    console = make_console()
    console.print(table)
    faults = [finding.piece for finding in findings if finding.state == FAULT]
    if faults:
        console.print(f"\nThe main job cannot run here: {', '.join(faults)}.", style="red", markup=False)
        raise SystemExit(1)
    console.print(f"\nThe main job can run here, on {'GPUs' if machine.gpus else 'the CPU'}.", markup=False)


def collect_findings(backend: Backend, machine: Machine) -> Iterator[Finding]:
    """Yield all findings, in the order in which they are shown.

    Args:
        backend: the settings `backend.*`.
        machine: the hardware.
    """
    probed = backend.untested and backend.kind != "cpu" and bool(machine.gpus)
    yield from _requirements(probed)
    yield from _files()
    yield from find_kernels(backend, bool(machine.gpus))
    yield from _optional(machine)
    yield from _devices(backend.kind, machine)
    yield from _patches(compat.PATCHES, machine, probed)


def _requirements(probed: bool) -> Iterator[Finding]:
    """Report Python and the package's requirements; those without a purpose of their own share one line.

    Args:
        probed: whether a run takes engines of other releases than the table's, once it has probed them.
    """
    try:
        own = metadata.metadata(_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{_PACKAGE} is not installed, so its requirements are unknown: {_remedy(_PACKAGE)}") from error
    wanted, version = SpecifierSet(own["Requires-Python"]), platform.python_version()
    fits = wanted.contains(version, prereleases=True)
    yield Finding("Python", version, OK if fits else FAULT, "" if fits else f"needs {wanted}: make a new environment")
    wrong, right = [], 0
    for requirement in sorted(
        _main_requirements(own.get_all("Requires-Dist") or []), key=lambda r: r.name not in _PURPOSES
    ):
        finding = _check_pin(requirement, probed)
        if requirement.name in _PURPOSES:
            yield finding
        elif finding.state == OK:
            right += 1
        else:
            wrong.append(finding)
    yield from wrong
    yield Finding("other requirements", f"{right} of {right + len(wrong)}", FAULT if wrong else OK)


def _main_requirements(lines: Iterable[str]) -> Iterator[Requirement]:
    """Yield the requirements of the main job: those without an extra, and SGLang, which `make install` adds."""
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}) or requirement.name in _PURPOSES:
            yield requirement


def _check_pin(requirement: Requirement, probed: bool) -> Finding:
    """Compare an installed release with its pin, and with others that are taken, without a build's suffix (`+cpu`).

    Args:
        requirement: the pin.
        probed: as in `_requirements`.
    """
    found, role = _version(requirement.name), _PURPOSES.get(requirement.name, "")
    if found is None:
        note = f"{role or 'needed by the package'}: {_remedy(_pin(requirement))}"
        return Finding(requirement.name, "missing", FAULT, note)
    release = found.partition("+")[0]
    row = describe_row(requirement.name, release) if requirement.name in _ENGINES else ""
    role = f"{role}; {row}" if row else role
    if release in TAKEN.get(requirement.name, ()):
        return Finding(requirement.name, found, OK, role)
    if row and probed and "backend.untested" in row:
        return Finding(requirement.name, found, WITHOUT, role)
    if requirement.name in _ENGINES or not requirement.specifier.contains(found, prereleases=True):
        needed = f"needs {requirement.specifier}: {_remedy(_pin(requirement))}"
        return Finding(requirement.name, found, FAULT, f"{needed}; {row}" if row else needed)
    return Finding(requirement.name, found, OK, role)


def _pin(requirement: Requirement) -> str:
    """Return a requirement as pip takes it, without the extra that it belongs to."""
    return f"{requirement.name}{requirement.specifier}"


def _remedy(wanted: str) -> str:
    """Say how a requirement is installed: the Makefile knows in a checkout, pip beside an installed package."""
    return "run `make install`" if project_files.checkout() else f"pip install '{wanted}'"


def _files() -> Iterator[Finding]:
    """Find what comes with the package and is not Python, in a checkout or an installation."""
    for name, find, role in (
        ("configuration", project_files.conf_dir, "experiments and other presets"),
        ("launch scripts", project_files.launch_dir, "runs on many machines and under Slurm"),
    ):
        try:
            yield Finding(name, str(find()), OK, role)
        except UserError as error:
            yield Finding(name, "missing", FAULT, str(error))


def _optional(machine: Machine) -> Iterator[Finding]:
    """Report accelerators of the GPU path, which a CPU machine does without, and packages of single settings."""
    for module, (lost, remedy) in _OPTIONAL.items():
        name = module.replace("_", "-")
        if util.find_spec(module) is not None:
            yield Finding(name, _version(name) or "present", OK)
        elif machine.gpus:
            yield Finding(name, "missing", WITHOUT, f"no {lost}: {remedy}")
        else:
            yield Finding(name, "missing", WITHOUT, "not needed without a GPU")
    for module, (lost, extra) in _EXTRAS.items():
        name = module.replace("_", "-")
        if util.find_spec(module) is not None:
            yield Finding(name, _version(name) or "present", OK)
        else:
            yield Finding(name, "missing", WITHOUT, f"no {lost}: pip install 'megatron-bai[{extra}]'")


def _devices(backend: str, machine: Machine) -> Iterator[Finding]:
    """Report GPUs, CPU and compiler."""
    torch_build = _version("torch") or ""
    if machine.gpus and torch_build.endswith("+cpu"):
        state = FAULT if backend == "cuda" else WITHOUT
        note = f"unused: torch {torch_build} is a CPU build, install the CUDA build of that release"
        yield Finding("GPUs", ", ".join(machine.gpus), state, note)
    elif machine.gpus:
        yield Finding("GPUs", ", ".join(machine.gpus), OK)
    elif backend == "cuda":
        yield Finding("GPUs", "none", FAULT, "backend.kind is cuda: set it to auto, or install the NVIDIA driver")
    else:
        yield Finding("GPUs", "none", WITHOUT, "tiny models on gloo only: no NCCL, no bfloat16 speed, no large run")
    memory = f", {machine.memory_gib:.0f} GiB" if machine.memory_gib else ""
    yield Finding("CPU", f"{machine.cores} cores{memory}", OK, "ranks share the cores, one thread each")
    for name, flag, lost in (
        ("AMX", "amx_tile", "without SGLang's CPU kernels: its torch fallback serves, more slowly"),
        ("AVX-512 bf16", "avx512_bf16", "bfloat16 is slow on the CPU: keep backend.dtype and rollout.dtype at float32"),
    ):
        if flag in machine.cpu_flags:
            yield Finding(name, "yes", OK)
        else:
            yield Finding(name, "no", WITHOUT, "" if machine.gpus else lost)
    if machine.compiler:
        yield Finding("C compiler", machine.compiler, OK)
    else:
        note = "without torch.compile, which SGLang's seeded sampling needs: install gcc or clang"
        yield Finding("C compiler", "none", WITHOUT, note)


def _patches(known: Iterable[Patch], machine: Machine, probed: bool) -> Iterator[Finding]:
    """Report the fixes to upstream releases. Those of a CPU scope matter on a machine without a GPU only.

    Args:
        known: the fixes.
        machine: the hardware.
        probed: as in `_requirements`: a run does without those that do not name the installed release.
    """
    for patch in known:
        piece, found = f"patch {patch.name}", f"{patch.distribution} {patch.installed_version or '–'}"
        if machine.gpus and patch.scope.endswith("-cpu"):
            yield Finding(piece, found, OK, "not needed with a GPU")
        elif patch.state == "not needed":
            yield Finding(piece, found, OK, patch.state)
        elif patch.state in ("ready", "applied"):
            yield Finding(piece, found, OK, f"{patch.state}: {patch.summary}")
        else:
            remedy = f"written for {', '.join(patch.versions)}: pip install '{patch.distribution}=={patch.versions[0]}'"
            yield Finding(piece, found, WITHOUT if probed else FAULT, f"{patch.state}; {remedy}")


def _version(distribution: str) -> str | None:
    """Return an installed release; of Megatron-Core that of the sources which are imported."""
    if distribution == "megatron-core":
        return installed_megatron()
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[str, ...]:
    """List the names of the GPUs that the NVIDIA driver knows; none where there is no working driver."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in listed.stdout.splitlines() if line.strip())


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return 0.0
