"""Integers of any number of bits as planes of 32, 16, 8, 4, 2 and 1 bits: 41 bits are 32 + 8 + 1.

Every plane holds one layer's integers after another's, so that layers are sliced out of packed data by offset alone.
"""

import numpy as np


def plane_layout(bits: int) -> list[tuple[int, int]]:
    """Return (first bit, width) of each of the planes that together hold words of `bits` bits."""
    planes, shift = [], 0
    for width in (32, 16, 8, 4, 2, 1):
        if bits & width:
            planes.append((shift, width))
            shift += width
    return planes


def plane_bytes(count: int, width: int) -> int:
    """Return the bytes of a plane of `width` bits that holds `count` words of one layer.

    Args:
        count: number of words.
        width: number of bits: 1, 2, 4, 8, 16 or 32.
    """
    return -(-count * width // 8)


def write_plane(words: np.ndarray, shift: int, width: int, out: np.ndarray) -> None:
    """Write bits `[shift, shift + width)` of words to a plane.

    Args:
        words: `[layers, count]` int64.
        shift: first bit.
        width: number of bits: 1, 2, 4, 8, 16 or 32.
        out: `[layers, plane_bytes(count, width)]` uint8, overwritten.
    """
    shifted = words >> shift
    if width >= 8:
        out.view(f"<u{width // 8}")[...] = shifted & ((1 << width) - 1)
        return
    lanes = 8 // width
    small = np.zeros((len(words), lanes * out.shape[1]), dtype=np.uint8)
    small[:, : words.shape[1]] = shifted & ((1 << width) - 1)
    small = small.reshape(len(words), lanes, -1)
    out[...] = small[:, 0]
    for lane in range(1, lanes):
        out |= small[:, lane] << (lane * width)


def read_plane(plane: np.ndarray, shift: int, width: int, words: np.ndarray) -> None:
    """Read a plane into bits `[shift, shift + width)` of words, the reverse of `write_plane`.

    Args:
        plane: `[layers, plane_bytes(count, width)]` uint8.
        shift: first bit.
        width: number of bits.
        words: `[layers, count]` int64, which have zeros there.
    """
    if width >= 8:
        words |= plane.view(f"<u{width // 8}").astype(np.int64) << shift
        return
    lanes = np.stack([(plane >> (lane * width)) & ((1 << width) - 1) for lane in range(8 // width)], axis=1)
    words |= lanes.reshape(len(plane), -1)[:, : words.shape[1]].astype(np.int64) << shift
