"""Envelopes hold routes within 1.05 of the bound, and are read as they were written or refused."""

import itertools
import struct
import zlib
from dataclasses import replace
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing.recordings import SMALL, recording, routes, same

from megatron_bai.routing.routes import RouteSignature, VersionSpan, sorted_sets
from megatron_bai.routing.store import bit_planes
from megatron_bai.routing.store.codec import ENCODINGS, decode, encode, min_bytes, slice_layers, token_hash
from megatron_bai.routing.store.expert_set_code import min_bits, set_code

# Experts and top-k of models in use, and the corners of what is supported.
MODELS = [(4, 2), (8, 2), (60, 4), (64, 6), (64, 8), (128, 4), (128, 8), (160, 8), (256, 8), (257, 8), (384, 8),
          (512, 10), (768, 12), (128, 16), (256, 16), (1024, 1), (1024, 16), (2, 1), (17, 16), (41, 16)]  # fmt: skip
signatures = st.builds(
    lambda layers, model: RouteSignature(layers, *model),
    st.integers(1, 4), st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 2), (9, 9), (60, 4), (256, 8), (512, 10)]),
)  # fmt: skip
ranges = st.tuples(st.integers(0, 40), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
encodings = pytest.mark.parametrize("encoding", ENCODINGS)


# Numbering sets


@pytest.mark.parametrize("experts", range(1, 11))
def test_every_set_has_a_number_of_its_own_and_is_found_by_it(experts: int) -> None:
    for topk in range(1, experts + 1):
        code = set_code(experts, topk)
        every = np.array(list(itertools.combinations(range(experts), topk)), dtype=np.uint8)
        columns = np.ascontiguousarray(every.T)[:, None]
        words = code.encode(columns)
        assert np.array_equal(code.decode(words, len(every)), columns)
        assert len(every) == comb(experts, topk) == code.count  # small tables round nothing
        if code.group == 1:
            assert len(np.unique(words[0])) == len(every)


def test_without_rounding_the_number_is_the_combinatorial_number_systems() -> None:
    columns = np.array([1, 4, 6, 9], dtype=np.uint8).reshape(4, 1, 1)
    assert set_code(16, 4).encode(columns)[0].item() == comb(1, 1) + comb(4, 2) + comb(6, 3) + comb(9, 4)


@pytest.mark.parametrize(("experts", "topk"), MODELS)
def test_a_set_takes_at_most_1_04_of_the_bound(experts: int, topk: int) -> None:
    code = set_code(experts, topk)
    assert code.count >= comb(experts, topk) and code.count**code.group <= 1 << code.bits
    assert 1 <= code.bits / code.group / min_bits(experts, topk) <= 1.04


def test_the_bound_is_5_05_bytes_for_8_of_128() -> None:
    assert min_bits(128, 8) / 8 == pytest.approx(5.047, abs=1e-3)
    assert set_code(128, 8).bits == 41
    assert min_bytes(RouteSignature(48, 128, 8), 1000) == pytest.approx(1000 * np.log2(float(comb(128, 8))) / 8)


@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (3, 1), (64, 6), (128, 8), (512, 10), (128, 16), (5, 5)])
def test_a_number_no_set_has_is_refused(experts: int, topk: int) -> None:
    """Random words either are the words of what they are read as, or are refused."""
    code, random = set_code(experts, topk), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        words = [random.integers(0, 1 << bits, (1, 1)) for bits in code.fields]
        try:
            columns = code.decode(words, code.group)
        except ValueError as error:
            assert "no set of experts" in str(error)
            refused += 1
            continue
        assert all(np.array_equal(a, b) for a, b in zip(code.encode(columns), words))
        assert (np.diff(columns.astype(int), axis=0) > 0).all()
    assert refused or code.count == 1
    beyond = [np.array([[code.count**code.group >> shift & mask]]) for shift, mask in _limbs(code)]
    with pytest.raises(ValueError, match="no set of experts"):
        code.decode(beyond, code.group)


def _limbs(code) -> list[tuple[int, int]]:
    return [(0, (1 << 58) - 1), (58, (1 << 62) - 1)] if code.wide else [(0, (1 << 63) - 1)]


@given(st.integers(1, 62), st.integers(1, 3), st.integers(0, 40), st.integers(0, 2**31))
def test_planes_return_the_bits_they_were_given(bits: int, layers: int, count: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 1 << bits, (layers, count))
    found = np.zeros_like(words)
    for shift, width in bit_planes.plane_layout(bits):
        plane = np.zeros((layers, bit_planes.plane_bytes(count, width)), dtype=np.uint8)
        bit_planes.write_plane(words, shift, width, plane)
        bit_planes.read_plane(plane, shift, width, found)
    assert np.array_equal(found, words)


