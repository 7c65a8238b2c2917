"""Qwen3-MoE: grouped-query attention with norms of queries and keys, SwiGLU experts, softmax top-k routers."""

from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.model.families.architecture import Architecture, Values
from megatron_bai.model.families.family import Family
from megatron_bai.model.families.layer_parts import with_bias
from megatron_bai.model.families.param_mapping import (
    ParamMapping,
    attention_mappings,
    dense_mappings,
    embedding_mappings,
    expert_mappings,
    router_mappings,
)


class QwenMoe(Family):
    """What Qwen's families share: layers are dense where `mlp_only_layers` or `decoder_sparse_step` says so."""

    def moe_layers(self, values: Values, num_layers: int) -> list[int]:
        """Return every `decoder_sparse_step`-th layer that is not among `mlp_only_layers`.

        Args:
            values: of the configuration.
            num_layers: of the decoder.

        Raises:
            UserError: a step that is none.
        """
        step, dense = values["decoder_sparse_step"], values.get("mlp_only_layers") or []
        if type(step) is not int or step < 1:
            raise UserError(f"decoder_sparse_step is {step!r}, which is no number of layers")
        return [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]

    def unserved(self, model: Architecture) -> str:
        """Return that attention is dual chunk attention (arXiv 2402.17463), which is full here and in transformers.

        Args:
            model: the architecture.
        """
        if model.values.get("dual_chunk_attention_config"):
            return f"it computes dual_chunk_attention_config (srt/models/{self.name}.py), attention is full here"
        return super().unserved(model)


class Qwen3Moe(QwenMoe):
    """Queries and keys are normed."""

    name = "qwen3_moe"
    model_types = ("qwen3_moe",)
    transformers_class = "Qwen3MoeForCausalLM"
    preset = {
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }
    served_by = "sglang.srt.models.qwen3_moe"

    def transformer_arguments(self, model: Architecture) -> dict[str, Any]:
        """Return norms of queries and keys, biases, and how the router's weights are normalised."""
        return {
            "qk_layernorm": True,
            "add_qkv_bias": bool(model.values["attention_bias"]),
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not model.values["norm_topk_prob"],
        }

    def adapt_layer(self, layer: Any, model: Architecture, transformer_engine: bool) -> None:
        """Give the projection behind attention its bias: in Megatron-Core all linear layers have one, or none.

        Args:
            layer: the spec, changed in place.
            model: the architecture.
            transformer_engine: not used.
        """
        if model.values["attention_bias"]:
            attention = layer.submodules.self_attention.submodules
            attention.linear_proj = with_bias(attention.linear_proj)

    def mappings(self, model: Architecture) -> tuple[ParamMapping, ...]:
        """Return the kinds of parameters as Qwen publishes them."""
        bias = bool(model.values["attention_bias"])
        return (
            *embedding_mappings(model),
            *attention_mappings(qkv_bias=bias, output_bias=bias, head_norms=True),
            *router_mappings(),
            *expert_mappings(),
            *dense_mappings(),
        )


FAMILY = Qwen3Moe()
