"""Which part of a tensor is one parameter.

Megatron-Core stacks the layers' parameters into one tensor [layers, …] and the experts' into [layers, experts, …];
other checkpoints have a tensor for each layer or each expert, or for the halves of one. Methods that look at a
parameter as a whole, its norm or its largest elements, must not see a difference: here every canonical tensor
(`spelling`) is cut into slices, each what one layer or one expert owns, and a slice has the same name and numbers
however it is stored.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_bai.checkpoint.boxes import Box, row_major_strides, split_box
from megatron_bai.merge.recipe.regions import OutputTensor, Region


def num_slice_axes(output: OutputTensor) -> int:
    """How many of a tensor's leading axes count layers and experts."""
    in_name = len(output.canonical.origin) - len(output.shape)
    return len(output.canonical.axes) - in_name


@dataclass(frozen=True)
class SliceBox:
    """A box of a tensor inside one slice."""

    output: OutputTensor
    box: Box

    @property
    def num_elements(self) -> int:
        """Of its elements."""
        return math.prod(self.box[1])

    @property
    def slice_name(self) -> str:
        """The slice's name, the same in any spelling: its parameter, layer and expert."""
        place = self.output.canonical
        return " ".join([place.name, *map(str, place.to_canonical(*self.box)[0][: len(place.axes)])])

    def element_indices(self) -> torch.Tensor:
        """int64 [count]: the number of each element in its slice, in row-major order."""
        place, axes = self.output.canonical, num_slice_axes(self.output)
        low = place.to_canonical(*self.box)[0][len(place.axes) :]  # the second half of a slice begins behind the first
        numbers = torch.zeros((), dtype=torch.int64)
        for first, size, stride in zip(low, self.box[1][axes:], row_major_strides(self.output.shape[axes:]), strict=True):
            numbers = numbers.unsqueeze(-1) + torch.arange(first, first + size) * stride
        return numbers.reshape(-1)


def split_by_slice(output: OutputTensor, box: Box, limit: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `limit` elements, each inside one slice."""
    axes = num_slice_axes(output)
    offsets, sizes = box
    for index in itertools.product(*(range(low, low + size) for low, size in zip(offsets[:axes], sizes[:axes], strict=True))):
        yield from split_box((*index, *offsets[axes:]), (*(1 for _ in index), *sizes[axes:]), limit)


def iter_slices(region: Region) -> Iterator[SliceBox]:
    """Every slice of a region, whole."""
    axes = num_slice_axes(region.output)
    offsets, sizes = region.box
    for index in itertools.product(*(range(low, low + size) for low, size in zip(offsets[:axes], sizes[:axes], strict=True))):
        yield SliceBox(region.output, ((*index, *offsets[axes:]), (*(1 for _ in index), *sizes[axes:])))