@given(signatures, st.integers(0, 9), st.integers(0, 2**31))
def test_the_sorting_network_sorts(signature: RouteSignature, rows: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 5, (rows, signature.moe_layers, signature.topk), dtype=np.uint8)
    assert np.array_equal(sorted_sets(ids), np.sort(ids, axis=-1).transpose(2, 1, 0))


# Envelopes


@encodings
@given(signature=signatures, shape=ranges)
@settings(max_examples=40)
def test_what_is_encoded_comes_back(encoding: str, signature: RouteSignature, shape: tuple) -> None:
    rows, seed, valid = shape
    wanted = recording(rows, signature, seed, valid)
    found = decode(encode(wanted, encoding), signature)
    assert same(found, wanted, ordered=encoding == "plain")
    assert found.num_sets == int(wanted.valid.sum()) * signature.moe_layers
    if encoding == "compact":
        assert (np.diff(found.ids[found.valid].astype(int), axis=-1) > 0).all()


@pytest.mark.parametrize(("experts", "topk"), MODELS)
def test_every_model_in_both_encodings(experts: int, topk: int) -> None:
    wanted = recording(70, RouteSignature(2, experts, topk), seed=experts)
    wanted.ids[0], wanted.ids[1] = np.arange(topk), np.arange(experts - topk, experts)
    assert same(decode(encode(wanted, "plain")), wanted, ordered=True)
    assert same(decode(encode(wanted, "compact")), wanted)


@pytest.mark.parametrize(
    ("signature", "rows"),
    [(RouteSignature(48, 128, 8), 1024), (RouteSignature(24, 64, 6), 2048), (RouteSignature(4, 8, 2), 1000),
     (RouteSignature(58, 256, 8), 512), (RouteSignature(48, 512, 10), 512), (RouteSignature(3, 4, 2), 4000)],
)  # fmt: skip
def test_a_whole_envelope_is_within_1_05_of_the_bound(signature: RouteSignature, rows: int) -> None:
    wanted = recording(rows, signature)
    size = len(encode(wanted, "compact"))
    assert min_bytes(signature, wanted.num_sets) <= size <= 1.05 * min_bytes(signature, wanted.num_sets)


@encodings
@given(signature=signatures, shape=ranges, data=st.data())
@settings(max_examples=40)
def test_layers_cut_out_are_those_layers(
    encoding: str, signature: RouteSignature, shape: tuple, data: st.DataObject
) -> None:
    rows, seed, valid = shape
    whole = recording(rows, signature, seed, valid)
    stop = data.draw(st.integers(1, signature.moe_layers))
    start = data.draw(st.integers(0, stop - 1))
    part = slice_layers(encode(whole, encoding), start, stop)
    assert same(decode(part), replace(whole, ids=whole.ids[:, start:stop], first_layer=start))
    assert part == encode(decode(part), encoding)  # the same bytes as had those layers been encoded alone
    assert slice_layers(part, stop - 1, stop) == slice_layers(encode(whole, encoding), stop - 1, stop)
    for outside in ((stop - 1, stop + 1), (start - 1, stop), (stop, stop)):
        with pytest.raises(ValueError, match="of an envelope with"):
            slice_layers(part, *outside)


def test_the_token_hash_knows_tokens_and_not_their_dtype() -> None:
    tokens = np.array([5, 6, 7])
    assert token_hash(tokens) == token_hash(tokens.astype(np.int32)) != token_hash(np.array([5, 7, 6]))
    assert len(token_hash(tokens)) == 16


# Damage


@encodings
@pytest.mark.parametrize("valid", [1.0, 0.6])
def test_every_flipped_bit_and_every_truncation_is_refused(encoding: str, valid: float) -> None:
    data = encode(recording(9, valid=valid), encoding)
    for at in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            with pytest.raises(ValueError):
                decode(bytes(broken))
        with pytest.raises(ValueError):
            decode(data[:at])
    with pytest.raises(ValueError, match="checksum"):
        decode(data + b"\0")


@encodings
@given(data=st.data())
@settings(max_examples=200)
def test_a_forged_envelope_is_refused_or_holds_routes(encoding: str, data: st.DataObject) -> None:
    """Damage with a right checksum: what is read is still consistent, and nothing but ValueError is raised."""
    whole = encode(recording(9, valid=data.draw(st.sampled_from([1.0, 0.6]))), encoding)
    body = bytearray(whole[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(len(body) - 4, len(body)))] + data.draw(st.binary(max_size=3))
    _refused_or_routes(_sealed(body))


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)
    _refused_or_routes(_sealed(b"MBRT\x01" + data))


