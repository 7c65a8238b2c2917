"""Experts in one tensor a layer, as transformers 5 holds them, are read as the published ones are."""

import json
from pathlib import Path

import pytest
import torch
from moe import ARCHITECTURE, MODEL
from safetensors.torch import save_file

from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint, hf_mapping
from megatron_bai.model.hf_reader import HFReader

EXPERTS = "model.layers.{}.mlp.experts."


def published() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for kind in ARCHITECTURE.mappings.values():
        for index in hf_mapping.slice_indices(kind, MODEL):
            whole = torch.randn(kind.shape(ARCHITECTURE), generator=generator)
            found |= dict(zip(kind.names(index), kind.split(whole, ARCHITECTURE), strict=True))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def fuse(tensors: dict[str, torch.Tensor], ending: str = "") -> dict[str, torch.Tensor]:
    left = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(MODEL.num_layers):
        prefix = EXPERTS.format(layer)
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{e}.{part}_proj.weight"] for e in range(MODEL.num_experts)])
            for part in ("gate", "up", "down")
        )
        left |= {f"{prefix}gate_up_proj{ending}": torch.cat([gate, up], 1), f"{prefix}down_proj{ending}": down}
    return left


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_checkpoint.hf_config(MODEL, torch.float32)))
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_every_slice_is_that_of_the_published_checkpoint(ending: str, tmp_path: Path) -> None:
    tensors = published()
    apart, fused = (HFReader(write(tmp_path / n, t)) for n, t in (("a", tensors), ("f", fuse(tensors, ending))))
    assert fused.has_fused_experts(ARCHITECTURE) and not apart.has_fused_experts(ARCHITECTURE)
    for reader in (apart, fused):
        reader.require_tensors_of(ARCHITECTURE)
    for kind in ARCHITECTURE.mappings.values():
        for index in hf_mapping.slice_indices(kind, MODEL):
            slices = (reader.read_slice(kind, index, ARCHITECTURE) for reader in (fused, apart))
            assert torch.equal(*slices), (kind.megatron, index)


def test_fused_experts_of_another_shape_or_beside_published_ones_are_named(tmp_path: Path) -> None:
    tensors, name = fuse(published()), EXPERTS.format(1) + "gate_up_proj"
    kind = hf_mapping.mapping_of("decoder.layers.mlp.experts.experts.linear_fc1.weight", MODEL)
    turned = write(tmp_path / "turned", tensors | {name: tensors[name].transpose(1, 2).contiguous()})
    with pytest.raises(UserError, match=r"gate_up_proj has shape \(8, 48, 80\), the model needs \(8, 80, 48\)"):
        HFReader(turned).read_slice(kind, (1, 0), ARCHITECTURE)
    both = write(tmp_path / "both", published() | {name: tensors[name]})
    with pytest.raises(UserError, match="gate_up_proj .unknown."):
        HFReader(both).require_tensors_of(ARCHITECTURE)
    del tensors[name]
    with pytest.raises(UserError, match=r"experts.0.gate_proj.weight \(missing\)"):
        HFReader(write(tmp_path / "less", tensors)).require_tensors_of(ARCHITECTURE)
