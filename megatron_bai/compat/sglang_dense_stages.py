"""Layers without experts in Qwen2-MoE and Qwen3-MoE, in releases whose layers declare what they have.

Symptom: as of `sglang_dense_layers`: a model whose configuration has `mlp_only_layers` or a `decoder_sparse_step` other
than 1 is served as another one, without an error.

Upstream: `stage_facts` of `Qwen2MoeDecoderLayer` and `Qwen3MoeDecoderLayer` (srt/models/qwen2_moe.py, qwen3_moe.py)
says that every layer has experts. A layer and its neighbours follow it; but `Qwen2MoeMLP`, which a dense layer gets,
does not take the batch that the layer passes, and is split where `--moe-dense-tp-size 1` wants it whole.

What it does: `stage_facts` reads the configuration, and a dense layer's MLP is built and called as GLM-4.5's is.

Can go: when upstream reads both keys.
"""

import functools
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import
from megatron_bai.compat.sglang_dense_layers import LAYERS, build_dense_mlp, is_sparse, make_init


def stage_facts(config: Any, layer_id: int) -> Any:
    """Declare a layer's attention and MLP.

    Args:
        config: Hugging Face's, of a Qwen2-MoE or Qwen3-MoE.
        layer_id: counted from 0.
    """
    from sglang.srt.layers.layer_boundary import declare_attn, declare_ffn

    sparse, after = is_sparse(config, layer_id), is_sparse(config, layer_id + 1)
    return declare_attn(), declare_ffn(sparse=sparse, next_layer_sparse=after)


def _finish_layer(layer: Any, config: Any, layer_id: int, place: dict[str, Any]) -> None:
    """Give a dense layer its MLP again, whose output the layer's boundary sums over ranks."""
    from sglang.srt.layers.layer_boundary import is_dense_ffn_fully_dp

    if not layer.is_layer_sparse:
        group = "replicated" if is_dense_ffn_fully_dp() else "tp"
        layer.mlp = build_dense_mlp(config, **place, parallel_group=group, reduce_results=False)


def install() -> None:
    """Replace what both models' layers declare, and their constructors."""

    def replace(name: str, module: Any) -> None:
        layer = getattr(module, name)
        assert callable(layer.stage_facts)
        layer.stage_facts = staticmethod(stage_facts)
        layer.__init__ = make_init(layer.__init__, _finish_layer)

    for model, name in LAYERS.items():
        after_import(f"sglang.srt.models.{model}", functools.partial(replace, name))


PATCH = Patch(
    name="sglang_dense_stages",
    distribution="sglang",
    versions=releases.sglang_releases(lambda release: release.has_stage_facts),
    scope="sglang-models",
    summary="Qwen2-MoE and Qwen3-MoE with dense layers are served as other models",
    install=install,
    mended_in=releases.sglang_releases(lambda release: not release.has_stage_facts),
)
