"""Which tokens of a batch one rank sees, and which layers: the one slicer of tokens, masks and routes.

A batch is padded, `[B, T, …]`, or packed (thd): `[1, T, …]`, sequences side by side, each padded to a length of its
own. Megatron-Core cuts it in this order, and so does `Place`:

1. context parallelism, of C ranks: each sequence falls into 2·C equal chunks, and rank c holds chunks c and
   2·C − 1 − c, which balances causal attention (`get_batch_on_this_cp_rank`; Transformer Engine does it per packed
   sequence);
2. sequence parallelism, of R ranks: rank r holds the r-th of R equal parts of what is left;
3. the router flattens `[tokens, B]`, so that row s·B + b is token s of sample b.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_bai.routing.routes import RouteSignature


@dataclass(frozen=True)
class Place:
    """A rank's place along the sequence: its number and how many share it. (0, 1) where a sequence is not split."""

    context: tuple[int, int] = (0, 1)
    tensor: tuple[int, int] = (0, 1)  # (0, 1) too where sequence parallelism is off: then every rank sees all tokens

    @staticmethod
    def here(config: Any) -> "Place":
        """This process's, from Megatron's process groups. `config`: the model's `TransformerConfig`."""
        from megatron.core import parallel_state as state

        tensor = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
        context = state.get_context_parallel_rank(), state.get_context_parallel_world_size()
        return Place(context, tensor if config.sequence_parallel else (0, 1))

    @property
    def multiple(self) -> int:
        """Every sequence's padded length must be a multiple of this."""
        return self.tensor[1] * (2 * self.context[1] if self.context[1] > 1 else 1)

    def inputs(self, values: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """What the model is fed here: `values` `[B, T, …]` after context parallelism, `[B, T / C, …]`.

        Args:
            lengths: padded lengths of packed sequences, which sum to T; None for a padded batch.
        """
        if self.context[1] == 1:
            return values
        return values[:, _zigzag_positions([values.shape[1]] if lengths is None else lengths, *self.context)]

    def rows(self, values: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """What the routers see here, in their order: `[B, T, …]` → `[T / C / R · B, …]`."""
        values, (rank, ranks) = self.inputs(values, lengths), self.tensor
        part = values.shape[1] // ranks
        assert part * ranks == values.shape[1], f"length {values.shape[1]} is not a multiple of {ranks} ranks"
        return values[:, rank * part : (rank + 1) * part].transpose(0, 1).flatten(0, 1)


def _zigzag_positions(lengths: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """Positions, in sequences side by side, that one context-parallel rank holds."""
    starts = np.cumsum([0, *lengths])
    held = []
    for start, length in zip(starts, lengths, strict=False):
        chunk = length // (2 * ranks)
        assert chunk * 2 * ranks == length, f"length {length} is not a multiple of 2 × {ranks} context-parallel ranks"
        for number in (rank, 2 * ranks - 1 - rank):
            held.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.from_numpy(np.concatenate(held))


@dataclass(frozen=True)
class Packing:
    """Sequences side by side in one row (thd), each followed by padding of its own; what the row has left is padding.

    Attributes:
        lengths: real tokens of each sequence.
        padded: the same, rounded up to a multiple of `Place.multiple`.
        tail: tokens left at the end of the row.
    """

    lengths: tuple[int, ...]
    padded: tuple[int, ...]
    tail: int = 0

    @staticmethod
    def of(lengths: Sequence[int], multiple: int, row: int | None = None) -> "Packing":
        """Args:
            row: tokens of the whole row; None ends it with the last sequence.
        """
        padded = tuple(-(-length // multiple) * multiple for length in lengths)
        tail = 0 if row is None else row - sum(padded)
        assert tail >= 0, f"sequences of {sum(padded)} tokens in a row of {row}"
        return Packing(tuple(lengths), padded, tail)

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens of everything in the row that attends to itself alone: the sequences, padded, and the tail if any."""
        return self.padded + ((self.tail,) if self.tail else ())

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """`[sequences + 1]` int32, where each would start without padding (Megatron's `PackedSeqParams`)."""
        return torch.tensor(np.cumsum([0, *self.lengths]), dtype=torch.int32)

    @property
    def cu_seqlens_padded(self) -> torch.Tensor:
        """`[sequences + 1]` int32, where each starts."""
        return torch.tensor(np.cumsum([0, *self.padded]), dtype=torch.int32)

    @property
    def positions(self) -> torch.Tensor:
        """`[row]` int64, each token's place in its own sequence."""
        return torch.cat([torch.arange(part) for part in self.parts])

    def pack(self, values: torch.Tensor, filling: torch.Tensor | int = 0) -> torch.Tensor:
        """`[B, T, …]`, padded on the right → `[1, row, …]`. A sequence's own padding is taken from `values`.

        Args:
            filling: what the tail gets, one value or `[tail, …]`.
        """
        tail = values.new_empty(self.tail, *values.shape[2:])
        tail[:] = filling
        row = torch.cat([*(own[:length] for own, length in zip(values, self.padded, strict=True)), tail])[None]
        assert row.shape[1] == sum(self.parts), f"a packed sequence is longer than the {values.shape[1]} tokens given"
        return row

    def unpack(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """`[1, row, …]` → `[B, length, …]`, the reverse of `pack`: 0 beyond a sequence's tokens. Differentiable."""
        place, starts = torch.arange(length), self.cu_seqlens_padded[:-1, None].long()
        padding = place >= torch.tensor(self.lengths, dtype=torch.int64)[:, None]
        found = values[0, (starts + place).masked_fill_(padding, 0).to(values.device)]
        return found.masked_fill(padding.view(*padding.shape, *[1] * (found.dim() - 2)).to(values.device), 0)


def stage_layers(num_layers: int, stage: int, stages: int, chunks: int = 1) -> list[int]:
    """Decoder layers, counted from 0, that one pipeline stage holds in an even split.

    Args:
        chunks: V of virtual pipeline parallelism: chunk v of stage p holds the (v·P + p)-th of P·V equal ranges.
    """
    size = num_layers // (stages * chunks)
    assert size * stages * chunks == num_layers, f"{num_layers} layers do not divide into {stages} × {chunks} chunks"
    starts = [(chunk * stages + stage) * size for chunk in range(chunks)]
    return [layer for start in starts for layer in range(start, start + size)]


def filler_routes(count: int, signature: RouteSignature, columns: Sequence[int] | None = None) -> np.ndarray:
    """Routes of rows that have none: distinct experts, spread evenly over rows and layers.

    Equal ids would break the dispatcher's split sizes. Rows that all go to the same few experts would overload them,
    also when that is so in each layer by itself: hence the step of `topk` from row to row and from layer to layer.

    Args:
        columns: MoE layers to fill, counted from 0; None fills all.

    Returns:
        `[count, columns, topk]` in the signature's dtype.
    """
    layers = np.arange(signature.moe_layers) if columns is None else np.asarray(columns, dtype=np.int64)
    first = (np.arange(count)[:, None] + layers)[..., None] * signature.topk
    return ((first + np.arange(signature.topk)) % signature.num_experts).astype(signature.dtype)


def assemble(
    samples: Sequence[np.ndarray],
    length: int,
    signature: RouteSignature,
    route_masks: Sequence[np.ndarray | None] | None = None,
    columns: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stack the routes of samples of different length. Rows that hold no route get `filler_routes`.

    Args:
        samples: `[rows_i, columns, topk]` each, with rows_i < length: a sample's last token was never fed to the
            rollout model and has no row.
        length: T, tokens of the padded batch.
        route_masks: `[rows_i]` bool each, rows that were recorded; None where all were.
        columns: MoE layers present in `samples`, counted from 0; None: all of the model's.

    Returns:
        ids `[B, T, columns, topk]` in the signature's dtype, and two `[B, T]` bool: `routed`, rows that hold a route,
        and `missing`, rows whose token was fed to the rollout model but whose route is not known. What is in neither
        is padding.
    """
    b = len(samples)
    ids = filler_routes(b * length, signature, columns).reshape(b, length, -1, signature.topk)
    routed, missing = np.zeros((2, b, length), dtype=bool)
    for i, routes in enumerate(samples):
        rows = len(routes)
        known = None if route_masks is None else route_masks[i]
        known = np.ones(rows, dtype=bool) if known is None else known
        ids[i, :rows][known] = routes[known]
        routed[i, :rows], missing[i, :rows] = known, ~known
    return ids, routed, missing
