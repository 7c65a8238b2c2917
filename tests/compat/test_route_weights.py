"""A capturer that keeps weights beside ids, on stand-ins for SGLang's classes; `live` asks servers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bai.compat import sglang_route_weights

TEXT = SimpleNamespace(num_experts_per_tok=2, num_hidden_layers=3)


class Router(SimpleNamespace):
    """SGLang's module with `_post_process_topk_ids`, which captures ids as that does."""

    def get_global_experts_capturer(self) -> Any:
        return self.capturer


def make(scale: float | None = None, in_weights: bool = False) -> tuple[Any, Any, Any]:
    """A capturer, a module that hands it what routers choose, and a router's settings."""

    class Capturer:
        def __init__(self, model_config: Any, num_tokens: int):
            self.width = model_config.hf_text_config.num_experts_per_tok
            self.layers = model_config.hf_text_config.num_hidden_layers
            self.rows = num_tokens
            self.kept: list[tuple[int, torch.Tensor]] = []

        def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
            self.kept.append((layer_id, topk_indices))

    def post_process(topk_ids: torch.Tensor, topk_weights: torch.Tensor, topk_config: Any, layer_id: int) -> str:
        module.capturer.capture(layer_id=layer_id, topk_indices=topk_ids)
        return "processed"

    module = Router(_post_process_topk_ids=post_process)
    sglang_route_weights.widen_capturer(Capturer)
    sglang_route_weights.hand_over_weights(module)
    module.capturer = Capturer(SimpleNamespace(hf_text_config=TEXT), num_tokens=7)
    settings = SimpleNamespace(routed_scaling_factor=scale, apply_routed_scaling_factor_on_output=in_weights)
    return module.capturer, module, settings


@pytest.mark.parametrize(
    ("scale", "in_weights", "factor"), [(None, False, 1.0), (2.5, False, 2.5), (2.5, True, 1.0), (1.0, False, 1.0)]
)
def test_a_row_is_ids_then_the_bits_of_their_weights(scale: float | None, in_weights: bool, factor: float) -> None:
    capturer, module, settings = make(scale, in_weights)
    assert (capturer.width, capturer.layers, capturer.rows) == (4, 3, 7)
    ids = torch.tensor([[5, 1, 8], [0, 7, 8]])  # the last is a shared expert's
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    assert module._post_process_topk_ids(topk_ids=ids, topk_weights=weights, topk_config=settings, layer_id=2) == (
        "processed"
    )
    ((layer, row),) = capturer.kept
    assert layer == 2 and row.dtype == torch.int32 and row.shape == (2, 5)
    assert torch.equal(row[:, [0, 1, 4]], ids.int())
    assert torch.equal(row[:, 2:4].contiguous().view(torch.float32), weights[:, :2] * factor)


def test_a_router_that_hands_over_no_weights_is_named() -> None:
    """Also after one that did: its weights are not another's."""
    capturer, module, settings = make()
    module._post_process_topk_ids(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]]), settings, layer_id=0)
    with pytest.raises(RuntimeError, match="router of layer 1 hands over no weights"):
        capturer.capture(1, torch.tensor([[1, 2]]))
