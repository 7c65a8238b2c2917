"""Parameter groups of a Mixture-of-Experts transformer, by a tensor's name, and patterns that name tensors."""

import re

# The first pattern with a match in the name decides.
GROUPS = {
    "router": r"\brouter\.|\b(mlp|block_sparse_moe)\.(gate\.|e_score_correction_bias$)",
    "shared experts": r"shared_expert",
    "experts": r"\bexperts\.",
    "norms": r"layernorm|layer_norm|\bnorm\b|[qk]_norm",
    "attention": r"attention|attn",
    "embeddings": r"embed|output_layer|lm_head",
    "dense MLP": r"\bmlp\.",
}

LAYER_RANGE = re.compile(r"^layers\.(\d+)(?:-(\d+))?(?:/|$)")  # in front of a pattern, or alone


def param_group(key: str) -> str:
    """Return the group of a tensor, or `other`."""
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, key)), "other")


def parse_layers(pattern: str) -> range | None:
    """Return the layers that a pattern names; None where it names none and matches in all, and outside layers."""
    match = LAYER_RANGE.match(pattern)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else None


def matches(pattern: str, key: str, layer: int | None = None) -> bool:
    """Return whether a pattern matches a tensor, or one decoder layer of it.

    A pattern is the name of a group, or a regular expression that has a match in the tensor's name. `layers.3` or
    `layers.0-11` (both ends included) before it, with a slash between, or alone, restricts it to these layers, whether
    the checkpoint has a tensor for each layer or stacks them in one.

    Args:
        pattern: of a setting such as `merge.alpha_for`.
        key: name of the tensor.
        layer: counted from 0; None where the tensor belongs to no layer.

    Raises:
        re.error: the pattern is no regular expression.
    """
    layers = parse_layers(pattern)
    name = LAYER_RANGE.sub("", pattern, count=1) if layers is not None else pattern
    name_matches = param_group(key) == name if name in GROUPS else re.search(name, key) is not None
    return name_matches and (layers is None or layer in layers)
