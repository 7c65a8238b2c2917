"""Find the routers of a live model, one for each MoE layer of its decoder, or stop.

Megatron-Core keeps a global list of replay handles in the order of construction. It holds those of models built earlier
(replaying into them does nothing, silently), and it says nothing of which layer a handle belongs to.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_bai.compat import releases
from megatron_bai.errors import UserError

Routers = dict[int, Any]
"""Decoder layer, counted from 0 over the whole model → its `TopKRouter`."""


def moe_layer_indices(config: Any) -> list[int]:
    """Return the decoder layers with experts, counted from 0, as a `TransformerConfig` describes the whole model."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return list(range(0, config.num_layers, frequency))
    return [layer for layer, sparse in enumerate(frequency) if sparse]


def bind_routers(chunks: Sequence[torch.nn.Module], expected: Sequence[int], pipeline_group: Any = None) -> Routers:
    """Find the routers of this rank's model chunks, by layer. Collective over `pipeline_group` when given.

    Layers for multi-token prediction have numbers like the decoder's and are no part of the rollout: they are left out,
    and their routers choose freely.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        expected: the MoE layers of the whole model.
        pipeline_group: of the pipeline's ranks; None: `chunks` are the whole model.

    Raises:
        UserError: a router that is meant for inference.
        RuntimeError: a router without a replay handle, two routers of one layer, or layers bound over the pipeline that
            are not exactly those expected.
    """
    bound: Routers = {}
    for router in {id(router): router for chunk in chunks for router in _decoder_routers(chunk)}.values():
        layer = router.layer_number - 1
        inference_router = releases.megatron_release().inference_router
        if inference_router in (base.__name__ for base in type(router).__mro__):
            raise UserError(
                f"the router of layer {layer} is an {inference_router}, which answers in another form while "
                "Megatron-Core infers: routing replay needs transformer_impl=local or transformer_engine"
            )
        if router.router_replay is None:
            raise RuntimeError(f"the router of layer {layer} has no replay handle: moe_enable_routing_replay was off")
        if layer in bound:
            raise RuntimeError(f"two routers say they are layer {layer}: the chunks were built with wrong offsets")
        bound[layer] = router
    stage_layers = [sorted(bound)]
    if pipeline_group is not None:
        stage_layers = [[] for _ in range(dist.get_world_size(pipeline_group))]
        dist.all_gather_object(stage_layers, sorted(bound), group=pipeline_group)
    all_layers = sorted(layer for layers in stage_layers for layer in layers)
    if all_layers != sorted(expected):
        raise RuntimeError(f"routing replay bound MoE layers {all_layers}, the model has {sorted(expected)}")
    return dict(sorted(bound.items()))


def _decoder_routers(module: torch.nn.Module) -> Iterator[Any]:
    """Yield the routers of a module's decoder layers."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock, MultiTokenPredictionLayer

    if isinstance(module, (MultiTokenPredictionBlock, MultiTokenPredictionLayer)):
        return
    if isinstance(module, TopKRouter):
        yield module
    for child in module.children():
        yield from _decoder_routers(child)
