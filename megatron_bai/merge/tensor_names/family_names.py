"""Canonical names by a family's table: where it publishes experts or routers under names that no general rule relates.

Mixtral publishes `block_sparse_moe.experts.7.w1.weight`; transformers 5 holds `mlp.experts.gate_up_proj` in memory, and
some tools save that. `model/families` says for each family which is which. Its table needs `config.json`, transformers
and Megatron-Core, whose imports take seconds: it is asked only where the sources' names do not speak for themselves.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

import torch

from megatron_bai.checkpoint.tensor_index import TensorInfo
from megatron_bai.checkpoint.weight_checks import OUTPUT
from megatron_bai.merge.tensor_names.canonical_names import EXPERT, LAYER, CanonicalBox, canonical_box
from megatron_bai.model.architecture import Architecture, find_architecture
from megatron_bai.model.families.param_mapping import ParamMapping
from megatron_bai.model.hf_mapping import slice_indices

CanonicalNames = Callable[[str, tuple[int, ...]], CanonicalBox]
"""Returns the box that a tensor is, by its name and shape, as `canonical_box` does."""

_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"\bexperts\.")
_PUBLISHED_EXPERT = re.compile(r"\bmlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")


def choose_canonical_names(sources: Mapping[Path, Mapping[str, TensorInfo]], format_name: str = "hf") -> CanonicalNames:
    """Return what names the tensors of a merge's sources: one table for all, so that they meet in it.

    The general rules do for Megatron-Core's names, and where all sources have the same names and these are the common
    ones of experts; else the table of the first source whose `config.json` describes a family, and the rules for what
    is not in that.

    Args:
        sources: the tensors to merge of each, by its directory.
        format_name: whose names these are, `hf` or `megatron`.
    """
    if format_name != "hf":
        return canonical_box
    kinds = [{_NUMBER.sub("#", key): key for key in tensors if not OUTPUT.search(key)} for tensors in sources.values()]
    keys = {key for names in kinds for key in names.values() if _EXPERT.search(key)}
    if all(names.keys() == kinds[0].keys() for names in kinds) and all(map(_PUBLISHED_EXPERT.search, keys)):
        return canonical_box
    for path in sources:
        if (model := find_architecture(path)) is not None:
            return family_names(model)
    return canonical_box


def family_names(model: Architecture) -> CanonicalNames:
    """Return what names a family's Hugging Face tensors: its table, and the general rules for what is not in that.

    Args:
        model: the architecture.
    """
    known = {
        name: (canonical, axes, index, start)
        for kind in model.mappings.values()
        for name, canonical, axes, index, start in _named_tensors(kind, model)
    }

    def to_canonical(key: str, shape: tuple[int, ...]) -> CanonicalBox:
        if key not in known:
            return canonical_box(key, shape)
        canonical, axes, index, start = known[key]
        origin = [*index, *(0 for _ in shape)]
        if start:
            origin[len(axes)] = start
        return CanonicalBox(canonical, axes, tuple(origin), (1,) * len(index) + shape)

    return to_canonical


def _named_tensors(
    kind: ParamMapping, model: Architecture
) -> Iterator[tuple[str, str, tuple[str, ...], tuple[int, ...], int]]:
    """Yield the tensors of a kind that has more than its published names, as boxes of a canonical one.

    Yields:
        The name; the canonical one, its stacked axes, the position along those that the name has, and the first row.
    """
    starts = _part_starts(kind, model)
    if starts is None or not (kind.fused or kind.other):
        return
    axes = (LAYER, EXPERT)[: kind.num_stacked_axes]
    for index in slice_indices(kind, model):
        for names in (kind.names(index), kind.names(index, other=True)):
            for published, name, start in zip(kind.hf, names, starts, strict=False):  # there may be no other names
                yield name, _stacked(kind.fused or published), axes, index, start
        if fused := kind.fused_name(index):
            for name in (fused, f"{fused}.weight"):
                yield name, _stacked(kind.fused), axes, index[:1], 0


def _stacked(name: str) -> str:
    """Return a name of a table without the layer and the expert, as canonical tensors are called."""
    return name.replace("{layer}.", "").replace("{expert}.", "")


def _part_starts(kind: ParamMapping, model: Architecture) -> list[int] | None:
    """Return the first row of each published tensor in Megatron's slice; None where they are no runs of its rows."""
    probe = torch.arange(kind.shape(model)[0])
    probe = probe.view(-1, *(1 for _ in kind.shape(model)[1:]))
    try:
        parts = list(kind.split(probe, model))
        if not torch.equal(torch.cat(parts), probe):
            return None
    except (RuntimeError, IndexError):
        return None
    return [0, *accumulate(part.shape[0] for part in parts[:-1])]
