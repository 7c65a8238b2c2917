"""Attention of a whole batch at once on a CPU.

Symptom: with `--attention-backend torch_native`, the only one without AMX, a decoding step of 64 short sequences spends
half of its time in attention: each layer calls SDPA, and copies keys and values, once for every sequence.

Upstream: srt/layers/attention/torch_native_backend.py `_run_sdpa_forward_decode` and `_run_sdpa_forward_extend`, which
say so themselves. On a CPU with AMX upstream has a backend of its own, `intel_amx`.

What it does: decoding in float32 is one compiled loop over the cache (`cpu_kernels.py`). Prompts, and other dtypes,
are padded: sequences between the same two powers of two in length share one call, so padding never doubles the work.
Results are upstream's to float rounding (`tests/patches/test_upstream.py`). Encoders, cross attention and sliding
windows stay upstream's.

Can go: when upstream batches these loops.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """n sequences of a batch of similar length, padded to the L tokens of the longest.

    Attributes:
        slots: `[n·L]` int64, of the key/value cache. Padding repeats the sequence's own first slot: what is there is
            finite as long as the sequence itself is.
        length: L.
        rows: queries of the batch that belong to these sequences, int64.
        places: where in `[n·L]` those queries stand, int64.
        mask: `[n, 1, 1, L]` bool, what is no padding.
    """

    slots: "Tensor"
    length: int
    rows: "Tensor"
    places: "Tensor"
    mask: "Tensor"

    def read(self, cache: "Tensor", dtype: Any) -> "Tensor":
        """`[n, heads, L, dim]` from `[slots, heads, dim]`."""
        found = cache.index_select(0, self.slots).view(-1, self.length, *cache.shape[1:])
        return found.transpose(1, 2).to(dtype)


def group(table: "Tensor", rows: "Tensor", lengths: "Tensor", new: "Tensor") -> list[Group]:
    """Groups of a batch.

    Args:
        table: `[·, positions]` integers, the cache's slot of each position of a sequence.
        rows: `[B]`, which row of the table.
        lengths: `[B]`, tokens of each sequence, new ones included.
        new: `[B]`, its last tokens, those that have a query.
    """
    import torch

    lengths, new = lengths.to(torch.int64), new.to(torch.int64)
    sizes = [length.bit_length() for length in lengths.tolist()]
    ends = new.cumsum(0)
    groups = []
    for size in sorted(set(sizes) - {0}):
        own = torch.tensor([i for i, each in enumerate(sizes) if each == size])
        longest = int(lengths[own].max())
        valid = torch.arange(longest) < lengths[own, None]
        found = table[rows[own], :longest].to(torch.int64)
        found = torch.where(valid, found, found[:, :1])
        asks = valid & (torch.arange(longest) >= (lengths - new)[own, None])
        places = asks.flatten().nonzero().squeeze(1)
        first = (ends - lengths)[own, None]  # row of the query at position 0, had it one
        asked = (first + torch.arange(longest))[asks]
        groups.append(Group(found.flatten(), longest, asked, places, valid[:, None, None]))
    return groups


def decode(
    groups: list[Group], query: "Tensor", output: "Tensor", keys: "Tensor", values: "Tensor", scale: float
) -> None:
    """One query a sequence, at its end. `query`, `output`: `[B, heads, dim]`; the caches: `[slots, heads, dim]`."""
    from torch.nn.functional import scaled_dot_product_attention

    for each in groups:
        # Heads that share keys stand side by side as queries of one head: nothing is repeated.
        asked = query.index_select(0, each.rows).view(len(each.rows), keys.shape[1], -1, query.shape[-1])
        k, v = each.read(keys, query.dtype), each.read(values, query.dtype)
        found = scaled_dot_product_attention(asked, k, v, attn_mask=each.mask, scale=scale)
        output.index_copy_(0, each.rows, found.flatten(1, 2))


def extend(
    groups: list[Group], query: "Tensor", output: "Tensor", keys: "Tensor", values: "Tensor", scale: float
) -> None:
    """Queries for the last tokens of every sequence, causal. As upstream, those before them are computed too."""
    from torch.nn.functional import scaled_dot_product_attention

    for each in groups:
        k, v = each.read(keys, query.dtype), each.read(values, query.dtype)
        asked = query.new_zeros(len(each.slots), *query.shape[1:])
        asked.index_copy_(0, each.places, query.index_select(0, each.rows))
        asked = asked.view(-1, each.length, *query.shape[1:]).transpose(1, 2)
        shared = query.shape[1] != keys.shape[1]
        found = scaled_dot_product_attention(asked, k, v, is_causal=True, scale=scale, enable_gqa=shared)
        found = found.transpose(1, 2).flatten(0, 1)
        output.index_copy_(0, each.rows, found.index_select(0, each.places))


def batched(upstream: type) -> type:
    """`TorchNativeAttnBackend` with these in the place of its loops, which still do what these cannot."""
    import torch

    from megatron_bai.compat.numba_kernels import attend

    class BatchedAttnBackend(upstream):  # type: ignore[misc]  # SGLang's class is known at run time alone
        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            self.forward_metadata: list[Group] | None = None  # groups, made by the first layer that needs them

        def _run_sdpa_forward_decode(self, *batch: Any, **how: Any) -> Any:
            query, output, keys, values, table, rows, lengths, _ = batch
            if not _plain(batch, how):
                return super()._run_sdpa_forward_decode(*batch, **how)
            if all(each.dtype == torch.float32 for each in (query, keys, values)):
                arrays = query.contiguous(), keys, values, table, rows.to(torch.int64), lengths.to(torch.int64)
                attend(*(each.numpy() for each in arrays), how["scaling"], output.numpy())
            else:
                groups = self._group(table, rows, lengths, torch.ones_like(lengths))
                decode(groups, query, output, keys, values, how["scaling"])
            return output

        def _run_sdpa_forward_extend(self, *batch: Any, **how: Any) -> Any:
            query, output, keys, values, table, rows, lengths, _, new, _ = batch
            if not (how["causal"] and _plain(batch, how)):
                return super()._run_sdpa_forward_extend(*batch, **how)
            extend(self._group(table, rows, lengths, new), query, output, keys, values, how["scaling"])
            return output

        def _group(self, table: "Tensor", rows: "Tensor", lengths: "Tensor", new: "Tensor") -> list[Group]:
            if self.forward_metadata is None:
                self.forward_metadata = group(table, rows, lengths, new)
            return self.forward_metadata

    return BatchedAttnBackend


def _plain(batch: tuple[Any, ...], how: dict[str, Any]) -> bool:
    """Whether it is a decoder's attention to all of its own sequence; `batch` ends with the lengths of an encoder's."""
    return not how["is_cross_attn"] and how["sliding_window_size"] is None and batch[-1] is None


def install() -> None:
    """Make it the backend of that name."""

    def replace(module: Any) -> None:
        module.TorchNativeAttnBackend = batched(module.TorchNativeAttnBackend)

    after_import("sglang.srt.layers.attention.torch_native_backend", replace)


PATCH = Patch(
    name="sglang_batched_attention",
    distribution="sglang",
    version=releases.SGLANG,
    scope="sglang-cpu",
    summary="torch_native attention runs sequence by sequence: most of a rollout's time",
    install=install,
)
