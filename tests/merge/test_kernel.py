"""The compiled sum of bfloat16 values against torch's separate operations, bit for bit, alone and from file to file."""

import math
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack

import kernel_reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bai.merge.execution import bf16_kernel

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1 + 2**-7, 2.0**-126, 2.0**-133, -(2.0**-133), 2.0**127, -(2.0**127)]

NUMBERS = st.sampled_from(SPECIAL) | st.floats(width=16, allow_nan=False, allow_infinity=False)


def bits(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.uint16).numpy()


def run(sources: torch.Tensor, coefficients: Sequence[float], rows: Sequence[int] | None = None):
    """The sums of bfloat16 [sources, elements], the largest magnitude's bits and the sum of squares."""
    out = np.zeros(sources.shape[1], np.uint16)
    used = np.array(range(len(coefficients)) if rows is None else rows)
    largest, squares = bf16_kernel.weighted_sum(bits(sources), used, np.array(coefficients, np.float32), out)
    return torch.from_numpy(out).view(torch.bfloat16), largest, squares


def plain(sources: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """float32, each product and each sum rounded, in the order of the sources; one operation of torch for each."""
    total = sources[0].float().mul_(coefficients[0])
    for row, coefficient in zip(sources[1:], coefficients[1:]):
        total.add_(row.float().mul_(coefficient))
    return total


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a.view(torch.int16) == b.view(torch.int16)).all())


@pytest.mark.parametrize("count", [1, 7, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("inputs", [1, 2, 3, 5])
def test_the_bits_are_those_of_torch(inputs, count):
    torch.manual_seed(inputs * count)
    sources = (torch.randn(inputs, count) * torch.logspace(-4, 4, count)).bfloat16()
    coefficients = [0.1, 0.7, 0.3, -0.2, 0.1][:inputs]
    total = plain(sources, coefficients)
    merged, largest, squares = run(sources, coefficients)
    assert same(merged, total.bfloat16())
    assert largest == int(total.abs().max().view(torch.int32))
    assert squares == pytest.approx(float(total.double().square().sum()), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[NUMBERS] * 3), min_size=1))
def test_zeros_subnormals_and_ties_too(values):
    sources = torch.tensor(values).T.bfloat16().contiguous()
    for coefficients in ([1.0, 0.5, 2.0**-9], [0.5, 0.25, 0.25], [1.0, -1.0, 0.3]):
        total = plain(sources, coefficients)
        assert same(run(sources, coefficients)[0], total.bfloat16())


FINITE_BITS = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)
FACTORS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-4, max_value=4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bits_and_factors_give_the_bits_of_numpy_and_torch(data):
    """What pyproject's range of numba rests on: no release of it may round, fuse or order anything otherwise."""
    inputs = data.draw(st.integers(1, 5))
    row = st.lists(FINITE_BITS, min_size=1, max_size=40)
    columns = data.draw(st.lists(st.tuples(*[FINITE_BITS] * inputs), min_size=1, max_size=40) if inputs > 1 else row)
    # repeated to a length about the block's, so that vectorised loops, their ends and every lane are met
    repeats = -(-data.draw(st.sampled_from([1, 17, 1023, 1024, 1025, 2500])) // len(columns))
    sources = np.tile(np.array(columns, np.uint16).reshape(len(columns), inputs).T, repeats)
    factors = np.array(data.draw(st.lists(FACTORS, min_size=inputs, max_size=inputs)), np.float32)
    merged, largest, squares = run(torch.from_numpy(sources.copy()).view(torch.bfloat16), factors)
    expected, expected_largest, expected_squares = kernel_reference.reference(sources, factors)
    total = plain(torch.from_numpy(sources.copy()).view(torch.bfloat16), factors.tolist())
    assert largest == expected_largest == int(total.abs().max().view(torch.int32))
    if largest < 0x7F800000:
        assert bits(merged).tobytes() == expected.tobytes() == bits(total.bfloat16()).tobytes()
        assert squares.hex() == float(expected_squares).hex()


def test_the_bits_are_those_of_other_machines_and_releases_of_numba():
    assert kernel_reference.digest_of(bf16_kernel.weighted_sum) == kernel_reference.DIGEST


def test_every_bfloat16_is_itself():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()].unsqueeze(0).contiguous()
    merged, largest, _ = run(every, [1.0])
    assert same(merged, every[0]) and largest <= bf16_kernel.MAX_FINITE_BITS, "the largest finite one is no overflow"


def test_ties_go_to_even():
    values = torch.tensor([[1.0, 1 + 2**-7, 1 + 2**-6], [2**-8, 2**-8, -(2**-8)]]).bfloat16()
    assert run(values, [1.0, 1.0])[0].tolist() == [1.0, 1 + 2**-6, 1 + 2**-6]  # the exact sums lie in the middle


