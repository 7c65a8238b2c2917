"""Slices: what one layer or one expert owns of a tensor, which is one parameter.

Megatron-Core stacks the layers' parameters into one tensor [layers, …] and the experts' into [layers, experts, …];
other checkpoints have a tensor for each layer or each expert, or for the halves of one. Methods that need
a parameter as a whole, its norm or its largest elements, must not see a difference: every canonical tensor
(`canonical_names`) is split into slices, and a slice and its elements have the same name and indices however they are
stored.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_bai.checkpoint.boxes import Box, row_major_strides, split_box
from megatron_bai.merge.recipe.regions import OutputTensor, Region


def num_slice_axes(output: OutputTensor) -> int:
    """Count a tensor's leading axes that are layers and experts.

    Args:
        output: tensor to write. Layers and experts that its name has the index of are no axes of it.

    Returns:
        2 for `[layers, experts, …]`, 1 for `[layers, …]` or one layer's `[experts, …]`, else 0.
    """
    in_name = len(output.canonical.origin) - len(output.shape)
    return len(output.canonical.axes) - in_name


@dataclass(frozen=True)
class SliceBox:
    """A box of a tensor that lies in one slice."""

    output: OutputTensor
    box: Box

    @property
    def num_elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.box[1])

    @property
    def slice_name(self) -> str:
        """The slice's name, the same under any tensor name: its parameter, layer and expert."""
        canonical = self.output.canonical
        return " ".join([canonical.name, *map(str, canonical.to_canonical(*self.box)[0][: len(canonical.axes)])])

    def element_indices(self) -> torch.Tensor:
        """Compute each element's index in its slice, in row-major order: int64 `[num_elements]`."""
        canonical, axes = self.output.canonical, num_slice_axes(self.output)
        # the second half of a slice begins after the first
        low = canonical.to_canonical(*self.box)[0][len(canonical.axes) :]
        indices = torch.zeros((), dtype=torch.int64)
        strides = row_major_strides(self.output.shape[axes:])
        for first, size, stride in zip(low, self.box[1][axes:], strides, strict=True):
            indices = indices.unsqueeze(-1) + torch.arange(first, first + size) * stride
        return indices.reshape(-1)


def split_by_slice(output: OutputTensor, box: Box, limit: int) -> Iterator[Box]:
    """Yield boxes of at most `limit` elements that a box consists of, each in one slice.

    Args:
        output: tensor to write, in which the boxes lie.
        box: to split.
        limit: largest number of elements of a result, at least 1.

    Yields:
        Boxes in row-major order; the elements of each are contiguous within `box`.
    """
    axes = num_slice_axes(output)
    offsets, sizes = box
    leading = zip(offsets[:axes], sizes[:axes], strict=True)
    for index in itertools.product(*(range(low, low + size) for low, size in leading)):
        yield from split_box((*index, *offsets[axes:]), (*(1 for _ in index), *sizes[axes:]), limit)


def iter_slices(region: Region) -> Iterator[SliceBox]:
    """Yield every slice of a region, as one box."""
    axes = num_slice_axes(region.output)
    offsets, sizes = region.box
    leading = zip(offsets[:axes], sizes[:axes], strict=True)
    for index in itertools.product(*(range(low, low + size) for low, size in leading)):
        yield SliceBox(region.output, ((*index, *offsets[axes:]), (*(1 for _ in index), *sizes[axes:])))
