"""Checkpoints that have every tensor of a model, the tests' Qwen3-MoE, in both formats, written without building it."""

import json
import shutil
from pathlib import Path

import torch
from moe import ARCHITECTURE, MODEL
from safetensors.torch import save_file

from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.torch_dist import DistcpFileWriter, write_index
from megatron_bai.model import hf_checkpoint, hf_mapping
from megatron_bai.model.architecture import Architecture

Tensors = dict[str, torch.Tensor]
CONFIG = hf_checkpoint.hf_config(MODEL, torch.float32)


def hf_tensors(model: Architecture = ARCHITECTURE) -> Tensors:
    found: Tensors = {}
    for kind in model.mappings.values():
        for index in hf_mapping.slice_indices(kind, model):
            parts = kind.split(torch.randn(kind.shape(model)), model)
            found |= {name: part.contiguous() for name, part in zip(kind.names(index), parts, strict=True)}
    return found


def megatron_tensors(critic: bool = False) -> Tensors:
    return {key: torch.randn(shape) for key, shape in hf_mapping.megatron_shapes(ARCHITECTURE, critic).items()}


def write_hf(directory: Path, tensors: Tensors) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_torch_dist(directory: Path, tensors: Tensors) -> None:
    """Megatron-Core's own files, each tensor in one chunk, without a `config.json`."""
    with DistcpFileWriter(directory, "__0_0") as file:
        for key, tensor in tensors.items():
            file.write_tensor(key, (0,) * tensor.dim(), tensor)
        written = file.written_items
    torch.save({"iteration": 7}, directory / "common.pt")
    write_index(directory, [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()], written)


def write_megatron(directory: Path, tensors: Tensors, **changes: object) -> Path:
    """With a manifest, and what is changed in the architecture."""
    stage = manifest.make_staging_dir(directory)
    write_torch_dist(stage, tensors)
    (stage / "config.json").write_text(json.dumps(CONFIG | changes))
    manifest.finalize(stage, directory, {})
    return directory


def copy_tokenizer(origin: Path, directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(origin / name, directory)
    return directory
