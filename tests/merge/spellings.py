"""One model's weights under the names and shapes that Megatron-Core and transformers save them with.

Written out by hand, so that it can disagree with `megatron_bai.merge.tensor_names.canonical_names`. A model is a dict
of single parameters: (kind, layer, expert) → tensor, with layer and expert None where there is none.
"""

from collections.abc import Callable

import checkpoints
import torch

Model = dict[tuple[str, int | None, int | None], torch.Tensor]
LAYERS, EXPERTS, HIDDEN, INNER, TOKENS = 3, 4, 7, 5, 9


def model(seed: int, dense: int = 0, dtype: torch.dtype = torch.bfloat16) -> Model:
    """Random weights; the first `dense` layers have no experts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    found: Model = {(kind, None, None): draw(TOKENS, HIDDEN) for kind in ("embedding", "output")}
    found["final_norm", None, None] = draw(HIDDEN)
    for layer in range(LAYERS):
        found["input_norm", layer, None] = draw(HIDDEN)
        found["qkv", layer, None] = draw(8, HIDDEN)
        found["mlp_norm", layer, None] = draw(HIDDEN)
        if layer < dense:
            found["fc1", layer, None], found["fc2", layer, None] = draw(2 * INNER, HIDDEN), draw(HIDDEN, INNER)
            continue
        found["router", layer, None] = draw(EXPERTS, HIDDEN)
        found["bias", layer, None] = draw(EXPERTS).float()
        for expert in range(EXPERTS):
            found["fc1", layer, expert] = draw(2 * INNER, HIDDEN)
            found["fc2", layer, expert] = draw(HIDDEN, INNER)
    return found


NAMES = {
    "embedding": "embedding.word_embeddings.weight",
    "output": "output_layer.weight",
    "final_norm": "decoder.final_layernorm.weight",
    "input_norm": "self_attention.linear_qkv.layer_norm_weight",
    "qkv": "self_attention.linear_qkv.weight",
    "router": "mlp.router.weight",
    "bias": "mlp.router.expert_bias",
    "fc1": "linear_fc1.weight",
    "fc2": "linear_fc2.weight",
}


def _name(kind: str, expert: bool, local: bool) -> str:
    """Behind the layer's prefix."""
    if kind == "mlp_norm":
        return "mlp.linear_fc1.layer_norm_weight" if local else "pre_mlp_layernorm.weight"
    if kind in ("fc1", "fc2"):
        return f"mlp.experts.experts.{NAMES[kind]}" if expert else f"mlp.{NAMES[kind]}"
    return NAMES[kind]


def by_layer(weights: Model, local: bool = False) -> checkpoints.Tensors:
    """Megatron-Core's keys where layers differ in kind: one for each layer, experts stacked."""
    found = {}
    for (kind, layer, expert), tensor in weights.items():
        key = NAMES[kind] if layer is None else f"decoder.layers.{layer}.{_name(kind, expert is not None, local)}"
        found[key] = tensor if expert is None else []
    for (kind, layer, expert), tensor in weights.items():
        if expert is not None:
            found[f"decoder.layers.{layer}.{_name(kind, True, local)}"].append(tensor)
    return {key: torch.stack(value) if isinstance(value, list) else value for key, value in found.items()}


def stacked(weights: Model, local: bool = False) -> checkpoints.Tensors:
    """Megatron-Core's default: layers stacked too."""
    found: dict = {}
    for key, tensor in by_layer(weights, local).items():
        parts = key.split(".")
        if parts[1] == "layers":
            found.setdefault(".".join([*parts[:2], *parts[3:]]), []).append(tensor)
        else:
            found[key] = tensor
    return {key: torch.stack(value) if isinstance(value, list) else value for key, value in found.items()}


def singleton(weights: Model, local: bool = False) -> checkpoints.Tensors:
    """Megatron-Core's `singleton_local_shards`: a key for each expert, gate and up apart in every MLP."""
    found = {}
    for (kind, layer, expert), tensor in weights.items():
        key = NAMES[kind] if layer is None else f"decoder.layers.{layer}.{_name(kind, expert is not None, local)}"
        if expert is not None:
            key = key.replace("experts.experts.", f"experts.experts.{expert}.")
        if kind == "fc1":
            found[f"{key}_w"], found[f"{key}_v"] = tensor[:INNER].clone(), tensor[INNER:].clone()
        else:
            found[key] = tensor
    return found


HF = {
    "embedding": "model.embed_tokens.weight",
    "output": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "input_norm": "input_layernorm.weight",
    "qkv": "self_attn.q_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "bias": "mlp.gate.e_score_correction_bias",
}


def hf(weights: Model) -> checkpoints.Tensors:
    """As Hugging Face checkpoints are published: a tensor for each projection of each expert."""
    found = {}
    for (kind, layer, expert), tensor in weights.items():
        at = "" if layer is None else f"model.layers.{layer}."
        inside = f"{at}mlp." if expert is None else f"{at}mlp.experts.{expert}."
        if kind == "fc1":
            found[inside + "gate_proj.weight"] = tensor[:INNER].clone()
            found[inside + "up_proj.weight"] = tensor[INNER:].clone()
        elif kind == "fc2":
            found[inside + "down_proj.weight"] = tensor
        else:
            found[at + HF[kind]] = tensor
    return found


def hf_fused(weights: Model) -> checkpoints.Tensors:
    """As transformers 5 and mergekit hold experts: stacked, gate above up."""
    found = {key: tensor for key, tensor in hf(weights).items() if ".experts." not in key}
    for layer in {layer for _, layer, expert in weights if expert is not None}:
        for kind, name in (("fc1", "gate_up_proj"), ("fc2", "down_proj")):
            tensors = [weights[kind, layer, expert] for expert in range(EXPERTS)]
            found[f"model.layers.{layer}.mlp.experts.{name}"] = torch.stack(tensors)
    return found


MEGATRON: list[Callable[[Model], checkpoints.Tensors]] = [
    stacked,
    by_layer,
    singleton,
    lambda weights: stacked(weights, local=True),
    lambda weights: singleton(weights, local=True),
]


def merged(terms: list[tuple[Model, float]], coefficients=None) -> Model:
    """The weighted sum in plain torch: in float32, or float64 for float32 tensors, rounded once.

    Args:
        coefficients: of a parameter, given (kind, layer, expert), where they are not those of `terms`.
    """
    found = {}
    for at, value in terms[0][0].items():
        numbers = coefficients(at) if coefficients else [c for _, c in terms]
        wide = torch.float64 if value.dtype.itemsize > 2 else torch.float32
        total = None
        for (weights, _), number in zip(terms, numbers):
            if number:
                term = weights[at].to(wide) * number
                total = term if total is None else total + term
        found[at] = total.to(value.dtype)
    return found
