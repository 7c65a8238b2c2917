"""The operations that both engines call with `rollout.exact`, on tensors: forward passes alone, in float32 on a CPU.

Where these functions and the weights are the same in both engines, so are all bits: what a row gives does not depend on
the others (`exact_kernels.py`), and what lies between, adding, multiplying or copying elements, is rounded by IEEE 754
alone. `model/exact_layers.py` has the gradients.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad

from megatron_bai.compat import exact_kernels, numba_kernels

EXPERT_WIDTH_MULTIPLE = 32  # of SGLang on a CPU (`DEFAULT_MOE_PADDING_SIZE`)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x · weightᵀ.

    Args:
        x: `[…, inputs]` float32.
        weight: `[outputs, inputs]` float32.

    Returns:
        `[…, outputs]` float32.
    """
    rows = _as_rows(x)
    out = rows.new_empty(len(rows), len(weight))
    exact_kernels.linear(_to_array(rows), _to_array(weight), out.numpy())
    return out.view(*x.shape[:-1], -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Compute weight · x / √(mean x² + epsilon).

    Args:
        x: `[…, dim]` float32.
        weight: `[dim]` float32.
        epsilon: added to the mean square.
    """
    rows = _as_rows(x)
    out = torch.empty_like(rows)
    numba_kernels.rms_norm(_to_array(rows), _to_array(weight), epsilon, out.numpy())
    return out.view(x.shape)


@lru_cache(maxsize=2)
def rotary_table(positions: int, dim: int, base: float) -> torch.Tensor:
    """Return the cosines and sines of positions, `[positions, dim]` float32, whose rows do not depend on their number.

    Args:
        positions: from 0.
        dim: elements of a head that are rotated, even.
        base: `rope_theta`.
    """
    table = torch.empty(positions, dim)
    exact_kernels.rotary_angles(base, table.numpy())
    return table


def rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate each element i of a head with i + dim / 2. Differentiable.

    Args:
        heads: `[…, dim]` float32.
        angles: `[…, dim]` float32, rows of `rotary_table`, broadcast over heads.
    """
    x, y = heads.chunk(2, dim=-1)
    cosine, sine = angles.chunk(2, dim=-1)
    return torch.cat([x * cosine - y * sine, y * cosine + x * sine], dim=-1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute softmax(scale · q Kᵀ) V of each query over the first keys of its sequence, in their order.

    Args:
        query: `[queries, heads, dim]` float32.
        key: `[slots, kv heads, dim]` float32; query heads that share keys are adjacent.
        value: as `key`.
        table: `[·, positions]` integers, the slot of each position of a sequence.
        rows: `[queries]` integers, each query's row of the table.
        lengths: `[queries]` integers, how many keys it sees, itself included.
        scale: of the scores.

    Returns:
        `[queries, heads, dim]` float32.
    """
    out = torch.empty(query.shape)
    numba_kernels.decode_attention(
        *(_to_array(tensor) for tensor in (query, key, value)), _to_array(table.to(torch.int32)),
        *(_to_array(tensor.to(torch.int64)) for tensor in (rows, lengths)), scale, out.numpy(),
    )  # fmt: skip
    return out


def weigh_experts(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compute the softmax of the router's logits over the chosen experts.

    Args:
        logits: `[tokens, experts]` float32.
        ids: `[tokens, k]` int64, ascending: the order of the sum.

    Returns:
        `[tokens, k]` float32.
    """
    chosen = logits.gather(1, ids)
    out = torch.empty_like(chosen)
    exact_kernels.softmax(_to_array(chosen), out.numpy())
    return out


def run_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Compute the weighted sum of the outputs of each token's experts (`exact_kernels.run_experts`).

    SGLang pads `inner` with zeros to a multiple of 32 on a CPU. Zeros change no sum, but its order: a longer row is
    summed in other parts. So experts that are not padded yet are padded here.

    Args:
        x: `[tokens, hidden]` float32.
        w13: `[experts, 2·inner, hidden]` float32, gate then up.
        w2: `[experts, hidden, inner]` float32.
        ids: `[tokens, k]` integers, ascending.
        weights: `[tokens, k]` float32.
    """
    out = torch.empty(x.shape)
    x, w13, w2, weights = (tensor.detach() for tensor in (x, w13, w2, weights))
    if missing := -w2.shape[2] % EXPERT_WIDTH_MULTIPLE:
        w13 = pad(w13.unflatten(1, (2, -1)), (0, 0, 0, missing)).flatten(1, 2)
        w2 = pad(w2, (0, missing))
    exact_kernels.run_experts(*map(_to_array, (x, w13, w2, ids.to(torch.int64), weights)), out.numpy())
    return out


def log_softmax(logits: torch.Tensor, temperatures: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Compute log-probabilities at the temperature of each row.

    Args:
        logits: `[rows, vocabulary]` float32.
        temperatures: `[rows, 1]` float32, above 0.
        ids: `[rows, n]` int64, of which tokens; None: all.

    Returns:
        `[rows, n]` or `[rows, vocabulary]` float32.
    """
    logits = logits.detach()
    parts = logits.new_empty(len(logits), 2)
    exact_kernels.log_normaliser(_to_array(logits), _to_array(temperatures.flatten()), parts.numpy())
    largest, log_sum = parts.split(1, dim=1)
    chosen: torch.Tensor = logits if ids is None else logits.gather(1, ids)
    logprobs: torch.Tensor = chosen / temperatures - largest - log_sum
    return logprobs


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def _to_array(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().numpy()
