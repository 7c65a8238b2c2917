"""The weights of a token's experts, returned with their ids.

Symptom: none. A server returns the experts of a token and not the weights that it combines their outputs with, without
which what is left of the discrepancy between the engines under R3 has no parts (`replay.weights=server`).

Upstream: srt/state_capturer/routed_experts.py `RoutedExpertsCapturer` keeps `topk` int32 ids a token and layer;
srt/layers/moe/topk.py `_post_process_topk_ids`, through which every router's choice goes, has both.

What it does: the capturer keeps as many columns again, the bits of the float32 weights in the order of the ids. All
that copies, slices and sends ids so sends both: a row of a layer is `[ids, weights]`. A factor that the model
multiplies the experts' sum by is in the weights, as it is in Megatron-Core's. A router that hands over no weights ends
the server.

Can go: when upstream returns weights.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import

if TYPE_CHECKING:
    from torch import Tensor


def scale_weights(weights: "Tensor", topk_config: Any) -> "Tensor":
    """Return weights with the factor that some models multiply by only once the experts' outputs are summed.

    Args:
        weights: `[tokens, topk]`, of a router.
        topk_config: SGLang's, of that router.
    """
    in_weights = topk_config.apply_routed_scaling_factor_on_output
    return weights.float() * (1.0 if in_weights else topk_config.routed_scaling_factor or 1.0)


def widen_capturer(capturer: Any) -> None:
    """Make SGLang's class of capturers keep weights beside ids.

    Args:
        capturer: `RoutedExpertsCapturer`, changed in place: other modules have imported it by name.
    """
    upstream_init, upstream_capture = capturer.__init__, capturer.capture

    def init(self: Any, model_config: Any, *args: Any, **named: Any) -> None:
        text = model_config.hf_text_config
        self.route_topk, self.route_weights = text.num_experts_per_tok, None
        wide = SimpleNamespace(num_experts_per_tok=2 * self.route_topk, num_hidden_layers=text.num_hidden_layers)
        upstream_init(self, SimpleNamespace(hf_text_config=wide), *args, **named)

    def capture(self: Any, layer_id: int, topk_indices: "Tensor") -> None:
        import torch

        weights, self.route_weights, k = self.route_weights, None, self.route_topk
        if weights is None or len(weights) != len(topk_indices):
            raise RuntimeError(
                f"the router of layer {layer_id} hands over no weights: replay.weights=server needs them"
            )
        ids, shared = topk_indices[:, :k].int(), topk_indices[:, k:].int()  # shared experts come last, and are dropped
        bits = weights[:, :k].contiguous().view(torch.int32)
        upstream_capture(self, layer_id, torch.cat([ids, bits, shared], dim=1))

    capturer.__init__, capturer.capture = init, capture


def hand_over_weights(module: Any) -> None:
    """Make every router's choice hand its weights to the capturer, which is given the ids next.

    Args:
        module: SGLang's with `_post_process_topk_ids`, changed in place.
    """
    upstream = module._post_process_topk_ids

    def _post_process_topk_ids(
        topk_ids: "Tensor", topk_weights: "Tensor", topk_config: Any, *args: Any, **named: Any
    ) -> Any:
        capturer = module.get_global_experts_capturer()
        if capturer is not None:
            capturer.route_weights = scale_weights(topk_weights, topk_config)
        return upstream(topk_ids, topk_weights, topk_config, *args, **named)

    module._post_process_topk_ids = _post_process_topk_ids


def install() -> None:
    """Widen the capturer, and hand it the weights."""
    after_import(
        "sglang.srt.state_capturer.routed_experts", lambda module: widen_capturer(module.RoutedExpertsCapturer)
    )
    after_import("sglang.srt.layers.moe.topk", hand_over_weights)


PATCH = Patch(
    name="sglang_route_weights",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-weights",
    summary="replay.weights=server: the weights of a token's experts are not returned",
    install=install,
)
