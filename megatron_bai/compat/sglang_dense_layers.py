"""Layers without experts in Qwen2-MoE and Qwen3-MoE.

Symptom: a model whose configuration has `mlp_only_layers` or a `decoder_sparse_step` other than 1 is served as another
one, without an error: its dense layers become layers of experts with whatever was in memory.

Upstream: `Qwen2MoeDecoderLayer` and `Qwen3MoeDecoderLayer` of srt/models/qwen2_moe.py and qwen3_moe.py say
`is_layer_sparse = True`. What they would build otherwise, `Qwen2MoeMLP`, does not take the batch that they pass.

What it does: once a layer is built, one that is dense gets SGLang's own MLP in place of the experts, and it and its
neighbours the boundaries that GLM-4.5 gives such layers, the same functions of SGLang's.

Can go: when upstream reads both keys.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import

# Modules of srt/models → the class of their layers
LAYERS = {"qwen2_moe": "Qwen2MoeDecoderLayer", "qwen3_moe": "Qwen3MoeDecoderLayer"}


def is_sparse(config: Any, layer: int) -> bool:
    """Return whether a layer has experts.

    Args:
        config: Hugging Face's, of a Qwen2-MoE or Qwen3-MoE.
        layer: counted from 0; one beyond the model's answers, too.
    """
    dense = getattr(config, "mlp_only_layers", None) or ()
    return layer not in dense and (layer + 1) % getattr(config, "decoder_sparse_step", 1) == 0


def make_dense_mlp(upstream: type) -> type:
    """Make `Qwen2MoeMLP` with the arguments that a layer calls its MLP with."""

    class DenseMLP(upstream):  # type: ignore[misc]  # SGLang's class is known at run time alone
        def forward(self, x: Any, forward_batch: Any = None) -> Any:
            return super().forward(x) if x.shape[0] else x

    return DenseMLP


def make_init(
    upstream: Callable[..., None], finish: Callable[[Any, Any, int, dict[str, Any]], None]
) -> Callable[..., None]:
    """Make the constructor of a layer, which calls `upstream` and then `finish`.

    Args:
        upstream: of a class in `LAYERS`.
        finish: gives a layer that was built what it has in another way: called with the layer, its configuration, its
            number, and the arguments that say where its MLP is (`quant_config`, `prefix`).
    """

    @functools.wraps(upstream)
    def init(
        self: Any, config: Any, layer_id: int, start_layer: int = 0, quant_config: Any = None, prefix: str = "",
        alt_stream: Any = None,
    ) -> None:  # fmt: skip
        upstream(self, config, layer_id, start_layer, quant_config, prefix, alt_stream)
        finish(self, config, layer_id, {"quant_config": quant_config, "prefix": f"{prefix}.mlp" if prefix else "mlp"})

    return init


def build_dense_mlp(config: Any, **where: Any) -> Any:
    """Build the MLP of a dense layer of the sizes that the configuration has.

    Args:
        config: Hugging Face's.
        where: what else `Qwen2MoeMLP` takes, which differs between releases.
    """
    from sglang.srt.models.qwen2_moe import Qwen2MoeMLP

    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    return make_dense_mlp(Qwen2MoeMLP)(**sizes, hidden_act=config.hidden_act, **where)


def _finish_layer(layer: Any, config: Any, layer_id: int, place: dict[str, Any]) -> None:
    """Give a dense layer its MLP, on one rank or on all as SGLang's arguments say, and its neighbours boundaries."""
    from sglang.srt.layers.layer_boundary import enable_moe_dense_fully_dp

    if not layer.is_layer_sparse:
        return  # the diff in patches/ is applied as well
    before, layer.is_layer_sparse, after = (is_sparse(config, layer_id + step) for step in (-1, 0, 1))
    if not layer.is_layer_sparse:
        rank, size = (0, 1) if enable_moe_dense_fully_dp() else (None, None)
        layer.mlp = build_dense_mlp(config, **place, tp_rank=rank, tp_size=size)
    if not (before and layer.is_layer_sparse and after):
        layer.attn_boundary, layer.ffn_boundary = _make_boundaries(layer, config, before, after)


def _make_boundaries(layer: Any, config: Any, before: bool, after: bool) -> Any:
    """Make what is between a layer's attention, its MLP and the layers around, which may have experts or not."""
    from sglang.srt.layers.layer_boundary import declare_attn, declare_ffn, make_stages

    sparse = layer.is_layer_sparse
    return make_stages(
        (declare_attn(), layer.input_layernorm),
        (declare_ffn(sparse=sparse, next_sparse=after), layer.post_attention_layernorm),
        previous=declare_ffn(sparse=before, next_sparse=sparse) if layer.layer_id else None,
        terminal=layer.layer_id == config.num_hidden_layers - 1,
    )


def install() -> None:
    """Replace the constructors of both models' layers."""

    def replace(name: str, module: Any) -> None:
        layer = getattr(module, name)
        layer.__init__ = make_init(layer.__init__, _finish_layer)

    for model, name in LAYERS.items():
        after_import(f"sglang.srt.models.{model}", functools.partial(replace, name))


PATCH = Patch(
    name="sglang_dense_layers",
    distribution="sglang",
    versions=releases.sglang_releases(lambda release: not release.has_stage_facts),
    scope="sglang-models",
    summary="Qwen2-MoE and Qwen3-MoE with dense layers are served as other models",
    install=install,
    mended_in=releases.sglang_releases(lambda release: release.has_stage_facts),
)