def test_the_order_is_that_of_the_rows():
    values = torch.tensor([[2.0**30], [-(2.0**30)], [1.0]]).bfloat16()
    assert run(values, [1.0, 1.0, 1.0])[0].item() == 1.0
    assert run(values, [1.0, 1.0, 1.0], rows=[0, 2, 1])[0].item() == 0.0, "1 is lost beside 2³⁰"
    assert run(values, [3.0, 5.0], rows=[2, 2])[0].item() == 8.0


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source, at", [(0, 0), (1, 1030), (2, 2999)])
def test_nan_and_infinity_are_seen_wherever_they_are(bad, source, at):
    values = torch.ones(3, 3000).bfloat16()
    values[source, at] = bad
    assert run(values, [0.5, 0.25, 0.25])[1] > bf16_kernel.MAX_FINITE_BITS
    rows = [i for i in range(3) if i != source]
    assert run(values, [0.5, 0.5], rows)[1] <= bf16_kernel.MAX_FINITE_BITS, (
        "a source without a part in the sum cannot spoil it"
    )


def test_what_is_rounded_to_infinity_is_seen():
    most = torch.finfo(torch.bfloat16).max
    for above, finite in ((2.0**119, False), (2.0**118, True)):  # half the last place, and a quarter
        merged, largest, _ = run(torch.tensor([[most], [above]]).bfloat16(), [1.0, 1.0])
        assert bool(merged.isfinite()) == finite == (largest <= bf16_kernel.MAX_FINITE_BITS)


def test_only_what_is_asked_for_is_written():
    out = np.full(20, 7, np.uint16)
    bf16_kernel.weighted_sum(np.zeros((2, 64), np.uint16), np.array([0, 1]), np.ones(2, np.float32), out[:9])
    assert out.tolist() == [0] * 9 + [7] * 11


SUMS = [([0, 1, 2], [0.5, 0.25, 0.25]), ([2, 0], [1.0, -0.3])]
COUNT, BEFORE, TILE = 1000, 37, 64


@pytest.fixture
def files(tmp_path):
    """Three sources whose values begin at an odd byte, and two outputs: the values and the descriptors."""
    torch.manual_seed(0)
    values = torch.randn(3, COUNT).bfloat16()
    for i, row in enumerate(values):
        (tmp_path / f"in{i}").write_bytes(bytes(BEFORE) + bits(row).tobytes())
    with ExitStack() as stack:
        opened = [stack.enter_context(open(tmp_path / f"in{i}", "r+b", buffering=0)) for i in range(3)]
        opened += [stack.enter_context(open(tmp_path / f"out{k}", "w+b", buffering=0)) for k in range(2)]
        yield values, [file.fileno() for file in opened]


def stream(descriptors: Sequence[int], length: int = 2 * COUNT):
    """Bytes done, the CRC-32s, continued from 1, 2, …, and the sums of squares, continued from 1."""
    rows = np.array([[len(used), *used, *[0] * (3 - len(used))] for used, _ in SUMS])
    factors = np.array([[*factors, *[0.0] * (3 - len(factors))] for _, factors in SUMS], np.float32)
    crcs, squares = np.arange(1, 6, dtype=np.uint32), np.ones(2)
    places = np.array([(descriptor, BEFORE if i < 3 else 5) for i, descriptor in enumerate(descriptors)])
    buffers = np.empty((3, TILE), np.uint16), np.empty(TILE, np.uint16)
    done, num_bytes = np.zeros(1, np.int64), np.array([length])
    bf16_kernel.stream(places[None], crcs[None], num_bytes, done, rows, factors, squares[None], *buffers)
    return int(done[0]), crcs.tolist(), squares.tolist()


def test_a_stream_is_the_same_sum_from_file_to_file(files):
    values, descriptors = files
    done, crcs, squares = stream(descriptors)
    assert done == 2 * COUNT
    for k, (used, factors) in enumerate(SUMS):
        total = plain(values[used], factors)
        written = os.pread(descriptors[3 + k], 1 << 20, 0)
        assert written == bytes(5) + bits(total.bfloat16()).tobytes()
        assert crcs[3 + k] == zlib.crc32(written[5:], 4 + k)
        assert squares[k] == pytest.approx(1 + float(total.double().square().sum()), rel=1e-12)
    assert crcs[:3] == [zlib.crc32(bits(row).tobytes(), 1 + i) for i, row in enumerate(values)]


@pytest.mark.parametrize("what", ["a source ends", "NaN", "an output cannot be written"])
def test_a_stream_stops_before_what_is_wrong(files, what):
    """… and all that it returns is of the tiles before, so that others can do the rest."""
    values, descriptors = files
    if what == "a source ends":
        os.truncate(descriptors[1], BEFORE + 2 * 300)
    elif what == "NaN":
        os.pwrite(descriptors[1], bits(torch.tensor([math.nan]).bfloat16()).tobytes(), BEFORE + 2 * 300)
    else:  # the second of the two, when the first has its tile
        descriptors[4] = os.open(f"/proc/self/fd/{descriptors[4]}", os.O_RDONLY)
    done, crcs, squares = stream(descriptors)
    assert done == (0 if what == "an output cannot be written" else 2 * 256)
    assert crcs[:3] == [zlib.crc32(bits(row[: done // 2]).tobytes(), 1 + i) for i, row in enumerate(values)]
    for k, (used, factors) in enumerate(SUMS):
        total = plain(values[used, : done // 2], factors)
        assert crcs[3 + k] == zlib.crc32(bits(total.bfloat16()).tobytes(), 4 + k)
        assert squares[k] == pytest.approx(1 + float(total.double().square().sum()), rel=1e-12)
