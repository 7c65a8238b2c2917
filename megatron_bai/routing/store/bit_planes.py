"""Integers of any number of bits as planes of 32, 16, 8, 4, 2 and 1 bits: 41 bits are 32 + 8 + 1.

Every plane holds one layer's integers after another's, so that layers are cut out of packed data by their place alone.
"""

import numpy as np


def plane_layout(bits: int) -> list[tuple[int, int]]:
    """(first bit, width) of each plane that together hold words of `bits` bits."""
    found, shift = [], 0
    for width in (32, 16, 8, 4, 2, 1):
        if bits & width:
            found.append((shift, width))
            shift += width
    return found


def plane_bytes(count: int, width: int) -> int:
    """Bytes of a plane of `count` words of one layer."""
    return -(-count * width // 8)


def write_plane(words: np.ndarray, shift: int, width: int, out: np.ndarray) -> None:
    """Put bits `[shift, shift + width)` of int64 `[layers, count]` into uint8 `[layers, bytes]`."""
    part = words >> shift
    if width >= 8:
        out.view(f"<u{width // 8}")[...] = part & ((1 << width) - 1)
        return
    lanes = 8 // width
    small = np.zeros((len(words), lanes * out.shape[1]), dtype=np.uint8)
    small[:, : words.shape[1]] = part & ((1 << width) - 1)
    small = small.reshape(len(words), lanes, -1)
    out[...] = small[:, 0]
    for lane in range(1, lanes):
        out |= small[:, lane] << (lane * width)


def read_plane(plane: np.ndarray, shift: int, width: int, words: np.ndarray) -> None:
    """Add to int64 `[layers, count]` what `write` took."""
    if width >= 8:
        words |= plane.view(f"<u{width // 8}").astype(np.int64) << shift
        return
    lanes = np.stack([(plane >> (lane * width)) & ((1 << width) - 1) for lane in range(8 // width)], axis=1)
    words |= lanes.reshape(len(plane), -1)[:, : words.shape[1]].astype(np.int64) << shift
