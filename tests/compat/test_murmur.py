"""The hash behind seeded sampling against MurmurHash3 written out in plain Python."""

import random
import struct

import torch

from megatron_bai.compat.sglang_cpu_kernels import murmur_hash32


def reference(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 of a multiple of four bytes (Appleby, public domain algorithm)."""
    mask = 0xFFFFFFFF
    h = 0
    for (k,) in struct.iter_unpack("<I", data):
        k = k * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        h = (h << 13 | h >> 19) & mask
        h = (h * 5 + 0xE6546B64) & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


def test_reference_is_murmur3() -> None:
    """Published test vectors for seed 0."""
    assert reference(b"") == 0
    assert reference(b"\x00\x00\x00\x00") == 0x2362F9DE
    assert reference(b"\x21\x43\x65\x87") == 0xF55B516B


def test_matches_the_reference() -> None:
    draw = random.Random(0)
    seeds = [0, 1, 42, 2**63 - 1, 2**63, 2**64 - 1] + [draw.getrandbits(64) for _ in range(20)]
    positions = [0, 1, 2**31 - 1] + [draw.getrandbits(31) for _ in range(len(seeds) - 3)]
    columns = [0, 1, 2, 63, 151935] + [draw.getrandbits(31) for _ in range(20)]
    found = murmur_hash32(
        torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds]).view(torch.uint64),
        torch.tensor(positions),
        torch.tensor(columns, dtype=torch.int32),
    )
    assert found.dtype == torch.uint32 and found.shape == (len(seeds), len(columns))
    wanted = [[reference(struct.pack("<QII", s, p, c)) for c in columns] for s, p in zip(seeds, positions, strict=True)]
    assert found.to(torch.int64).tolist() == wanted
