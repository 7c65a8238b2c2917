"""Parameter groups of a Mixture-of-Experts transformer, told from a tensor's name."""

import re

# The first pattern that is found in the name decides.
GROUPS = {
    "router": r"\brouter\.|\bmlp\.gate\.",
    "shared experts": r"shared_expert",
    "experts": r"\bexperts\.",
    "norms": r"layernorm|layer_norm|\bnorm\b|[qk]_norm",
    "attention": r"attention|attn",
    "embeddings": r"embed|output_layer|lm_head",
    "dense MLP": r"\bmlp\.",
}

LAYER_RANGE = re.compile(r"^layers\.(\d+)(?:-(\d+))?(?:/|$)")  # in front of a pattern, or alone


def param_group(key: str) -> str:
    """The group of a tensor, or `other`."""
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, key)), "other")


def parse_layers(pattern: str) -> range | None:
    """The layers that a pattern is about, or None: all, and tensors that belong to no layer."""
    found = LAYER_RANGE.match(pattern)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else None


def matches(pattern: str, key: str, layer: int | None = None) -> bool:
    """Whether a pattern is about a tensor, or about one decoder layer of it.

    A pattern is the name of a group, or a regular expression that has a match in the tensor's name. `layers.3` or
    `layers.0-11` (both ends included) before it, with a slash between, or alone, is about these layers only, whether
    the checkpoint has a tensor for each layer or stacks them in one.

    Args:
        layer: counted from 0; None where the tensor belongs to no layer.

    Raises:
        re.error: it is no regular expression.
    """
    layers = parse_layers(pattern)
    rest = LAYER_RANGE.sub("", pattern, count=1) if layers is not None else pattern
    found = param_group(key) == rest if rest in GROUPS else re.search(rest, key) is not None
    return found and (layers is None or layer in layers)
