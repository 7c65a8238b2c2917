"""Small checkpoints for the tests: written by hand in this process, or by Megatron-Core in one of its own."""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megatron_bai.checkpoint.boxes import Box, split_box
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.torch_dist import DistcpFileWriter, write_index

Tensors = dict[str, torch.Tensor]
Layout = Callable[[str, tuple[int, ...]], Iterable[Box]]


def whole(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
    return [((0,) * len(shape), shape)]


def rows(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
    """Uneven blocks along the first axis."""
    return split_box((0,) * len(shape), shape, max(torch.Size(shape).numel() * 2 // 5, 1))


def columns(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
    """Halves of the last axis, as tensor parallelism cuts a row-parallel weight."""
    if len(shape) < 2:
        return whole(key, shape)
    half = shape[-1] // 2
    zeros = (0,) * (len(shape) - 1)
    return [((*zeros, 0), (*shape[:-1], half)), ((*zeros, half), (*shape[:-1], shape[-1] - half))]


def experts(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
    """A chunk for each layer and expert, with gate and up apart, as Megatron-Core's default is."""
    if len(shape) < 4:
        return whole(key, shape)
    layers, count, width, hidden = shape
    parts = 2 if "fc1" in key else 1
    return [
        ((layer, expert, part * width // parts, 0), (1, 1, width // parts, hidden))
        for expert in range(count)
        for layer in range(layers)
        for part in range(parts)
    ]


def irregular(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
    """Chunks that are no grid: the first row cut in two, the rest whole."""
    if len(shape) < 2 or shape[0] < 2 or shape[1] < 2:
        return whole(key, shape)
    zeros = (0,) * (len(shape) - 2)
    return [
        ((0, 0, *zeros), (1, 1, *shape[2:])),
        ((0, 1, *zeros), (1, shape[1] - 1, *shape[2:])),
        ((1, 0, *zeros), (shape[0] - 1, *shape[1:])),
    ]


def write(path: Path, tensors: Tensors, layout: Layout = whole, objects: dict[str, bytes] | None = None) -> Path:
    """A complete `torch_dist` checkpoint, spread over two files."""
    path.mkdir(parents=True)
    written = []
    with DistcpFileWriter(path, "__0_0") as first, DistcpFileWriter(path, "__1_0") as second:
        for key, data in (objects or {}).items():
            first.write_object(key, data)
        for i, (key, tensor) in enumerate(tensors.items()):
            for j, (offsets, sizes) in enumerate(layout(key, tuple(tensor.shape))):
                box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes))
                (first, second)[(i + j) % 2].write_tensor(key, offsets, tensor[box].clone())
        written = first.written_items + second.written_items
    torch.save({"iteration": 7}, path / "common.pt")
    write_index(path, [(k, t.dtype, tuple(t.shape)) for k, t in tensors.items()], written)
    return path


def saved(value: object) -> bytes:
    """An object as Megatron-Core stores it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def read(path: Path) -> Tensors:
    """Every tensor of a checkpoint, whole."""
    with open_checkpoint(path) as source:
        return {
            key: source.read(key, (0,) * len(entry.shape), entry.shape).clone() for key, entry in source.tensors.items()
        }


def model(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A tiny Mixture-of-Experts' tensors: layers stacked, an fp32 bias beside them, and a table of integers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "embedding.word_embeddings.weight": draw(37, 16).to(dtype),
        "decoder.layers.self_attention.linear_qkv.weight": draw(2, 24, 16).to(dtype),
        "decoder.layers.mlp.router.weight": draw(2, 4, 16).to(dtype),
        "decoder.layers.mlp.router.expert_bias": draw(2, 4),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": draw(2, 4, 12, 16).to(dtype),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": draw(2, 4, 16, 6).to(dtype),
        "decoder.final_layernorm.weight": draw(16).to(dtype),
        "decoder.scale": draw(1)[0].to(dtype),
        "decoder.table": torch.arange(10),
    }


def exact(terms: list[tuple[Tensors, float]], key: str) -> torch.Tensor:
    """Σ coefficient · value in float64."""
    return sum(coefficient * tensors[key].double() for tensors, coefficient in terms)  # type: ignore[return-value]


def provenance(path: Path) -> dict:
    return json.loads((path / "provenance.json").read_text())
