"""Checkpoints to merge in a benchmark: models of one size in both formats, with random weights."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_bai.checkpoint.hf_files import INDEX
from megatron_bai.checkpoint.torch_dist import DistcpFileWriter, write_index

SOURCES = ("0", "1", "2")
HEADS, GROUPS = 16, 4
FILES = 4  # of a safetensors checkpoint

Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A Qwen3 or Qwen3-MoE (`experts` > 0); sizes as Hugging Face calls them."""

    layers: int
    hidden: int
    width: int  # of the MLP, or of one expert
    experts: int
    vocabulary: int = 32_768

    @property
    def head(self) -> int:
        return self.hidden // HEADS

    def hf(self) -> Iterator[Tensor]:
        """Every tensor by its Hugging Face name."""
        h, q, kv = self.hidden, HEADS * self.head, GROUPS * self.head
        yield "model.embed_tokens.weight", (self.vocabulary, h)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (h,)
            yield f"{layer}.post_attention_layernorm.weight", (h,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"{layer}.self_attn.{name}_proj.weight", (rows, h)
            for name in "qk":
                yield f"{layer}.self_attn.{name}_norm.weight", (self.head,)
            yield f"{layer}.self_attn.o_proj.weight", (h, q)
            mlps = [f"{layer}.mlp.experts.{e}" for e in range(self.experts)] or [f"{layer}.mlp"]
            if self.experts:
                yield f"{layer}.mlp.gate.weight", (self.experts, h)
            for mlp in mlps:
                yield f"{mlp}.gate_proj.weight", (self.width, h)
                yield f"{mlp}.up_proj.weight", (self.width, h)
                yield f"{mlp}.down_proj.weight", (h, self.width)
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (self.vocabulary, h)

    def megatron(self) -> Iterator[Tensor]:
        """Every tensor by Megatron-Core's key, stacked over layers and experts."""
        n, h, q, kv = self.layers, self.hidden, HEADS * self.head, GROUPS * self.head
        layer = "decoder.layers"
        yield "embedding.word_embeddings.weight", (self.vocabulary, h)
        yield "output_layer.weight", (self.vocabulary, h)
        yield "decoder.final_layernorm.weight", (h,)
        yield f"{layer}.self_attention.linear_qkv.layer_norm_weight", (n, h)
        yield f"{layer}.self_attention.linear_qkv.weight", (n, q + 2 * kv, h)
        yield f"{layer}.self_attention.q_layernorm.weight", (n, self.head)
        yield f"{layer}.self_attention.k_layernorm.weight", (n, self.head)
        yield f"{layer}.self_attention.linear_proj.weight", (n, h, q)
        if self.experts:
            yield f"{layer}.pre_mlp_layernorm.weight", (n, h)
            yield f"{layer}.mlp.router.weight", (n, self.experts, h)
            yield f"{layer}.mlp.experts.experts.linear_fc1.weight", (n, self.experts, 2 * self.width, h)
            yield f"{layer}.mlp.experts.experts.linear_fc2.weight", (n, self.experts, h, self.width)
        else:
            yield f"{layer}.mlp.linear_fc1.layer_norm_weight", (n, h)
            yield f"{layer}.mlp.linear_fc1.weight", (n, 2 * self.width, h)
            yield f"{layer}.mlp.linear_fc2.weight", (n, h, self.width)

    def config(self) -> dict[str, object]:
        kind = "qwen3_moe" if self.experts else "qwen3"
        return {
            "architectures": ["Qwen3MoeForCausalLM" if self.experts else "Qwen3ForCausalLM"],
            "model_type": kind,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": GROUPS,
            "head_dim": self.head,
            "intermediate_size": self.width,
            "moe_intermediate_size": self.width,
            "num_experts": self.experts,
            "num_experts_per_tok": min(8, self.experts),
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def model(shape: str, gigabytes: float) -> Model:
    """A model of about this size in bfloat16: many small experts, dense matrices, or 48 layers of tiny experts.

    `tiny` has 128 experts a layer and so 18,432 expert chunks whatever its size; `tiny:N` has N layers.
    """
    kind, _, layers = shape.partition(":")
    if kind == "tiny":
        return Model(int(layers or 48), 64, 16, 128, vocabulary=1024)
    hidden, width, experts = (1024, 384, 64) if kind == "moe" else (1024, 4096, 0)
    one = (max(experts, 1) * 3 * width + 2 * hidden + 2 * GROUPS * hidden // HEADS) * hidden
    return Model(max(round((gigabytes * 1e9 / 2 - 2 * 32_768 * hidden) / one), 1), hidden, width, experts)


def chunks(key: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """As Megatron-Core saves them at tensor parallel size 1: one a layer, and one an expert; gate and up apart."""
    parts = 2 if "fc1.weight" in key else 1
    stacked = 0 if not key.startswith("decoder.layers.") else 2 if ".experts." in key else 1
    rows, rest = (shape[stacked] // parts, shape[stacked + 1 :]) if len(shape) > stacked else (1, ())
    for index in range(math.prod(shape[:stacked])):
        at = tuple(index // math.prod(shape[i + 1 : stacked]) % shape[i] for i in range(stacked))
        for part in range(parts):
            yield (*at, part * rows, *(0 for _ in rest)), (*(1 for _ in at), rows, *rest)


def make(directory: Path, shape: str, gigabytes: float, form: str) -> tuple[int, int]:
    """Write the inputs; returns the bytes and the number of tensors, or of chunks, of one."""
    shutil.rmtree(directory, ignore_errors=True)
    described = model(shape, gigabytes)
    pool = torch.randn(40 << 20).mul_(0.02).bfloat16()  # values to take from: drawing all takes longer than merging
    count = 0

    def draw(seed: int, sizes: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(sizes)
        return pool[(start := (seed * 7919) % (pool.numel() - size + 1)) : start + size].view(sizes).clone()

    for number, name in enumerate(SOURCES):
        path = directory / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(described.config()))
        if form == "safetensors":
            tensors = list(described.hf())
            _save_hf(path, [(key, draw(i + number, sizes)) for i, (key, sizes) in enumerate(tensors)])
            count = len(tensors)
            continue
        boxes = [(key, *box) for key, sizes in described.megatron() for box in chunks(key, sizes)]
        with DistcpFileWriter(path, "__0_0") as first, DistcpFileWriter(path, "__0_1") as second:
            for i, (key, offsets, sizes) in enumerate(boxes):
                (first, second)[i % 2].write_tensor(key, offsets, draw(i + number, sizes))
        torch.save({}, path / "common.pt")
        stacked = [(key, torch.bfloat16, sizes) for key, sizes in described.megatron()]
        write_index(path, stacked, first.written_items + second.written_items)
        count = len(boxes)
    return sum(file.stat().st_size for file in (directory / "0").iterdir()), count


def _save_hf(path: Path, tensors: list[tuple[str, torch.Tensor]]) -> None:
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    for part in range(FILES):
        name = f"model-{part + 1:05}-of-{FILES:05}.safetensors"
        save_file(dict(tensors[part::FILES]), path / name, metadata={"format": "pt"})
        where |= {key: name for key, _ in tensors[part::FILES]}
    total = sum(tensor.nbytes for _, tensor in tensors)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
