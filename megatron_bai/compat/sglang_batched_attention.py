"""Attention of a whole batch at once on a CPU.

Symptom: with `--attention-backend torch_native`, the only one without AMX, a decoding step of 64 short sequences spends
half of its time in attention: each layer calls SDPA, and copies keys and values, once for every sequence.

Upstream: srt/layers/attention/torch_native_backend.py `_run_sdpa_forward_decode` and `_run_sdpa_forward_extend`, which
say so themselves. On a CPU with AMX upstream has a backend of its own, `intel_amx`.

What it does: decoding in float32 is one compiled loop over the cache (`numba_kernels.py`). Prompts, and other dtypes,
are padded: sequences between the same two powers of two in length share one call, so padding never doubles the work.
Results are upstream's to float rounding (`tests/compat/test_upstream.py`). Encoders, cross attention and sliding
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
class LengthBucket:
    """n sequences of a batch that have similar lengths, padded to the L tokens of the longest.

    Attributes:
        slots: `[n·L]` int64, of the key/value cache. Padding repeats the sequence's own first slot, whose values are
            finite if the sequence's are.
        length: L.
        rows: queries of the batch that belong to these sequences, int64.
        query_positions: in `[n·L]`, of those queries, int64.
        mask: `[n, 1, 1, L]` bool, False for padding.
    """

    slots: "Tensor"
    length: int
    rows: "Tensor"
    query_positions: "Tensor"
    mask: "Tensor"

    def read(self, cache: "Tensor", dtype: Any) -> "Tensor":
        """Read `[n, heads, L, dim]` from a cache `[slots, heads, dim]`.

        Args:
            cache: keys or values, `[slots, heads, dim]` of any float dtype.
            dtype: torch's, of the result.

        Returns:
            A copy, in which padding repeats the sequence's first slot.
        """
        rows = cache.index_select(0, self.slots).view(-1, self.length, *cache.shape[1:])
        return rows.transpose(1, 2).to(dtype)


def bucket_by_length(table: "Tensor", rows: "Tensor", lengths: "Tensor", new: "Tensor") -> list[LengthBucket]:
    """Split a batch into buckets of similar length.

    Args:
        table: `[·, positions]` integers, the cache's slot of each position of a sequence.
        rows: `[B]` integers, rows of the table.
        lengths: `[B]` integers, tokens of each sequence, new ones included.
        new: `[B]` integers, its last tokens, those that have a query.
    """
    import torch

    lengths, new = lengths.to(torch.int64), new.to(torch.int64)
    sizes = [length.bit_length() for length in lengths.tolist()]
    ends = new.cumsum(0)
    buckets = []
    for size in sorted(set(sizes) - {0}):
        members = torch.tensor([i for i, other in enumerate(sizes) if other == size])
        longest = int(lengths[members].max())
        valid = torch.arange(longest) < lengths[members, None]
        slots = table[rows[members], :longest].to(torch.int64)
        slots = torch.where(valid, slots, slots[:, :1])
        is_query = valid & (torch.arange(longest) >= (lengths - new)[members, None])
        positions = is_query.flatten().nonzero().squeeze(1)
        first = (ends - lengths)[members, None]  # row of the query at position 0, had it one
        queries = (first + torch.arange(longest))[is_query]
        buckets.append(LengthBucket(slots.flatten(), longest, queries, positions, valid[:, None, None]))
    return buckets


def decode(
    buckets: list[LengthBucket], query: "Tensor", output: "Tensor", keys: "Tensor", values: "Tensor", scale: float
) -> None:
    """Compute attention of one query a sequence, its last token.

    Args:
        buckets: of the batch.
        query: `[B, heads, dim]`.
        output: `[B, heads, dim]`, which is written.
        keys: `[slots, kv heads, dim]`, the cache.
        values: `[slots, kv heads, dim]`, the cache.
        scale: of the scores.
    """
    from torch.nn.functional import scaled_dot_product_attention

    for bucket in buckets:
        # Heads that share keys are adjacent, as queries of one head: nothing is repeated.
        queries = query.index_select(0, bucket.rows).view(len(bucket.rows), keys.shape[1], -1, query.shape[-1])
        k, v = bucket.read(keys, query.dtype), bucket.read(values, query.dtype)
        result = scaled_dot_product_attention(queries, k, v, attn_mask=bucket.mask, scale=scale)
        output.index_copy_(0, bucket.rows, result.flatten(1, 2))


def extend(
    buckets: list[LengthBucket], query: "Tensor", output: "Tensor", keys: "Tensor", values: "Tensor", scale: float
) -> None:
    """Compute causal attention of the new tokens of every sequence. As upstream, those before them are computed too.

    Args:
        buckets: of the batch.
        query: `[new tokens, heads, dim]`, of all sequences one after another.
        output: `[new tokens, heads, dim]`, which is written.
        keys: `[slots, kv heads, dim]`, the cache.
        values: `[slots, kv heads, dim]`, the cache.
        scale: of the scores.
    """
    from torch.nn.functional import scaled_dot_product_attention

    for bucket in buckets:
        k, v = bucket.read(keys, query.dtype), bucket.read(values, query.dtype)
        queries = query.new_zeros(len(bucket.slots), *query.shape[1:])
        queries.index_copy_(0, bucket.query_positions, query.index_select(0, bucket.rows))
        queries = queries.view(-1, bucket.length, *query.shape[1:]).transpose(1, 2)
        grouped_query = query.shape[1] != keys.shape[1]
        result = scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scale, enable_gqa=grouped_query)
        result = result.transpose(1, 2).flatten(0, 1)
        output.index_copy_(0, bucket.rows, result.index_select(0, bucket.query_positions))


def make_batched_backend(upstream: type) -> type:
    """Make `TorchNativeAttnBackend` with these functions in place of its loops, which do what these cannot."""
    import torch

    from megatron_bai.compat.numba_kernels import decode_attention

    class BatchedAttnBackend(upstream):  # type: ignore[misc]  # SGLang's class is known at run time alone
        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            self.forward_metadata: list[LengthBucket] | None = None  # made by the first layer that needs them

        def _run_sdpa_forward_decode(self, *batch: Any, **how: Any) -> Any:
            query, output, keys, values, table, rows, lengths, _ = batch
            if not _is_self_attention(batch, how):
                return super()._run_sdpa_forward_decode(*batch, **how)
            if all(tensor.dtype == torch.float32 for tensor in (query, keys, values)):
                if values.data_ptr() == keys.data_ptr():  # the first numbers of a latent, which is the key
                    values = keys
                arrays = query.contiguous(), keys, values, table, rows.to(torch.int64), lengths.to(torch.int64)
                decode_attention(*(array.numpy() for array in arrays), how["scaling"], output.numpy())
            else:
                buckets = self._buckets(table, rows, lengths, torch.ones_like(lengths))
                decode(buckets, query, output, keys, values, how["scaling"])
            return output

        def _run_sdpa_forward_extend(self, *batch: Any, **how: Any) -> Any:
            query, output, keys, values, table, rows, lengths, _, new, _ = batch
            if not (how["causal"] and _is_self_attention(batch, how)):
                return super()._run_sdpa_forward_extend(*batch, **how)
            extend(self._buckets(table, rows, lengths, new), query, output, keys, values, how["scaling"])
            return output

        def _buckets(self, table: "Tensor", rows: "Tensor", lengths: "Tensor", new: "Tensor") -> list[LengthBucket]:
            if self.forward_metadata is None:
                self.forward_metadata = bucket_by_length(table, rows, lengths, new)
            return self.forward_metadata

    return BatchedAttnBackend


def _is_self_attention(batch: tuple[Any, ...], how: dict[str, Any]) -> bool:
    """Return whether a decoder attends to all of its own sequence; `batch` ends with the lengths of an encoder's."""
    return not how["is_cross_attn"] and how["sliding_window_size"] is None and batch[-1] is None


def install() -> None:
    """Replace the backend of that name."""

    def replace(module: Any) -> None:
        module.TorchNativeAttnBackend = make_batched_backend(module.TorchNativeAttnBackend)

    after_import("sglang.srt.layers.attention.torch_native_backend", replace)


PATCH = Patch(
    name="sglang_batched_attention",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="torch_native attention runs sequence by sequence: most of a rollout's time",
    install=install,
)
