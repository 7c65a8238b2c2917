"""The tokens and layers of a batch that one rank sees: slices tokens, masks and routes alike.

A batch is padded, `[B, T, …]`, or packed (thd): `[1, T, …]`, sequences side by side, each padded to a length of its
own. Megatron-Core splits it in this order, and so does `Place`:

1. context parallelism, of C ranks: each sequence falls into 2·C equal chunks, and rank c holds chunks c and
   2·C − 1 − c, which balances causal attention (`get_batch_on_this_cp_rank`; Transformer Engine does it per packed
   sequence);
2. sequence parallelism, of R ranks: rank r holds the r-th of R equal ranges of what is left;
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
    """A rank's part of the sequence.

    Attributes:
        context: index of this rank among the context-parallel ranks, and their number; (0, 1) where there is one.
        tensor: the same of the tensor-parallel ranks.
    """

    context: tuple[int, int] = (0, 1)
    tensor: tuple[int, int] = (0, 1)  # (0, 1) too where sequence parallelism is off: then every rank sees all tokens

    @staticmethod
    def here(config: Any) -> "Place":
        """Return the place of this process, from Megatron's process groups.

        Args:
            config: the model's `TransformerConfig`.
        """
        from megatron.core import parallel_state as state

        tensor = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
        context = state.get_context_parallel_rank(), state.get_context_parallel_world_size()
        return Place(context, tensor if config.sequence_parallel else (0, 1))

    @property
    def multiple(self) -> int:
        """The number that every sequence's padded length must be a multiple of."""
        return self.tensor[1] * (2 * self.context[1] if self.context[1] > 1 else 1)

    def inputs(self, values: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Select what the model is fed on this rank.

        Args:
            values: `[B, T, …]`.
            lengths: padded lengths of packed sequences, which sum to T; None for a padded batch.

        Returns:
            `[B, T / C, …]` after context parallelism.
        """
        if self.context[1] == 1:
            return values
        return values[:, _zigzag_positions([values.shape[1]] if lengths is None else lengths, *self.context)]

    def rows(self, values: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Select what the routers see on this rank, in their order.

        Args:
            values: `[B, T, …]`.
            lengths: as in `inputs`.

        Returns:
            `[T / C / R · B, …]`.
        """
        values, (rank, ranks) = self.inputs(values, lengths), self.tensor
        length = values.shape[1] // ranks
        assert length * ranks == values.shape[1], f"length {values.shape[1]} is not a multiple of {ranks} ranks"
        return values[:, rank * length : (rank + 1) * length].transpose(0, 1).flatten(0, 1)


def _zigzag_positions(lengths: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """Return the positions, in sequences side by side, that one context-parallel rank holds."""
    starts = np.cumsum([0, *lengths])
    positions = []
    for start, length in zip(starts, lengths, strict=False):
        chunk = length // (2 * ranks)
        assert chunk * 2 * ranks == length, f"length {length} is not a multiple of 2 × {ranks} context-parallel ranks"
        for index in (rank, 2 * ranks - 1 - rank):
            positions.append(np.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.from_numpy(np.concatenate(positions))


@dataclass(frozen=True)
class ServedColumns:
    """The layers of a server's routes: SGLang has one for each decoder layer, zeros where it is dense.

    Attributes:
        total: number of layers that the server sends.
        moe: those with experts, counted from 0, in order: the MoE layers that routes of a model have.
    """

    total: int
    moe: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """Sequences side by side in one row (thd), each followed by padding of its own; the rest of the row is padding.

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
        """Build the packing of sequences.

        Args:
            lengths: tokens of each sequence.
            multiple: what each padded length is a multiple of.
            row: tokens of the whole row; None ends it with the last sequence.
        """
        padded = tuple(-(-length // multiple) * multiple for length in lengths)
        tail = 0 if row is None else row - sum(padded)
        assert tail >= 0, f"sequences of {sum(padded)} tokens in a row of {row}"
        return Packing(tuple(lengths), padded, tail)

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of all that attends to itself alone in the row: of the sequences, padded, and of the tail if any."""
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
        """`[row]` int64, each token's position in its own sequence."""
        return torch.cat([torch.arange(length) for length in self.parts])

    def pack(self, values: torch.Tensor, fill: torch.Tensor | int = 0) -> torch.Tensor:
        """Put samples side by side. A sequence's own padding is taken from `values`.

        Args:
            values: `[B, T, …]`, padded on the right.
            fill: of the tail: one value or `[tail, …]`.

        Returns:
            `[1, row, …]`.
        """
        tail = values.new_empty(self.tail, *values.shape[2:])
        tail[:] = fill
        row = torch.cat([*(sample[:length] for sample, length in zip(values, self.padded, strict=True)), tail])[None]
        assert row.shape[1] == sum(self.parts), f"a packed sequence is longer than the {values.shape[1]} tokens given"
        return row

    def unpack(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """Reverse `pack`. Differentiable.

        Args:
            values: `[1, row, …]`.
            length: T of the result.

        Returns:
            `[B, T, …]`, 0 beyond a sequence's tokens.
        """
        positions, starts = torch.arange(length), self.cu_seqlens_padded[:-1, None].long()
        padding = positions >= torch.tensor(self.lengths, dtype=torch.int64)[:, None]
        unpacked = values[0, (starts + positions).masked_fill_(padding, 0).to(values.device)]
        return unpacked.masked_fill(padding.view(*padding.shape, *[1] * (unpacked.dim() - 2)).to(values.device), 0)


def stage_layers(num_layers: int, stage: int, stages: int, chunks: int = 1) -> list[int]:
    """Return the decoder layers, counted from 0, that one pipeline stage holds in an even split.

    Args:
        num_layers: of the model.
        stage: pipeline rank.
        stages: number of pipeline ranks.
        chunks: V of virtual pipeline parallelism: chunk v of stage p holds the (v·P + p)-th of P·V equal ranges.
    """
    size = num_layers // (stages * chunks)
    assert size * stages * chunks == num_layers, f"{num_layers} layers do not divide into {stages} × {chunks} chunks"
    starts = [(chunk * stages + stage) * size for chunk in range(chunks)]
    return [layer for start in starts for layer in range(start, start + size)]


def filler_routes(count: int, signature: RouteSignature, columns: Sequence[int] | None = None) -> np.ndarray:
    """Make routes of rows that have none: distinct experts, spread evenly over rows and layers.

    Equal ids would break the dispatcher's split sizes. Rows that all go to the same few experts would overload them,
    also when that is so in each layer by itself: hence the step of `topk` from row to row and from layer to layer.

    Args:
        count: number of rows.
        signature: of the model's routes.
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
        signature: of the whole model's routes.
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
        route_mask = None if route_masks is None else route_masks[i]
        route_mask = np.ones(rows, dtype=bool) if route_mask is None else route_mask
        ids[i, :rows][route_mask] = routes[route_mask]
        routed[i, :rows], missing[i, :rows] = route_mask, ~route_mask
    return ids, routed, missing
