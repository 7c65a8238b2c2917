"""The functions that both engines call with `rollout.exact`: a row's bits are its own, its values the formula's."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_bai.compat import exact_ops

ROWS, EXPERTS, HIDDEN, INNER = 37, 8, 45, 19
Function = Callable[[torch.Tensor], torch.Tensor]  # of rows, a result of as many


@functools.cache
def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def experts_of(x: torch.Tensor) -> torch.Tensor:
    """Two experts of each row, ascending, that depend on the row alone."""
    return x[:, :EXPERTS].topk(2).indices.sort().values


def run_experts(x: torch.Tensor) -> torch.Tensor:
    w13, w2 = drawn(EXPERTS, 2 * INNER, HIDDEN).to(x), drawn(EXPERTS, HIDDEN, INNER).to(x)
    ids, weights = experts_of(x), x[:, :2].sigmoid()
    if x.dtype == torch.float32:
        return exact_ops.run_experts(x, w13, w2, ids, weights)
    gate, up = torch.einsum("th,tkih->tki", x, w13[ids]).chunk(2, dim=-1)
    return torch.einsum("tki,tkhi,tk->th", torch.nn.functional.silu(gate) * up, w2[ids], weights)


def linear(x: torch.Tensor) -> torch.Tensor:
    weight = drawn(23, HIDDEN).to(x)
    return exact_ops.linear(x, weight) if x.dtype == torch.float32 else x @ weight.T


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    weight = drawn(HIDDEN).to(x)
    if x.dtype == torch.float32:
        return exact_ops.rms_norm(x, weight, 1e-6)
    return x * weight / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def weigh_experts(x: torch.Tensor) -> torch.Tensor:
    ids = experts_of(x)
    return exact_ops.weigh_experts(x, ids) if x.dtype == torch.float32 else x.gather(1, ids).softmax(dim=1)


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    temperatures = x[:, :1].sigmoid() + 0.5
    if x.dtype == torch.float32:
        return exact_ops.log_softmax(x, temperatures)
    return (x / temperatures).log_softmax(dim=1)


FUNCTIONS: list[Function] = [linear, rms_norm, weigh_experts, run_experts, log_softmax]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_rows_bits_do_not_depend_on_the_others(function: Function) -> None:
    x = drawn(ROWS, HIDDEN)
    whole = function(x)
    for size in (1, 2, 3, 8, 16, 31):
        for first in range(0, ROWS - size, 5):
            part = slice(first, first + size)
            assert torch.equal(function(x[part]), whole[part]), (size, first)  # memory that begins anywhere
            assert torch.equal(function(x[part].clone()), whole[part])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(x[order]), whole[order])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_those_of_float64(function: Function) -> None:
    x = drawn(ROWS, HIDDEN)
    expected = function(x.double())
    scale = expected.abs().max()
    torch.testing.assert_close(function(x).double() / scale, expected / scale, rtol=0, atol=1e-6)


def test_an_output_of_a_product_does_not_depend_on_the_others() -> None:
    """The engines hold queries, keys and values in other orders, and a server pads the vocabulary."""
    x, weight = drawn(ROWS, HIDDEN), drawn(23, HIDDEN)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact_ops.linear(x, weight[order]), exact_ops.linear(x, weight)[:, order])
    padded = torch.cat([weight, torch.zeros(41, HIDDEN)])
    assert torch.equal(exact_ops.linear(x, padded)[:, :23], exact_ops.linear(x, weight))


def test_experts_that_a_server_pads_give_what_they_give_unpadded() -> None:
    """SGLang pads them to a multiple of 32 on a CPU, gate and up apart: in a longer row, sums have other parts."""
    x, ids = drawn(ROWS, HIDDEN), experts_of(drawn(ROWS, HIDDEN))
    w13, w2, weights = drawn(EXPERTS, 2 * INNER, HIDDEN), drawn(EXPERTS, HIDDEN, INNER), drawn(ROWS, 2)
    padded13, padded2 = torch.zeros(EXPERTS, 64, HIDDEN), torch.zeros(EXPERTS, HIDDEN, 32)
    padded13[:, :INNER], padded13[:, 32 : 32 + INNER] = w13[:, :INNER], w13[:, INNER:]
    padded2[:, :, :INNER] = w2
    expected = exact_ops.run_experts(x, padded13, padded2, ids, weights)
    assert torch.equal(exact_ops.run_experts(x, w13, w2, ids, weights), expected)


def test_experts_are_padded_as_the_installed_sglang_pads_them() -> None:
    (package,) = importlib.util.find_spec("sglang").submodule_search_locations
    source = Path(package, "srt", "configs", "update_config.py").read_text(encoding="utf-8")
    assert f"\nDEFAULT_MOE_PADDING_SIZE = {exact_ops.EXPERT_WIDTH_MULTIPLE}\n" in source


def test_log_probabilities_of_some_tokens_are_those_of_all() -> None:
    x, temperatures, ids = drawn(ROWS, HIDDEN), torch.full((ROWS, 1), 0.7), torch.arange(ROWS)[:, None]
    whole = exact_ops.log_softmax(x, temperatures)
    assert torch.equal(exact_ops.log_softmax(x, temperatures, ids), whole.gather(1, ids))


@pytest.mark.parametrize("decoded", [1, 5])
def test_attention_is_the_same_by_prompt_and_by_step(decoded: int) -> None:
    """A server reads keys in a cache, where they stand in any order; a trainer has them in order."""
    length, heads, kv_heads, dim = 12, 4, 2, 16
    query, key, value = (drawn(length, n, dim).roll(i, 0) for i, n in enumerate((heads, kv_heads, kv_heads)))
    together = exact_ops.attend(
        query, key, value, torch.arange(length)[None], torch.zeros(length), torch.arange(length) + 1, 0.25
    )
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:length]
    cached_key, cached_value = torch.full((2, 40, kv_heads, dim), 7.0)
    cached_key[slots], cached_value[slots] = key, value
    table = torch.stack([torch.zeros(length, dtype=torch.int64), slots])
    for first in range(0, length - decoded + 1):
        part = torch.arange(first, first + decoded)
        step = exact_ops.attend(query[part], cached_key, cached_value, table, torch.ones(decoded), part + 1, 0.25)
        assert torch.equal(step, together[part])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    q, k, v = (tensor.double().transpose(0, 1) for tensor in (query, key, value))
    scores = (q @ k.repeat_interleave(2, 0).transpose(1, 2) * 0.25).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 0)).transpose(0, 1)
    torch.testing.assert_close(together.double(), expected, rtol=0, atol=1e-6)


def test_a_rotary_table_is_the_same_for_any_number_of_positions() -> None:
    table = exact_ops.rotary_table(300, 10, 5000.0)
    assert torch.equal(exact_ops.rotary_table(7, 10, 5000.0), table[:7])
    angles = torch.arange(300.0).double()[:, None] * 5000.0 ** (-torch.arange(5).double() / 5)
    assert torch.equal(table, torch.cat([angles.cos(), angles.sin()], 1).float())


def test_rotation_is_that_of_complex_numbers() -> None:
    x, table = drawn(6, 2, 10), exact_ops.rotary_table(6, 10, 100.0)
    turned = exact_ops.rotate(x, table[:, None])
    numbers = torch.complex(*x.double().chunk(2, -1)) * torch.complex(*table.double()[:, None].chunk(2, -1))
    torch.testing.assert_close(turned.double(), torch.cat([numbers.real, numbers.imag], -1), rtol=0, atol=1e-6)
