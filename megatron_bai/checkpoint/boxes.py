"""Geometry of boxes in tensors. A box is (offsets, sizes) in a global tensor; all numbers are in elements."""

import functools
import math
from collections.abc import Iterator

Box = tuple[tuple[int, ...], tuple[int, ...]]


def split_box(offsets: tuple[int, ...], sizes: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Split a box into boxes of at most `limit` elements, in row-major order.

    Args:
        offsets: of the box.
        sizes: of the box.
        limit: elements of one of the results, at least 1.

    Yields:
        Boxes whose elements are contiguous within the box.
    """
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
    """Return the box that two boxes have in common, or None.

    Args:
        a: box of a tensor.
        b: box of the same tensor.

    Returns:
        The common box in the tensor's coordinates; None where it would be empty.
    """
    low = tuple(map(max, a[0], b[0]))
    sizes = tuple(min(o + s, p + t) - lo for o, s, p, t, lo in zip(*a, *b, low, strict=True))
    return (low, sizes) if min(sizes, default=1) > 0 else None


def box_slices(box: Box, offsets: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the slices that select `box` of a tensor whose element [0, …, 0] is at `offsets`.

    Args:
        box: in the global tensor; lies inside the part that is sliced.
        offsets: of that part in the global tensor.
    """
    return tuple(slice(low - o, low - o + size) for low, size, o in zip(*box, offsets, strict=True))


@functools.lru_cache(maxsize=4096)  # thousands of chunks have a few shapes
def strided_extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Count the elements from the first to the last of a strided box, both included; 0 for an empty one.

    Args:
        sizes: of the box.
        strides: in elements, at least 0, one for each size.
    """
    return (
        1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if min(sizes, default=1)
        else 0
    )


@functools.lru_cache(maxsize=4096)
def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_row_major(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether the elements of a strided box are contiguous, in its own order.

    Args:
        sizes: of the box.
        strides: in elements; those of dimensions of size 1 do not matter.
    """
    usual = row_major_strides(sizes)
    return strides == usual or all(size == 1 or a == b for size, a, b in zip(sizes, strides, usual, strict=True))
