"""The table of releases: which of each engine this package takes, and how they differ.

No other module names a release, and none asks for one: code reads the fields of the installed release's row.
Compatibility fixes and the checks before replay hold for the releases that they name alone. A server that the run did
not start is sent what its release understands, or refused with the reason, since no error would show that its replies
hold another request's routes or that it ignores a field.
"""

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

MEGATRON_CORE = "0.16.1"  # what this package installs: the last release for Python 3.11
SGLANG = "0.5.21"  # what this package installs


@dataclass(frozen=True)
class MegatronRelease:
    """The differences of a release of Megatron-Core.

    Attributes:
        save_arguments: of `dist_checkpointing.save`, beside those that all releases take: Megatron-Core's own writers
            write, where another package's are the default.
        common_is_object: the state of a checkpoint that is not sharded is an object of its index, as `save` writes it,
            and `load` takes it from there. Otherwise both know `common.pt` alone.
        graph_setting: of TransformerConfig, what a CUDA graph contains.
        refused_settings: of TransformerConfig, those that must be None for routes to be replayed, with the reason.
        inference_router: class of routers whose forward pass is another during inference; empty: there is none.
        mtp_layer: name of the transformer layer within a layer of multi-token prediction, as checkpoints have it.
        notices: how the warnings begin that it logs in every run, about what only this package could do otherwise.
        norms_inputs_of_queries: with Transformer Engine, latent attention without latents of queries norms its input
            once more before the queries' projection, which no published model does.
        has_metrics_tracker: the routers' losses are recorded by an object (`moe_logging`), not in a dict (`moe_utils`).
    """

    save_arguments: Mapping[str, Any] = field(default_factory=dict)
    common_is_object: bool = False
    graph_setting: str = "cuda_graph_scope"
    refused_settings: Mapping[str, str] = field(default_factory=dict)
    inference_router: str = ""
    mtp_layer: str = "transformer_layer"
    notices: tuple[str, ...] = ()
    norms_inputs_of_queries: bool = False
    has_metrics_tracker: bool = False


_MEGATRON_0_16 = MegatronRelease()
_MEGATRON_0_17 = MegatronRelease(
    save_arguments={"async_strategy": "mcore"},
    refused_settings={"moe_router_force_biased": "it replaces the live logits, from which the weights are computed"},
    inference_router="InferenceTopKRouter",
    mtp_layer="mtp_model_layer",
    notices=("MCore's async save is deprecated",),
)
_MEGATRON_0_18 = replace(
    _MEGATRON_0_17,
    graph_setting="cuda_graph_modules",
    has_metrics_tracker=True,
    notices=(*_MEGATRON_0_17.notices, "DistributedDataParallel: full_param_layout not provided"),
)
_MEGATRON_0_19 = replace(
    _MEGATRON_0_18,
    common_is_object=True,
    norms_inputs_of_queries=True,
    notices=(*_MEGATRON_0_18.notices, "GPTModel IS DEPRECATED", "load_common is deprecated"),
)
MEGATRON = {
    "0.16.0": _MEGATRON_0_16,
    MEGATRON_CORE: _MEGATRON_0_16,
    "0.17.0": _MEGATRON_0_17,
    "0.17.1": _MEGATRON_0_17,
    "0.18.0": _MEGATRON_0_18,
    "0.18.1": _MEGATRON_0_18,
    "0.18.2": _MEGATRON_0_18,
    "0.19.0": _MEGATRON_0_19,
    "0.19.1": _MEGATRON_0_19,
    "0.19.2": _MEGATRON_0_19,
}


@cache
def installed_megatron() -> str | None:
    """Return the release of Megatron-Core that `import megatron.core` takes, without a build's local suffix.

    It is read from the sources, not imported: those of a checkout on PYTHONPATH may differ from the distribution that
    pip knows. None where there is none.
    """
    spec = find_spec("megatron")
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        if release := _read_package_info(Path(directory) / "core" / "package_info.py"):
            return release
    try:
        return version("megatron-core").partition("+")[0]
    except PackageNotFoundError:
        return None


