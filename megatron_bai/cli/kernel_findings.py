"""What the doctor finds of Transformer Engine and Apex, and which kernels a training step would have.

They are imported in a process of their own, since both import torch and may end the process that does, and only where
there is a GPU: a run on a CPU uses neither.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet

from megatron_bai import config
from megatron_bai.cli.findings import FAULT, OK, WITHOUT, Finding
from megatron_bai.distributed.kernel_packages import (
    APEX,
    LOCAL,
    REFUSED,
    REMEDIES,
    TITLES,
    TRANSFORMER_ENGINE,
    accepted_releases,
    is_installed,
    is_other_apex,
)

_KERNELS = "training kernels"
_TIMEOUT_S = 600
_LOST = {
    TRANSFORMER_ENGINE: f"no grouped experts, fused layers and optimizer: a run is refused, or set {LOCAL}",
    APEX: "no fused optimizer and gradient norm where Transformer Engine is missing: torch's are used",
}


def find_kernels(settings: config.Backend, has_gpus: bool) -> Iterator[Finding]:
    """Yield a line on each package, and one on where the parts of a training step come from.

    Args:
        settings: `kind`, `transformer_impl` and `require`.
        has_gpus: whether this machine has any.
    """
    if settings.kind == "cpu" or not (has_gpus or settings.kind == "cuda"):
        yield from _find_on_cpu(settings)
        return
    if not any(map(is_installed, TITLES)):
        report: dict[str, Any] = {
            "packages": [{"name": name, "release": None, "fault": "is not installed"} for name in TITLES],
            "kernels": "layers, experts (one after another), optimizer, gradient norm and clipping: torch"
            if settings.transformer_impl == "local"
            else REFUSED,
        }
    else:
        command = [sys.executable, "-m", "megatron_bai.cli.kernel_report", settings.transformer_impl]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
            report = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
            yield Finding(
                _KERNELS, "broken", FAULT, f"importing Transformer Engine or Apex failed: {_last_line(error)}"
            )
            return
    for package in report["packages"]:
        yield _find_package(settings, **package)
    refused = report["kernels"] == REFUSED
    yield Finding(_KERNELS, "CUDA", WITHOUT if refused else OK, report["kernels"])


def _find_package(settings: config.Backend, name: str, release: str | None, fault: str) -> Finding:
    """Return the line on a package that a run with CUDA may use."""
    needed = name in settings.require or name == TRANSFORMER_ENGINE and settings.transformer_impl != "local"
    if fault:
        found = "missing" if fault == "is not installed" else release or "of no use"
        note = f"{TITLES[name]} {fault}: {_LOST[name]}; {REMEDIES[name]}"
        return Finding(name.replace("_", "-"), found, FAULT if needed else WITHOUT, note)
    note = "" if name == TRANSFORMER_ENGINE else "used where Transformer Engine is not (docs/gpu.md)"
    accepted = accepted_releases()
    if name == TRANSFORMER_ENGINE and release and not SpecifierSet(accepted).contains(release, prereleases=True):
        note = f"Megatron-Core {metadata.version('megatron-core')} names {accepted}"
    return Finding(name.replace("_", "-"), release or "present", OK, note)


def _find_on_cpu(settings: config.Backend) -> Iterator[Finding]:
    """Yield the lines of a run that uses neither package."""
    for name in TITLES:
        piece = name.replace("_", "-")
        if name == APEX and is_other_apex():
            yield Finding(piece, "another project", WITHOUT, f"not {TITLES[APEX]}; not needed without a GPU")
        elif is_installed(name):
            yield Finding(piece, "present", OK, "not used on a CPU")
        else:
            yield Finding(piece, "missing", WITHOUT, "not needed without a GPU")
    asked = [*settings.require, *([settings.transformer_impl] if settings.transformer_impl in TITLES else [])]
    if asked:
        yield Finding(_KERNELS, "CPU", FAULT, f"the settings name {asked[0]}, which only a run with CUDA uses")
    else:
        yield Finding(_KERNELS, "CPU", OK, "layers, experts, optimizer, gradient norm and clipping: torch")


def _last_line(error: Exception) -> str:
    """Return how a process ended, with the last line that it wrote."""
    lines = str(getattr(error, "stderr", None) or "").strip().splitlines()
    ended = f"exit code {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else str(error)
    return f"{ended}, {lines[-1]}" if lines else ended
