"""Weights as a quantised server has them, against values that are written out one by one."""

import numpy as np
import pytest
import torch

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import fleet
from megatron_bai.rollout.servers.quantize import fake_quantize

NAME = "model.layers.0.mlp.experts.0.up_proj.weight"
ROUTERS = (
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.shared_expert_gate.weight",
    "model.layers.1.block_sparse_moe.gate.weight",
    "model.layers.1.mlp.router.weight",
    "model.layers.1.mlp.experts.gate_up_proj_bias",  # of all experts of gpt-oss
)
OF_ONE_AXIS = (
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.1.mlp.gate.expert_bias",
)


def e4m3() -> tuple[np.ndarray, np.ndarray]:
    """Every finite magnitude of the format: 4 bits of exponent with bias 7, 3 of mantissa; and which are even."""
    values = [(m / 8) * 2.0**-6 for m in range(8)] + [
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)
    ]
    assert values[-2] == 448  # the last one is NaN's
    return np.array(values[:-1]), np.arange(len(values) - 1) % 2 == 0


def nearest(scaled: float) -> float:
    values, even = e4m3()
    gaps = np.abs(values - abs(scaled))
    ties = np.flatnonzero(gaps == gaps.min())
    return float(np.copysign(values[ties[even[ties]][0] if len(ties) > 1 else ties[0]], scaled))


@pytest.mark.parametrize("shape", [(3, 5), (130, 257)])  # within one block; over six, none full in both directions
def test_fp8_is_the_nearest_value_of_each_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 100.0  # the first block has coarse steps, the others must not
    found = fake_quantize(NAME, weight, "fp8")
    assert found.shape == weight.shape and found.dtype == weight.dtype
    for i, j in np.random.default_rng(0).integers(0, shape, (300, 2)).tolist() + [[0, 0], [shape[0] - 1, shape[1] - 1]]:
        block = weight[i // 128 * 128 :, j // 128 * 128 :][:128, :128]
        scale = block.abs().max() / np.float32(448)
        assert found[i, j].item() == (nearest(float(weight[i, j] / scale)) * scale).item()


def test_int8_has_a_scale_a_row() -> None:
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    found = fake_quantize(NAME, weight, "int8").numpy()
    for row, kept in zip(weight.numpy(), found):
        scale = max(np.abs(row).max() / np.float32(127), np.finfo(np.float32).tiny)
        np.testing.assert_array_equal(kept, np.rint(row / scale) * scale)
        assert len(np.unique(kept)) <= 255


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_experts_in_one_transposed_tensor_are_rounded_one_by_one(form: str) -> None:
    experts = torch.randn(3, 130, 140, generator=torch.Generator().manual_seed(0))
    found = fake_quantize("model.layers.0.mlp.experts.gate_up_proj", experts, form)
    assert found.is_contiguous()  # as a process group sends it
    for kept, expert in zip(found, experts, strict=True):
        assert torch.equal(kept, fake_quantize(NAME, expert.T.contiguous(), form).T)


def test_rounding_again_changes_nothing_and_some_weights_stay() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    vector = weight[0]
    for form in ("fp8", "int8"):
        once = fake_quantize(NAME, weight, form)
        assert not torch.equal(once, weight) and fake_quantize(NAME, weight.bfloat16(), form).dtype == torch.bfloat16
        torch.testing.assert_close(fake_quantize(NAME, once, form), once, rtol=1e-6, atol=0)
        for kept in ("model.embed_tokens.weight", "lm_head.weight", *ROUTERS):
            assert fake_quantize(kept, weight, form) is weight
        for kept in OF_ONE_AXIS:
            assert fake_quantize(kept, vector, form) is vector
    assert fake_quantize(NAME, weight, "") is weight


def test_another_format_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="rollout.quantize is 'int4': choose fp8 or int8"):
        fleet.validate(Rollout(quantize="int4"))
