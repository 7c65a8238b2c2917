"""Which part of a tensor is one parameter.

Megatron-Core stacks the layers' parameters into one tensor [layers, …] and the experts' into [layers, experts, …];
other checkpoints have a tensor for each layer or for each expert. Methods that look at a parameter as a whole, its norm
or its largest elements, must not see a difference: here every tensor is cut into slices, each what one layer or one
expert owns, and a slice has the same name and numbers however it is stored.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_bai.merge.boxes import Box, row_major, split

# `layers.` or `experts.`, and the number that follows it unless an axis of the tensor counts them. Megatron-Core writes
# `experts.experts.`, of which the second is meant; the `shared_experts` are one parameter.
LAYERS = re.compile(r"\b(layers)\.(?:(\d+)\.)?")
EXPERTS = re.compile(r"\b(experts)\.(?!experts\.)(?:(\d+)\.)?")


def _numbers(key: str) -> list[int | None]:
    """The layer and the expert that a name holds, if it is of one; None where an axis must tell."""
    found = [pattern.search(key) for pattern in (LAYERS, EXPERTS)]
    return [None if match[2] is None else int(match[2]) for match in found if match]


def slice_axes(key: str, shape: tuple[int, ...]) -> int:
    """How many of a tensor's leading axes count layers and experts."""
    return min(_numbers(key).count(None), len(shape))


def canonical(key: str) -> str:
    """A tensor's name without the numbers of its layer and expert."""
    return EXPERTS.sub(r"\1.", LAYERS.sub(r"\1.", key, count=1), count=1)


@dataclass(frozen=True)
class Part:
    """A box inside one slice of a tensor.

    Attributes:
        key, shape: the tensor's.
        box: the part, in the tensor.
    """

    key: str
    shape: tuple[int, ...]
    box: Box

    @property
    def count(self) -> int:
        """Of its elements."""
        return math.prod(self.box[1])

    @property
    def index(self) -> tuple[int, ...]:
        """Where the slice is, along the tensor's leading axes."""
        return self.box[0][: slice_axes(self.key, self.shape)]

    @property
    def name(self) -> str:
        """The slice's name, the same in any spelling: its parameter, layer and expert."""
        axes = iter(self.index)
        numbers = [next(axes, 0) if number is None else number for number in _numbers(self.key)]
        return " ".join([canonical(self.key), *map(str, numbers)])

    def elements(self) -> torch.Tensor:
        """int64 [count]: the number of each element in its slice, in row-major order."""
        axes = slice_axes(self.key, self.shape)
        numbers = torch.zeros((), dtype=torch.int64)
        for low, size, stride in zip(self.box[0][axes:], self.box[1][axes:], row_major(self.shape[axes:])):
            numbers = numbers.unsqueeze(-1) + torch.arange(low, low + size) * stride
        return numbers.reshape(-1)


def parts(key: str, shape: tuple[int, ...], box: Box, limit: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `limit` elements, each inside one slice."""
    axes = slice_axes(key, shape)
    offsets, sizes = box
    for index in itertools.product(*(range(low, low + size) for low, size in zip(offsets[:axes], sizes[:axes]))):
        yield from split((*index, *offsets[axes:]), (*(1 for _ in index), *sizes[axes:]), limit)


def slices(key: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """Every slice of a tensor, whole."""
    axes = slice_axes(key, shape)
    for index in itertools.product(*map(range, shape[:axes])):
        low = (*index, *(0 for _ in shape[axes:]))
        yield Part(key, shape, (low, (*(1 for _ in index), *shape[axes:])))
