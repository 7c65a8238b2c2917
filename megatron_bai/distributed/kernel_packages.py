"""Transformer Engine and NVIDIA's Apex: which of them is here and works, and what Megatron-Core takes from which.

Megatron-Core imports both by itself. Where an import fails it takes torch's parts in their place, without a word or
with a warning; where one succeeds that cannot be used, such as Apex without its CUDA extensions, it fails in the middle
of a run. So both are imported here first, and one of no use is hidden from Megatron-Core, or refused.
"""

import importlib
import logging
import sys
from dataclasses import dataclass
from importlib import metadata, util
from importlib.machinery import ModuleSpec
from pathlib import Path

from packaging.requirements import Requirement

from megatron_bai import config
from megatron_bai.errors import UserError

_log = logging.getLogger(__name__)

TRANSFORMER_ENGINE, APEX = "transformer_engine", "apex"
TITLES = {TRANSFORMER_ENGINE: "Transformer Engine", APEX: "NVIDIA's Apex"}
REMEDIES = {
    TRANSFORMER_ENGINE: "install it as docs/gpu.md says",
    APEX: "in a checkout of https://github.com/NVIDIA/apex run APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v"
    " --no-build-isolation .",
}
REFUSED = "none, the run is refused"  # what a report has in place of kernels
LOCAL = "backend.transformer_impl=local"
# What Megatron-Core uses of each, by module. `amp_C` has Apex's kernels, which a build in Python alone lacks.
_PARTS = {
    TRANSFORMER_ENGINE: {
        "transformer_engine.pytorch": ("Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "DotProductAttention"),
        "transformer_engine.pytorch.optimizers": (
            "FusedAdam", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"
        ),
    },
    APEX: {
        "apex.optimizers": ("FusedAdam",),
        "apex.multi_tensor_apply": ("multi_tensor_applier",),
        "amp_C": ("multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale"),
    },
}  # fmt: skip
_APEX_DIRECTORIES = ("optimizers", "multi_tensor_apply")
_FAULT_LENGTH = 200  # characters of an error that are shown


@dataclass(frozen=True)
class KernelPackage:
    """One of the two packages.

    Attributes:
        name: that it is imported by.
        release: None where it is not known.
        fault: why it is of no use, as the end of a sentence; empty where it works.
    """

    name: str
    release: str | None
    fault: str

    @property
    def title(self) -> str:
        """Its name and release in a line."""
        return f"{TITLES[self.name]} {self.release}" if self.release else TITLES[self.name]

    def require(self, reason: str) -> None:
        """Refuse a run that needs it where it is of no use.

        Args:
            reason: the beginning of the line, which says who asks for it.

        Raises:
            UserError: it is missing or broken.
        """
        if self.fault:
            raise UserError(f"{reason}, and {self.title} {self.fault}: {REMEDIES[self.name]}")


def is_other_apex() -> bool:
    """Return whether an `apex` is installed that is not NVIDIA's, such as PyPI's. It is not imported."""
    spec = _find(APEX)
    if spec is None:
        return False
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    return not any((place / name).is_dir() for place in places for name in _APEX_DIRECTORIES)


def is_installed(name: str) -> bool:
    """Return whether a package can be found, without importing it."""
    return _find(name) is not None


def inspect_package(name: str) -> KernelPackage:
    """Import a package, and what Megatron-Core uses of it.

    Args:
        name: that it is imported by, a key of `TITLES`.
    """
    if not is_installed(name):
        return KernelPackage(name, None, "is not installed")
    if name == APEX and is_other_apex():
        return KernelPackage(name, None, _describe_other_apex())
    for module, parts in _PARTS[name].items():
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if module == error.name == "amp_C":
                return KernelPackage(name, release_of(name), "was built without its CUDA extensions (amp_C)")
            return KernelPackage(name, release_of(name), f"cannot be imported ({_describe(error)})")
        except Exception as error:  # whatever its code raises, such as an OSError of a library that is not there
            return KernelPackage(name, release_of(name), f"cannot be imported ({_describe(error)})")
        if missing := [part for part in parts if not hasattr(imported, part)]:
            return KernelPackage(name, release_of(name), f"has no {module}.{missing[0]}")
    return KernelPackage(name, release_of(name), "")


def prepare_kernel_packages(settings: config.Backend, kind: str) -> bool:
    """Refuse a run that lacks a package it needs, and hide from Megatron-Core those of no use.

    Call it before Megatron-Core's models and optimizers are imported. A CPU has no use for either package: both are
    hidden there, since Megatron-Core would take their optimizers for it.

    Args:
        settings: `transformer_impl` and `require`.
        kind: of the device, `cpu` or `cuda`.

    Returns:
        Whether Transformer Engine's layers take the place of Megatron-Core's local ones.

    Raises:
        UserError: what is asked for is missing, broken, or for another kind of device.
    """
    if kind == "cpu":
        _refuse_on_cpu(settings)
        for name in TITLES:
            hide_package(name)
        return False
    packages = {name: inspect_package(name) for name in TITLES}
    for name in settings.require:
        packages[name].require(f"backend.require names {name}")
    use_layers = settings.transformer_impl != "local"
    if use_layers:
        _require_layers(packages[TRANSFORMER_ENGINE], settings.transformer_impl)
    for package in packages.values():
        if package.fault:
            if is_installed(package.name):
                _log.warning("%s %s, so nothing of it is used", package.title, package.fault)
            hide_package(package.name)
    if use_layers:
        require_accepted(packages[TRANSFORMER_ENGINE])
    return use_layers


def accepted_releases() -> str:
    """Return the releases of Transformer Engine that the installed Megatron-Core names; empty where it names none."""
    for line in metadata.requires("megatron-core") or ():
        if (requirement := Requirement(line)).name == "transformer-engine":
            return str(requirement.specifier)
    return ""


def require_accepted(engine: KernelPackage) -> None:
    """Refuse a Transformer Engine in which Megatron-Core does not find all that it imports: it would use none of it.

    Args:
        engine: Transformer Engine, which works by itself.

    Raises:
        UserError: names both releases, and those that Megatron-Core asks for.
    """
    try:
        from megatron.core.extensions import transformer_engine as extension

        accepted, reason = extension.HAVE_TE and extension.TEColumnParallelGroupedLinear is not None, ""
    except Exception as error:  # of its classes' definitions, where names are gone
        accepted, reason = False, f" ({_describe(error)})"
    if not accepted:
        release = metadata.version("megatron-core")
        raise UserError(
            f"Megatron-Core {release} does not find in {engine.title} all that it uses{reason}: install"
            f" transformer-engine{accepted_releases()}, or set {LOCAL}"
        )


def hide_package(name: str) -> None:
    """Make every later import of a package, and of what is left of an earlier one, an ImportError in this process."""
    for module in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
        sys.modules[module] = None  # type: ignore[assignment]  # as Python's import system has it


def release_of(name: str) -> str | None:
    """Return the release of an installed package, its own word for it first."""
    if stated := getattr(sys.modules.get(name), "__version__", None):
        return str(stated)
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def _refuse_on_cpu(settings: config.Backend) -> None:
    """Raise a UserError where a run on a CPU is to have one of the packages."""
    named = {"backend.require": settings.require, "backend.transformer_impl": [settings.transformer_impl]}
    for setting, names in named.items():
        for name in names:
            if name in TITLES:
                raise UserError(f"{setting} names {name}, which only a run with CUDA uses: leave it out")


def _require_layers(engine: KernelPackage, asked: str) -> None:
    """Refuse a run with CUDA without Transformer Engine, which `backend.transformer_impl` did not ask for."""
    if asked == TRANSFORMER_ENGINE:
        engine.require(f"backend.transformer_impl is {asked}")
    elif engine.fault:
        raise UserError(
            f"{engine.title} {engine.fault}, and without it a Python loop computes one expert after another:"
            f" {REMEDIES[engine.name]}, or set {LOCAL}"
        )


def _find(name: str) -> ModuleSpec | None:
    try:
        return util.find_spec(name)
    except ValueError:  # a module that was made in this process, without a place
        return None


def _describe(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")
    return text if len(text) <= _FAULT_LENGTH else f"{text[:_FAULT_LENGTH]}…"


def _describe_other_apex() -> str:
    release = release_of(APEX)
    return f"is not installed: the `apex{f' {release}' if release else ''}` here is another project, as PyPI's is"
