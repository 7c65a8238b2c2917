"""The tensors to write, and their regions, each with one fate and one set of coefficients.

Most tensors are one region. A tensor that stacks layers is split where a pattern's range of layers begins or ends, and
the vocabulary's tensors after the last row that is a token's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise

import torch

from megatron_bai.checkpoint.boxes import Box
from megatron_bai.merge.tensor_names.canonical_names import CanonicalBox, canonical_box
from megatron_bai.merge.tensor_names.param_groups import matches, parse_layers
from megatron_bai.merge.tensor_names.vocabulary import is_vocab_tensor


class Fate(Enum):
    """What the elements of a region become."""

    MERGED = "merged"
    EQUAL = "equal"  # in all sources, and copied
    KEPT = "kept"  # copied from the pretrained checkpoint


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: `merged`, or else equal in all sources."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    merged: bool
    known_as: CanonicalBox | None = None  # by a family's table; None: by the general rules

    @cached_property
    def canonical(self) -> CanonicalBox:
        """The tensor as a box of a canonical one."""
        return self.known_as or canonical_box(self.key, self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Region:
    """A box of an output tensor.

    Attributes:
        name: the tensor's key, and the rows where it is not all of them: `decoder.layers.mlp.router.weight[0:12]`.
        layer: one of the decoder layers in it, all of which match the same patterns; None where it belongs to none.
    """

    output: OutputTensor
    box: Box
    name: str
    fate: Fate
    layer: int | None

    @property
    def key(self) -> str:
        """The output tensor's name."""
        return self.output.key

    @property
    def dtype(self) -> torch.dtype:
        """The output tensor's dtype."""
        return self.output.dtype


def split_into_regions(output: OutputTensor, patterns: Sequence[str], vocab_size: int | None) -> tuple[Region, ...]:
    """Split a tensor into regions, in order.

    Args:
        output: the tensor.
        patterns: of the recipe.
        vocab_size: number of rows of the vocabulary's tensors that are a token's; None: all.
    """
    key, shape = output.key, output.shape
    layers = output.canonical.layers
    stacked = layers is not None and len(output.canonical.sizes) == len(shape)
    if not output.merged:
        return (_make_region(output, None, Fate.EQUAL, None),)
    if vocab_size is not None and is_vocab_tensor(key) and vocab_size < shape[0]:
        return (
            _make_region(output, range(vocab_size), Fate.MERGED, None),
            _make_region(output, range(vocab_size, shape[0]), Fate.KEPT, None),
        )
    if layers is None or not stacked:
        return (_make_region(output, None, Fate.MERGED, None if layers is None else layers[0]),)
    bounds = {layers.start, layers.stop}
    for pattern in patterns:
        matching = parse_layers(pattern)
        if matching is not None and matches(pattern, key, matching.start):
            bounds |= {matching.start, matching.stop} & set(layers)
    if len(bounds) <= 2:
        return (_make_region(output, None, Fate.MERGED, layers.start),)
    return tuple(_make_region(output, range(a, b), Fate.MERGED, a) for a, b in pairwise(sorted(bounds)))


def make_kept_region(output: OutputTensor) -> Region:
    """Make the one region of a tensor that stays as it is in the pretrained checkpoint.

    Args:
        output: the tensor.
    """
    return _make_region(output, None, Fate.KEPT, None)


def _make_region(output: OutputTensor, rows: range | None, fate: Fate, layer: int | None) -> Region:
    """Make a region of some rows of a tensor, or of all of it."""
    zeros = (0,) * len(output.shape)
    if rows is None:
        return Region(output, (zeros, output.shape), output.key, fate, layer)
    box = (rows.start, *zeros[1:]), (len(rows), *output.shape[1:])
    return Region(output, box, f"{output.key}[{rows.start}:{rows.stop}]", fate, layer)
