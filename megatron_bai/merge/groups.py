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


def group_of(key: str) -> str:
    """The group of a tensor, or `other`."""
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, key)), "other")


def fits(pattern: str, key: str) -> bool:
    """Whether a tensor is in the group called `pattern`, or else its name has a match of that regular expression."""
    return group_of(key) == pattern if pattern in GROUPS else re.search(pattern, key) is not None
