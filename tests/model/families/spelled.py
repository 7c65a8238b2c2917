"""Random weights of a family, and all spellings of them in which a checkpoint may hold them."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from model.families import published
from safetensors.torch import save_file

from megatron_bai.model.architecture import Architecture, read_architecture
from megatron_bai.model.families.param_mapping import ParamMapping
from megatron_bai.model.hf_mapping import slice_indices

checkpoints = importlib.import_module("merge.checkpoints")  # mypy knows it by another name
Tensors = dict[str, torch.Tensor]
Slices = dict[tuple[ParamMapping, tuple[int, ...]], torch.Tensor]
Spell = Callable[[Slices, Architecture], Tensors]


def draw(model: Architecture, seed: int) -> Slices:
    """Random weights, by slice as Megatron has them; what no optimizer moves is float32."""
    random = torch.Generator().manual_seed(seed)
    return {
        (kind, index): torch.randn(kind.shape(model), generator=random).to(
            torch.bfloat16 if kind.trained else torch.float32
        )
        for kind in model.mappings.values()
        for index in slice_indices(kind, model)
    }


def per_expert(slices: Slices, model: Architecture) -> Tensors:
    """As the family publishes them."""
    found: dict[str, list[torch.Tensor]] = {}
    for (kind, index), value in slices.items():
        for name, part in zip(kind.names(index), kind.split(value, model), strict=True):
            found.setdefault(name, []).append(part)
    together = {name for kind, index in slices if kind.experts_together for name in kind.names(index)}
    return {
        name: torch.stack(parts).contiguous() if name in together else parts[0].clone() for name, parts in found.items()
    }


def fused(slices: Slices, model: Architecture) -> Tensors:
    """As transformers 5 holds them: a layer's experts in one tensor, and routers under other names."""
    found = per_expert({place: value for place, value in slices.items() if place[0].experts_together}, model)
    for (kind, index), value in slices.items():
        if kind.experts_together:
            continue  # they are published so
        if kind.fused:
            experts = [slices[kind, (index[0], expert)] for expert in range(model.num_experts)]
            found[kind.fused_name(index)] = torch.stack(experts)
        else:
            names = kind.names(index, other=bool(kind.other))
            found |= {name: part.clone() for name, part in zip(names, kind.split(value, model), strict=True)}
    return found


def numbered(kind: ParamMapping, index: tuple[int, ...]) -> str:
    """Megatron's key with the number of the layer."""
    return kind.megatron.replace("decoder.layers.", f"decoder.layers.{index[0]}.") if index else kind.megatron


def by_layer(slices: Slices, model: Architecture) -> Tensors:
    """Each layer by its number, its experts stacked."""
    found: dict[str, list[torch.Tensor]] = {}
    for (kind, index), value in slices.items():
        found.setdefault(numbered(kind, index), []).append(value)
    return {key: torch.stack(values) if ".experts.experts." in key else values[0] for key, values in found.items()}


def stacked(slices: Slices, model: Architecture) -> Tensors:
    """Layers stacked, where all are of one kind."""
    if len(model.moe_layers) < model.num_layers:
        return by_layer(slices, model)
    found: dict[str, list[torch.Tensor]] = {}
    for (kind, _), value in slices.items():
        found.setdefault(kind.megatron, []).append(value)
    counts = {kind.megatron: (model.num_layers, model.num_experts)[: kind.num_stacked_axes] for kind, _ in slices}
    return {key: torch.stack(values).view(*counts[key], *values[0].shape) for key, values in found.items()}


def singly(slices: Slices, model: Architecture) -> Tensors:
    """Each expert by its number, gate and up apart."""
    found = {}
    for (kind, index), value in slices.items():
        key = numbered(kind, index)
        if len(index) == 2:
            key = key.replace("experts.experts.", f"experts.experts.{index[1]}.")
        if len(index) == 2 and "linear_fc1" in key:
            found[f"{key}_w"], found[f"{key}_v"] = (half.clone() for half in value.chunk(2))
        else:
            found[key] = value
    return found


# Each with its format.
SPELLINGS: dict[str, tuple[str, Spell]] = {
    "published": ("hf", per_expert),
    "fused": ("hf", fused),
    "stacked": ("megatron", stacked),
    "by layer": ("megatron", by_layer),
    "singly": ("megatron", singly),
}
PLAIN = {"hf": "published", "megatron": "stacked"}


def architecture(name: str, path: Path) -> Architecture:
    """Write the `config.json` of a family, in bfloat16, and read it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(published.read(name) | {"torch_dtype": "bfloat16"}))
    return read_architecture(path)


def write(path: Path, name: str, seed: int, spelling: str, layout: Callable = checkpoints.whole) -> Path:
    """Write a checkpoint of random weights with its `config.json`."""
    model = architecture(name, path)
    format_name, spell = SPELLINGS[spelling]
    tensors = spell(draw(model, seed), model)
    if format_name == "hf":
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    described = (path / "config.json").read_text()
    shutil.rmtree(path)
    checkpoints.write(path, tensors, layout, {"decoder.layers.0._extra_state/shard_0_1": checkpoints.saved("state")})
    (path / "config.json").write_text(described)
    return path


def same(found: Tensors, wanted: Tensors) -> None:
    """Assert that two checkpoints have the same names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]), key
