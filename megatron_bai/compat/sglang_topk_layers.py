"""Routers that know their layer, so that routes are captured.

Symptom: with `--enable-return-routed-experts` the first forward pass of Mixtral, OLMoE, MiniMax-M2 and others fails in
`BaseDeviceCache.capture`: no tensor can be written to the column of layer None.

Upstream: 21 of srt/models/*.py build `TopK` (srt/layers/moe/topk.py) without its `layer_id`.

What it does: after a model is built, whichever it is, each `TopK` without a layer gets the number in its own name.

Can go: when upstream names the layer in all of them (SGLang #38718 does so in one).
"""

from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch
from megatron_bai.compat.sglang_built_models import change_built_models


def name_layers(model: Any) -> None:
    """Give each router of a model the number of its layer, where it has none.

    Args:
        model: SGLang's, whose modules' names have `layers.N`.
    """
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.utils import get_layer_id

    for name, module in model.named_modules():
        if isinstance(module, TopK) and module.layer_id is None:
            module.layer_id = get_layer_id(name)


def install() -> None:
    """Change every model that is built."""
    change_built_models(lambda model, config: name_layers(model))


PATCH = Patch(
    name="sglang_topk_layers",
    distribution="sglang",
    versions=releases.sglang_releases(lambda release: not release.has_topk_layers),
    scope="sglang-models",
    summary="21 models build routers without their layer: capturing routes fails",
    install=install,
    mended_in=releases.sglang_releases(lambda release: release.has_topk_layers),
)