def _sealed(body: bytes) -> bytes:
    return bytes(body) + struct.pack("<I", zlib.crc32(body))


def _refused_or_routes(data: bytes) -> None:
    try:
        found = decode(data)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    ids = found.ids[found.valid].astype(int)
    assert found.ids.shape[1:] == (found.ids.shape[1], found.signature.topk) and len(found.valid) == len(found.ids)
    assert ((ids >= 0) & (ids < found.signature.num_experts)).all()
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()
    assert not found.spans or found.spans[-1].end == len(found.ids)


def test_a_small_forged_envelope_cannot_ask_for_much_memory() -> None:
    """One expert of one needs no bits, a bitmap of zeros one an absent row: rows times layers could be anything."""
    body = struct.pack("<4sBBBBHHHHIH16s", b"MBRT", 1, 1, 0, 1, 1, 65535, 0, 65535, 2**32 - 1, 0, bytes(16))
    with pytest.raises(ValueError, match="4294967295 rows of 65535 layers exceed"):
        decode(_sealed(body))


def test_a_bitmap_has_an_absent_row_and_nothing_beyond_the_last() -> None:
    body = bytearray(encode(recording(9, valid=0.6))[:-4])
    at = body.index(recording(9).spans[1].version.encode()) + len(recording(9).spans[1].version.encode())
    assert body[at + 1] in (0, 1)  # the ninth row
    body[at + 1] |= 2
    with pytest.raises(ValueError, match="bitmap of rows"):
        decode(_sealed(body))
    body[at : at + 2] = b"\xff\x01"
    with pytest.raises(ValueError, match="bitmap of rows"):
        decode(_sealed(body))


def test_other_versions_other_models_and_other_files_are_named() -> None:
    data = encode(recording(5))
    with pytest.raises(ValueError, match="envelope of version 2, this release reads version 1"):
        decode(_sealed(data[:4] + b"\x02" + data[5:-4]))
    with pytest.raises(ValueError, match="begins with b'MBRT', not b'PK"):
        decode(b"PK\x03\x04" + data[4:])
    with pytest.raises(ValueError, match=r"routes of RouteSignature.*num_experts=8.*the model is .*num_experts=9"):
        decode(data, RouteSignature(3, 9, 2))
    with pytest.raises(ValueError, match="unknown encoding 2"):
        decode(_sealed(data[:5] + b"\x02" + data[6:-4]))


@encodings
def test_what_is_no_recording_is_not_encoded(encoding: str) -> None:
    good = recording(6)
    twice, outside = good.ids.copy(), good.ids.copy()
    twice[3, 1, 0] = twice[3, 1, 1]
    outside[3, 1, 0] = 8
    for broken, said in [
        (replace(good, ids=twice), "same expert twice"),
        (replace(good, ids=outside), "expert ids from 0 to 8"),
        (replace(good, ids=good.ids[:, 0]), "shape"),
        (replace(good, ids=good.ids[..., :1]), "shape"),
        (replace(good, valid=good.valid[:-1]), "validity"),
        (replace(good, first_layer=1), "3 layers from 1 of a model with 3"),
        (replace(good, spans=(VersionSpan("1", 0, 5),)), "do not cover 6 rows"),
        (replace(good, spans=(VersionSpan("1", 0, 3), VersionSpan("2", 4, 6))), "do not cover 6 rows"),
        (replace(good, spans=(VersionSpan("x" * 256, 0, 6),)), "255 bytes"),
    ]:
        with pytest.raises(ValueError, match=said):
            encode(broken, encoding)
    with pytest.raises(ValueError, match="choose one of plain, compact"):
        encode(good, "zip")


def test_rows_without_a_route_are_not_looked_at() -> None:
    wanted = recording(20, valid=0.5)
    noisy = wanted.ids.copy()
    noisy[~wanted.valid] = 7  # seven twice would be refused in a row that counts
    assert same(decode(encode(replace(wanted, ids=noisy), "compact")), wanted)


def test_models_beyond_the_numbering_are_sent_to_the_plain_encoding() -> None:
    signature = RouteSignature(1, 2000, 4)
    wanted = replace(recording(5, signature), ids=routes(5, signature, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="use the plain encoding"):
        encode(wanted, "compact")
    assert same(decode(encode(wanted, "plain")), wanted, ordered=True)
    assert SMALL.dtype is np.uint8 and decode(encode(wanted)).ids.dtype == np.int16
