"""Tied embeddings in models with experts.

Symptom: a model whose configuration has `tie_word_embeddings` is served with random logits, without an error: no tensor
of its checkpoint fills the output layer.

Upstream: most MoE models of srt/models (Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE, GLM-4.5, MiniMax-M2) build a
`ParallelLMHead` whatever the configuration says.

What it does: after a model is built, whichever it is, a tied one's output layer is its embedding, as SGLang's Qwen3 and
DeepSeek have it. Weights that are loaded or synchronised into the one are the other's.

Can go: when upstream asks for `tie_word_embeddings` in all of them.
"""

from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch
from megatron_bai.compat.sglang_built_models import change_built_models


def tie(model: Any, config: Any) -> None:
    """Make a tied model's embedding its output layer, where it has one of its own.

    Args:
        model: SGLang's, whose parameters are not loaded yet.
        config: its Hugging Face configuration.
    """
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    head = getattr(model, "lm_head", None)
    if not getattr(config, "tie_word_embeddings", False) or not isinstance(head, ParallelLMHead):
        return
    embedding = model.model.embed_tokens
    if head.weight is not embedding.weight:
        assert head.weight.shape == embedding.weight.shape, "ranks split the embedding and the output layer unequally"
        model.lm_head = embedding


def install() -> None:
    """Change every model that is built."""
    change_built_models(tie)


PATCH = Patch(
    name="sglang_tied_embeddings",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-models",
    summary="most models with experts have random logits where embeddings are tied",
    install=install,
)
