"""Attention without Transformer Engine beside its formula in float64: windows, sinks, packed rows, grouped heads."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HEADS, KEYS, WIDTH = 6, 2, 8
LENGTHS = [1, 5, 300, 64, 0, 290]  # of sequences; the third and last are longer than a block of queries


def attention(window: int | None, sinks: bool, layer_number: int = 1) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_bai.model.attention import TorchAttention

    config = SimpleNamespace(
        context_parallel_size=1,
        attention_dropout=0.0,
        apply_query_key_layer_scaling=False,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[1, 0],
        softmax_type="learnable" if sinks else "vanilla",
        num_attention_heads=HEADS,
        tensor_model_parallel_size=1,
        params_dtype=torch.float64,
        init_method=torch.nn.init.normal_,
    )
    torch.manual_seed(1)
    return TorchAttention(config, layer_number, AttnMaskType.causal, "self")


def formula(query: Any, key: Any, value: Any, window: int | None, sinks: Any) -> torch.Tensor:
    """One sequence: `[T, heads, …]` → `[T, heads · width]`."""
    key, value = (each.repeat_interleave(HEADS // KEYS, dim=1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    behind = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (behind >= 0) & (behind < (window or len(query)))
    scores = scores.masked_fill(~seen, -math.inf)
    beside = scores if sinks is None else torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], -1)
    weights = torch.softmax(beside, -1)[..., : len(query)]
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.parametrize("width", [WIDTH, WIDTH // 2])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_packed_sequences_have_their_formula_and_its_gradient(window: int | None, sinks: bool, width: int) -> None:
    module = attention(window, sinks)
    draw = torch.Generator().manual_seed(0)
    shapes = (HEADS, WIDTH), (KEYS, WIDTH), (KEYS, width)
    inputs = [torch.randn(sum(LENGTHS), *shape, dtype=torch.float64, generator=draw) for shape in shapes]
    leaves = [each.requires_grad_() for each in inputs] + list(module.parameters())
    assert len(leaves) == 3 + sinks
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    found = module(*inputs, None, packed_seq_params=SimpleNamespace(cu_seqlens_q=ends))
    parts = zip(*(each.split(LENGTHS) for each in inputs), strict=True)
    wanted = torch.cat([formula(q, k, v, window, module.softmax_offset) for q, k, v in parts])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.randn(wanted.shape, dtype=torch.float64, generator=draw)
    gradients = (torch.autograd.grad((each * weights).sum(), leaves) for each in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_batch_is_its_sequences(sinks: bool) -> None:
    module = attention(9, sinks)
    query, key, value = (torch.randn(270, 3, n, WIDTH, dtype=torch.float64) for n in (HEADS, KEYS, KEYS))
    found = module(query, key, value, None)
    assert found.shape == (270, 3, HEADS * WIDTH)
    for b in range(3):
        wanted = formula(query[:, b], key[:, b], value[:, b], 9, module.softmax_offset)
        torch.testing.assert_close(found[:, b], wanted, rtol=0, atol=1e-12)


def test_a_layer_has_the_window_that_its_number_says() -> None:
    assert [attention(9, False, number).window for number in (1, 2)] == [9, None]
