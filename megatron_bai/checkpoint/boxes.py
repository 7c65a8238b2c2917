"""Geometry of tensors cut into boxes. A box is (offsets, sizes) in the global tensor; all in elements."""

import functools
import math
from collections.abc import Iterator

Box = tuple[tuple[int, ...], tuple[int, ...]]


def split_box(offsets: tuple[int, ...], sizes: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `limit` elements, in row-major order, each contiguous within the box."""
    if math.prod(sizes) <= limit:
        yield offsets, sizes
        return
    axis = next(i for i, size in enumerate(sizes) if size > 1)
    rows = max(limit // math.prod(sizes[axis + 1 :]), 1)
    for row in range(0, sizes[axis], rows):
        low = offsets[:axis] + (offsets[axis] + row,) + offsets[axis + 1 :]
        size = sizes[:axis] + (min(rows, sizes[axis] - row),) + sizes[axis + 1 :]
        yield from split_box(low, size, limit)


def intersect_boxes(a: Box, b: Box) -> Box | None:
    """What two boxes have in common, or None."""
    low = tuple(map(max, a[0], b[0]))
    sizes = tuple(min(o + s, p + t) - lo for o, s, p, t, lo in zip(*a, *b, low, strict=True))
    return (low, sizes) if min(sizes, default=1) > 0 else None


def box_slices(box: Box, offsets: tuple[int, ...]) -> tuple[slice, ...]:
    """The slices that select `box` of a tensor whose element [0, …, 0] is at `offsets`."""
    return tuple(slice(low - o, low - o + size) for low, size, o in zip(*box, offsets, strict=True))


@functools.lru_cache(maxsize=4096)  # thousands of chunks have a few shapes
def strided_extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided box, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if min(sizes, default=1) else 0


@functools.lru_cache(maxsize=4096)
def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_row_major(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements of a strided box lie one after another, in its own order."""
    usual = row_major_strides(sizes)
    return strides == usual or all(size == 1 or a == b for size, a, b in zip(sizes, strides, usual, strict=True))
