"""What every stage of a batch has: tokens as a model is fed them, padded or packed, and checks of its tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch

from megatron_bai.routing.layout import Packing

_KINDS: dict[str, Callable[[torch.dtype], bool]] = {
    "bool": lambda dtype: dtype is torch.bool,
    "int64": lambda dtype: dtype is torch.int64,
    "integer": lambda dtype: not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool),
    "float": lambda dtype: dtype.is_floating_point,
}


def tensor_field(axes: str, kind: str, optional: bool = False) -> Any:
    """Declare a tensor of a batch, which is checked when the batch is made.

    Args:
        axes: names of its axes, such as `B T`; an axis has one size in all fields of a batch.
        kind: of its elements, one of `_KINDS`.
        optional: it may be None, and is by default.
    """
    metadata = {"axes": axes.split(), "kind": kind, "optional": optional}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """B samples padded on the right to T tokens.

    A batch is not changed: what a later stage knows is in a new batch. Its tensors may be shared with others.

    Attributes:
        tokens: `[B, T]` int64.
        lengths: `[B]` int64, tokens of each sample.
        packing: how the samples lie in the one row that a model is fed; None: as they lie here.
    """

    tokens: torch.Tensor = tensor_field("B T", "int64")
    lengths: torch.Tensor = tensor_field("B", "int64")
    packing: Packing | None = None

    def __post_init__(self) -> None:
        """Check all tensors.

        Raises:
            ValueError: names the field that is missing, or whose shape, dtype or device is not what the others need.
        """
        sizes: dict[str, int] = {}
        for name, about in self._declared.items():
            tensor, axes, kind = getattr(self, name), about["axes"], about["kind"]
            if tensor is None:
                if not about["optional"]:
                    raise ValueError(f"{type(self).__name__}.{name} is None")
                continue
            fits = tensor.dim() == len(axes) and all(
                sizes.setdefault(axis, size) == size for axis, size in zip(axes, tensor.shape, strict=True)
            )
            if not fits or not _KINDS[kind](tensor.dtype) or tensor.device != self.tokens.device:
                needed = ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes else axis for axis in axes)
                raise ValueError(
                    f"{type(self).__name__}.{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}: "
                    f"[{needed}] of {kind} on {self.tokens.device} is needed"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def _declared(self) -> dict[str, Any]:
        """What `tensor_field` says of each field that is a tensor."""
        return {field.name: field.metadata for field in fields(self) if field.metadata}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors with their names, without those that may be None and are."""
        values = ((name, getattr(self, name)) for name in self._declared)
        return ((name, tensor) for name, tensor in values if tensor is not None)

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device; itself where it already is there."""
        if self.tokens.device == device:
            return self
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors()}
        return replace(self, **moved)

    def split(self, sizes: int | list[int]) -> list[Self]:
        """Split into consecutive batches of `sizes` samples, none of them packed."""
        parts: dict[str, Any] = {name: tensor.split(sizes) for name, tensor in self.tensors()}
        return [
            replace(self, packing=None, **{name: tensors[i] for name, tensors in parts.items()})
            for i in range(len(parts["tokens"]))
        ]

    def reorder(self, order: list[int]) -> Self:
        """Return the batch with the samples in another order, not packed."""
        permuted: dict[str, Any] = {name: tensor[order] for name, tensor in self.tensors()}
        return replace(self, packing=None, **permuted)

    @property
    def targets(self) -> torch.Tensor:
        """`[B, T]` int64, the token that follows each; −1 where none of the sample does."""
        last = self.lengths[:, None] - 1
        later = torch.arange(self.tokens.shape[1], device=self.tokens.device) >= last
        return self.tokens.roll(-1, dims=1).masked_fill_(later, -1)

    @property
    def padding(self) -> torch.Tensor:
        """`[B, T]` bool, true for what is no token of the sample."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.lengths[:, None]

    def pack(self, values: torch.Tensor, filling: torch.Tensor | int = 0) -> torch.Tensor:
        """Return `[B, T, …]` as a model is fed it: unchanged, or as the packed row `[1, row, …]` (`Packing.pack`).

        Args:
            values: `[B, T, …]`, padded on the right.
            filling: one value or `[tail, …]`, for the tokens after the last sequence of a packed row.
        """
        return values if self.packing is None else self.packing.pack(values, filling)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Return a model's output for each token it was fed as `[B, T, …]`; differentiable (`Packing.unpack`).

        Args:
            values: `[1, row, …]` of a packed batch, `[B, T, …]` of another.

        Returns:
            `[B, T, …]`: 0 beyond a sequence's tokens if the batch is packed, `values` itself if it is not.
        """
        return values if self.packing is None else self.packing.unpack(values, self.tokens.shape[1])


AnyBatch = TypeVar("AnyBatch", bound=TokenBatch)


def make_token_batch(tokens: torch.Tensor) -> TokenBatch:
    """Make a batch of samples of T tokens each.

    Args:
        tokens: `[B, T]` int64.
    """
    return TokenBatch(tokens=tokens, lengths=torch.full((len(tokens),), tokens.shape[1]))


def padded_length(longest: int, multiple: int) -> int:
    """Return the length to pad to: the next multiple of what a sequence is split by (`layout.Place.multiple`).

    Args:
        longest: tokens of the longest sample.
        multiple: at least 1.
    """
    return -(-longest // multiple) * multiple
