"""Ling and Ring in plain torch, after their published configuration: what their checkpoints' own code computes.

Nothing of the library is used: names, order of rows, rotation and routers are written down a second time.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, the name that torch code has for it
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, size = config["moe_intermediate_size"], config.get("head_dim") or hidden // heads
    found: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        found |= {f"{name}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found[f"{name}attention.query_key_value.weight"] = ((heads + 2 * groups) * size, hidden)
        found[f"{name}attention.dense.weight"] = (hidden, heads * size)
        if config.get("use_qkv_bias"):
            found[f"{name}attention.query_key_value.bias"] = ((heads + 2 * groups) * size,)
        if config.get("use_qk_norm"):
            found |= {f"{name}attention.{x}_layernorm.weight": (size,) for x in ("query", "key")}
        if layer < config["first_k_dense_replace"]:
            widths = {"": config["intermediate_size"]}
        else:
            found[f"{name}mlp.gate.weight"] = (config["num_experts"], hidden)
            if config.get("moe_router_enable_expert_bias"):
                found[f"{name}mlp.gate.expert_bias"] = (config["num_experts"],)
            widths = {f"experts.{expert}.": width for expert in range(config["num_experts"])}
            widths["shared_experts."] = width * config["num_shared_experts"]
        for part, rows in widths.items():
            found |= {f"{name}mlp.{part}{x}_proj.weight": (rows, hidden) for x in ("gate", "up")}
            found[f"{name}mlp.{part}down_proj.weight"] = (hidden, rows)
    return found


def make(directory: Path) -> None:
    """Write random weights beside the `config.json` that is there."""
    config = json.loads((directory / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator) * 0.1
        tensors[name] = noise + 1 if name.endswith("norm.weight") else noise
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Compute `[B, T, vocabulary]` of `[B, T]` tokens."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    hidden = tensors["model.word_embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        weights = {k.removeprefix(p): t for k, t in tensors.items() if k.startswith(p := f"model.layers.{layer}.")}
        eps = config["rms_norm_eps"]
        hidden = hidden + _attention(_norm(hidden, weights["input_layernorm.weight"], eps), weights, config)
        normed = _norm(hidden, weights["post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            hidden = hidden + _mlp(normed, weights, "mlp.")
        else:
            hidden = hidden + _experts(normed.flatten(0, 1), weights, config).view_as(normed)
    return _norm(hidden, tensors["model.norm.weight"], config["rms_norm_eps"]) @ tensors["lm_head.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _mlp(x: torch.Tensor, weights: Tensors, part: str) -> torch.Tensor:
    gate, up, down = (weights[f"{part}{x}_proj.weight"] for x in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _attention(x: torch.Tensor, weights: Tensors, config: dict[str, Any]) -> torch.Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    projected = x @ weights["attention.query_key_value.weight"].T
    projected = projected + weights.get("attention.query_key_value.bias", 0)
    query, key, value = projected.unflatten(-1, (-1, size)).split([heads, groups, groups], dim=2)
    if config.get("use_qk_norm"):
        query = _norm(query, weights["attention.query_layernorm.weight"], config["rms_norm_eps"])
        key = _norm(key, weights["attention.key_layernorm.weight"], config["rms_norm_eps"])
    query, key = (_rotate(each, config, size) for each in (query, key))
    key, value = (each.repeat_interleave(heads // groups, dim=2) for each in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / size**0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(later, -torch.inf).softmax(-1), value)
    return mixed.flatten(2) @ weights["attention.dense.weight"].T


def _rotate(x: torch.Tensor, config: dict[str, Any], size: int) -> torch.Tensor:
    """Turn the first part of each head, of which element i and i + half are a pair."""
    rotated = int(size * config.get("partial_rotary_factor", 1.0))
    half = rotated // 2
    angles = torch.arange(x.shape[1])[:, None] * config["rope_theta"] ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, half]
    first, second, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _experts(x: torch.Tensor, weights: Tensors, config: dict[str, Any]) -> torch.Tensor:
    chosen, share = _route(x @ weights["mlp.gate.weight"].T, weights, config)
    found = _mlp(x, weights, "mlp.shared_experts.")
    for expert in range(config["num_experts"]):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        out = _mlp(x[rows], weights, f"mlp.experts.{expert}.") * share[rows, places, None]
        found = found.index_add(0, rows, out)
    return found


def _route(scores: torch.Tensor, weights: Tensors, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of each token and their weights, `[rows, topk]`."""
    topk = config["num_experts_per_tok"]
    if not config.get("moe_router_enable_expert_bias"):
        found, chosen = torch.topk(scores.softmax(-1), topk, dim=-1)
        return chosen, found / found.sum(-1, keepdim=True) if config.get("norm_topk_prob", True) else found
    scores = scores.sigmoid()
    biased = scores + weights["mlp.gate.expert_bias"]
    grouped = biased.unflatten(-1, (config["n_group"], -1))
    best = grouped.sort(-1, descending=True).values[..., :2].sum(-1)
    kept = best >= best.sort(-1, descending=True).values[..., config["topk_group"] - 1, None]
    biased = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    chosen = torch.topk(biased, topk, dim=-1)[1]
    found = scores.gather(-1, chosen)
    return chosen, found / found.sum(-1, keepdim=True) * config["routed_scaling_factor"]