def _read_package_info(file: Path) -> str | None:
    """Return the release that Megatron-Core's own file says, `MAJOR = 0` and so on; None where it does not."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
    parts = {
        target.id: str(node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    try:
        return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}{parts['PRE_RELEASE']}"
    except KeyError:
        return None


_admitted: set[str] = set()  # releases without a row that were probed for this process


def admit_megatron(release: str) -> None:
    """Let this process use a release without a row, which a probe has verified."""
    _admitted.add(release)


def admitted_megatron() -> tuple[str, ...]:
    """Return the releases without a row that this process uses: the installed one, once it was probed, or none."""
    return tuple(sorted(_admitted))


def is_admitted(release: str | None) -> bool:
    """Return whether this process may use a release of Megatron-Core: it has a row, or was probed."""
    return release in MEGATRON or release in _admitted


def list_megatron() -> str:
    """Return the releases of Megatron-Core that have a row, as words of a sentence."""
    return ", ".join(MEGATRON)


def megatron_release(release: str | None = None) -> MegatronRelease:
    """Return the row of a release of Megatron-Core; where it has none, that of the nearest earlier one.

    Args:
        release: whose; None: the installed one.
    """
    release = release or installed_megatron() or MEGATRON_CORE
    if release in MEGATRON:
        return MEGATRON[release]
    try:
        release = Version(release).base_version  # a pre-release has what its release has
    except InvalidVersion:
        return MEGATRON[MEGATRON_CORE]
    return MEGATRON[_nearest_earlier(release, MEGATRON) or MEGATRON_CORE]


def _nearest_earlier(release: str, table: Iterable[str]) -> str | None:
    """Return the newest release of a table up to one; None where it is before all, or is no release."""
    try:
        wanted = Version(release)
    except InvalidVersion:
        return None
    return max((known for known in table if Version(known) <= wanted), key=Version, default=None)


@dataclass(frozen=True)
class SGLangRelease:
    """What a release of SGLang is taken for, and where it differs from others.

    Attributes:
        starts_here: a run may start servers of it, on a CPU with the compatibility fixes that name it. Others are
            taken at `rollout.urls` alone.
        needs_update_session: tensors are taken only between /begin_weight_update and /end_weight_update.
        has_topk_layers: every model tells its routers their layer, without which routes are not captured.
        has_stage_facts: a model's layers declare whether they have experts in a function of their own
            (`stage_facts`), which their neighbours ask.
        has_sampling_masks: a reply says which tokens a truncated draw kept, as the sampler itself had them.
    """

    starts_here: bool = True
    needs_update_session: bool = True
    has_topk_layers: bool = True
    has_stage_facts: bool = True
    has_sampling_masks: bool = True


SERVERS = {
    "0.5.19": SGLangRelease(False, False, has_topk_layers=False, has_stage_facts=False, has_sampling_masks=False),
    "0.5.20": SGLangRelease(False, False, has_topk_layers=False, has_stage_facts=False, has_sampling_masks=False),
    SGLANG: SGLangRelease(has_topk_layers=False, has_stage_facts=False),
    "0.5.22": SGLangRelease(),
    "0.5.23": SGLangRelease(),
}


def sglang_releases(where: Callable[[SGLangRelease], bool] = lambda release: True) -> tuple[str, ...]:
    """Return the releases of SGLang that a run may start, or those of them for which `where` holds."""
    return tuple(name for name, release in SERVERS.items() if release.starts_here and where(release))


# Releases of a distribution that are taken beside the one that this package installs.
TAKEN = {
    "sglang": sglang_releases(),
    "megatron-core": tuple(MEGATRON),
    "transformers": ("5.19.0",),  # SGLang 0.5.22 and 0.5.23 ask for it, and for this torch
    "torch": ("2.14.1",),
}

_admits_untested = False


def admit_untested(admitted: bool) -> None:
    """Say whether this process takes releases that are not in the table, as `backend.untested` has it."""
    global _admits_untested
    _admits_untested = admitted


# What is wrong with releases of SGLang before the one named, for those that look behind the times.
_FAULTS = (
    ("0.5.16", "its overlap schedule gives requests each other's routes (SGLang #34319)"),
    ("0.5.19", "its replies do not say which weights a token was sampled with (weight_versions)"),
)


def server_fault(release: str | None) -> str:
    """Return why a release of SGLang that is not among `SERVERS` is refused, as the end of a sentence."""
    try:
        found = Version(release or "")
    except InvalidVersion:
        return ", which is no release"
    fault = next((fault for before, fault in _FAULTS if found < Version(before)), "")
    return f", and {fault}" if fault else ", and no one has tried it (backend.untested=true takes it, and verifies it)"


def untested_server(release: str | None) -> SGLangRelease | None:
    """Return what stands for a release of SGLang that is not among `SERVERS`: the entry of the newest one before it.

    None where this process takes no such releases, or the release has a fault that is known, or is none.
    """
    earlier = _nearest_earlier(release or "", SERVERS)
    return SERVERS[earlier] if _admits_untested and earlier else None


def describe_row(distribution: str, release: str) -> str:
    """Return which row of the table an engine's release has, and what one without a row needs, in a phrase.

    Args:
        distribution: `megatron-core` or `sglang`.
        release: the installed one, without a build's local suffix.
    """
    table: Iterable[str] = MEGATRON if distribution == "megatron-core" else SERVERS
    if release in table:
        elsewhere = distribution == "sglang" and not SERVERS[release].starts_here
        return f"row {release} of the table of releases{', at rollout.urls alone' if elsewhere else ''}"
    earlier = _nearest_earlier(release, table)
    if earlier is None:
        return f"before the first row of the table of releases, {min(table, key=Version)}"
    return (
        f"no row in the table of releases; backend.untested=true takes it as {earlier}, if a probe at the start of the"
        " run verifies it; on a CPU it needs compatibility fixes that name it"
    )
