"""The envelope: routes of one sequence as bytes that name the model, weights and tokens they belong to.

    header      magic, format version, encoding, signature, layers held, rows, token hash     38 bytes
    spans       weight version of each range of rows
    bitmap      one bit a row, only when some row has no route
    payload     the rows that have one
    checksum    CRC-32 of everything above

`plain` keeps ids as they are (uint8, or int16 above 256 experts), order included: a copy and a check. `compact` keeps
the sets (order carries no meaning) as numbers of equal length, within 1.05 of the bound log₂ C(E, k) (see
`expert_set_code`); it returns ids in ascending order. Both hold layers apart, so that `slice_layers` takes a pipeline
stage's layers without decoding.

An envelope is either read as it was written or refused. CRC-32 finds every damage of up to 32 adjacent bits and leaves
one in 2³² of the others to the checks of structure; it does not stop someone who forges it, whose ids are still routes.
"""

import struct
import zlib
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from megatron_bai.routing.routes import (
    RouteSignature,
    VersionSpan,
    check_distinct,
    check_ids,
    check_range,
    layer_chunks,
    sorted_sets,
)
from megatron_bai.routing.store import bit_planes
from megatron_bai.routing.store.expert_set_code import SetCode, min_bits, set_code

MAGIC = b"MBRT"
VERSION = 1
ENCODINGS = ("plain", "compact")
HASH_BYTES = 16
MAX_DECODED = 1 << 31  # bytes of ids: a forged header must not exhaust memory. A million tokens of 94 layers fit.
_HEADER = struct.Struct("<4sBBBBHHHHIH16s")
_SPAN = struct.Struct("<IIB")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class SampleRoutes:
    """The routes of one sequence.

    Attributes:
        signature: of the model.
        ids: `[rows, layers, topk]` expert ids in the signature's dtype; zeros, which are no routes, where not valid.
        valid: `[rows]` bool, rows that have a route.
        spans: weight versions, covering the rows in order; empty where unknown.
        token_hash: `token_hash` of the sequence.
        first_layer: `ids[:, j]` belongs to MoE layer first_layer + j.
    """

    signature: RouteSignature
    ids: np.ndarray
    valid: np.ndarray
    spans: tuple[VersionSpan, ...]
    token_hash: bytes
    first_layer: int = 0

    @property
    def num_sets(self) -> int:
        """Number of (row, layer) pairs with a route."""
        layers: int = self.ids.shape[1]
        return int(self.valid.sum()) * layers


def token_hash(tokens: np.ndarray) -> bytes:
    """Compute a digest of token ids `[T]` of any integer dtype: BLAKE2b, 16 bytes."""
    return blake2b(np.ascontiguousarray(tokens, dtype="<i8").tobytes(), digest_size=HASH_BYTES).digest()


def min_bytes(signature: RouteSignature, sets: int) -> float:
    """Compute the fewest bytes that this many (row, layer) sets take, when all sets are equally likely.

    Args:
        signature: of the model; `num_experts` and `topk` are used.
        sets: number of sets, as in `SampleRoutes.num_sets`.

    Returns:
        Bytes, not rounded up.
    """
    return sets * min_bits(signature.num_experts, signature.topk) / 8


def encode(recording: SampleRoutes, encoding: str = "plain") -> bytes:
    """Encode routes as an envelope.

    Args:
        recording: the routes of one sequence.
        encoding: of `ENCODINGS`.

    Raises:
        ValueError: the routes contradict themselves or exceed what an envelope can hold.
    """
    signature, valid = recording.signature, recording.valid
    layers = recording.ids.shape[1] if recording.ids.ndim == 3 else -1
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding {encoding!r}: choose one of {', '.join(ENCODINGS)}")
    if valid.shape != recording.ids.shape[:1] or valid.dtype != bool or len(recording.token_hash) != HASH_BYTES:
        raise ValueError(f"routes of {len(recording.ids)} rows with validity {valid.shape} {valid.dtype}")
    check_range(recording.ids, signature, "routes to encode", layers)
    all_valid = bool(valid.all())
    head = _Header(
        ENCODINGS.index(encoding), not all_valid, signature, recording.first_layer, layers, len(valid),
        recording.spans, recording.token_hash,
    )  # fmt: skip
    head.check()
    ids = recording.ids if all_valid else recording.ids[valid]
    if encoding == "compact":
        payload = _encode_compact(ids, set_code(signature.num_experts, signature.topk))
    else:
        payload = np.ascontiguousarray(_check_plain(ids, head), head.dtype)
    return _write_envelope(head, valid, payload)


def decode(data: bytes | memoryview, signature: RouteSignature | None = None) -> SampleRoutes:
    """Decode an envelope, with sets in ascending order when it is compact.

    Args:
        data: one complete envelope.
        signature: of the model the routes are for; None takes any.

    Raises:
        ValueError: not an intact envelope, or one of another model.
    """
    head, valid, payload = _read_envelope(data)
    if signature is not None and head.signature != signature:
        raise ValueError(f"routes of {head.signature}, the model is {signature}")
    rows = int(valid.sum())
    if head.encoding == ENCODINGS.index("compact"):
        ids = _decode_compact(payload, rows, head.layers, head.code)
    else:
        ids = np.frombuffer(payload, head.dtype).reshape(rows, head.layers, head.signature.topk)
        ids = _check_plain(ids, head).astype(head.signature.dtype)  # a copy, so that it can be written to
    if rows < head.rows:
        ids, valid_ids = np.zeros((head.rows, *ids.shape[1:]), dtype=ids.dtype), ids
        ids[valid] = valid_ids
    return SampleRoutes(head.signature, ids, valid, head.spans, head.token_hash, head.first_layer)


def is_intact(data: bytes | memoryview) -> bool:
    """Return whether bytes end in the checksum of those before, as envelopes of every version do."""
    n = _CHECKSUM.size
    return len(data) > n and zlib.crc32(memoryview(data)[:-n]) == _CHECKSUM.unpack(data[-n:])[0]


def slice_layers(data: bytes | memoryview, start: int, stop: int) -> bytes:
    """Make the envelope of MoE layers `[start, stop)` alone, without decoding: what a pipeline stage needs.

    Args:
        data: one complete envelope.
        start: first layer, counted from 0 over the model.
        stop: the layer after the last.

    Raises:
        ValueError: not an intact envelope, or it lacks one of the layers.
    """
    head, valid, payload = _read_envelope(data)
    first, last = start - head.first_layer, stop - head.first_layer
    if not 0 <= first < last <= head.layers:
        raise ValueError(f"layers [{start}, {stop}) of an envelope with {head.layers} from {head.first_layer}")
    rows = int(valid.sum())
    if head.encoding == ENCODINGS.index("compact"):
        views = _plane_views(np.frombuffer(payload, np.uint8), rows, head.layers, head.code)
        sliced = np.concatenate([plane[first:last].ravel() for *_, plane in views])
    else:
        ids = np.frombuffer(payload, head.dtype).reshape(rows, head.layers, head.signature.topk)
        sliced = np.ascontiguousarray(ids[:, first:last])
    return _write_envelope(replace(head, first_layer=start, layers=stop - start), valid, sliced)


@dataclass(frozen=True)
class _Header:
    """The header of an envelope: all that precedes its bitmap and payload."""

    encoding: int
    partial: bool
    signature: RouteSignature
    first_layer: int
    layers: int
    rows: int
    spans: tuple[VersionSpan, ...]
    token_hash: bytes

    @property
    def dtype(self) -> str:
        """The dtype of ids in a plain payload, with its byte order."""
        return "u1" if self.signature.dtype is np.uint8 else "<i2"

    @property
    def code(self) -> SetCode:
        """The numbering of sets in a compact payload."""
        return set_code(self.signature.num_experts, self.signature.topk)

    def check(self) -> None:
        """Refuse a header that contradicts itself, or whose routes need more than `MAX_DECODED` bytes."""
        s = self.signature
        if not (1 <= s.topk <= min(s.num_experts, 255) and s.num_experts < 1 << 15 and 1 <= s.moe_layers < 1 << 16):
            raise ValueError(f"an envelope cannot hold routes of {s}")
        if not (0 <= self.first_layer and 1 <= self.layers <= s.moe_layers - self.first_layer):
            raise ValueError(f"{self.layers} layers from {self.first_layer} of a model with {s.moe_layers}")
        if self.rows * self.layers * s.topk * np.dtype(s.dtype).itemsize > MAX_DECODED:
            raise ValueError(f"{self.rows} rows of {self.layers} layers exceed {MAX_DECODED} bytes")
        ends = [0, *(span.end for span in self.spans)]
        starts = [span.start for span in self.spans]
        if self.spans and (starts != ends[:-1] or ends != sorted(ends) or ends[-1] != self.rows):
            raise ValueError(f"weight versions {self.spans} do not cover {self.rows} rows")
        if len(self.spans) > 0xFFFF or any(len(span.version.encode()) > 255 for span in self.spans):
            raise ValueError("more than 65,535 weight versions, or one of more than 255 bytes")

    def payload_bytes(self, rows: int) -> int:
        """Compute the bytes of the payload of this many valid rows."""
        if self.encoding == ENCODINGS.index("compact"):
            return sum(size * self.layers for _, _, _, size in _plane_sizes(rows, self.code))
        return rows * self.layers * self.signature.topk * np.dtype(self.dtype).itemsize

    def __bytes__(self) -> bytes:
        s, spans = self.signature, [(span.start, span.end, span.version.encode()) for span in self.spans]
        fixed = _HEADER.pack(
            MAGIC, VERSION, self.encoding, self.partial, s.topk, s.num_experts, s.moe_layers, self.first_layer,
            self.layers, self.rows, len(spans), self.token_hash,
        )  # fmt: skip
        return fixed + b"".join(_SPAN.pack(start, end, len(name)) + name for start, end, name in spans)


def _write_envelope(head: _Header, valid: np.ndarray, payload: np.ndarray) -> bytes:
    """Join header, bitmap and payload, and append their checksum."""
    mask = np.packbits(valid, bitorder="little").data if head.partial else b""
    parts = [bytes(head), mask, payload.reshape(-1).data]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join([*parts, _CHECKSUM.pack(checksum)])


def _read_envelope(data: bytes | memoryview) -> tuple[_Header, np.ndarray, memoryview]:
    """Split an envelope into header, validity of rows and payload, having checked every length."""
    data = memoryview(data).cast("B")
    if len(data) < _HEADER.size + _CHECKSUM.size:
        raise ValueError(f"{len(data)} bytes are no envelope of routes")
    magic, version, encoding, partial, topk, experts, moe_layers, first, layers, rows, spans, digest = (
        _HEADER.unpack_from(data)
    )
    if magic != MAGIC:
        raise ValueError(f"an envelope of routes begins with {MAGIC!r}, not {magic!r}")
    if version != VERSION:
        raise ValueError(f"envelope of version {version}, this release reads version {VERSION}")
    if not is_intact(data):
        raise ValueError("the envelope is damaged: its checksum is another")
    data = data[: -_CHECKSUM.size]
    if encoding >= len(ENCODINGS) or partial > 1:
        raise ValueError(f"unknown encoding {encoding} or flags {partial}")
    version_spans, offset = _read_spans(data, spans)
    signature = RouteSignature(moe_layers, experts, topk)
    head = _Header(encoding, bool(partial), signature, first, layers, rows, version_spans, digest)
    head.check()
    valid, offset = _read_bitmap(data, offset, rows) if partial else (np.ones(rows, dtype=bool), offset)
    num_bytes = head.payload_bytes(int(valid.sum()))
    if len(data) - offset != num_bytes:
        raise ValueError(f"the envelope holds {len(data) - offset} bytes of routes instead of {num_bytes}")
    return head, valid, data[offset:]


def _read_spans(data: memoryview, count: int) -> tuple[tuple[VersionSpan, ...], int]:
    """Read weight versions; return them and the offset of what follows."""
    version_spans, offset = [], _HEADER.size
    for _ in range(count):
        if len(data) - offset < _SPAN.size:
            raise ValueError("the envelope ends within its weight versions")
        start, end, length = _SPAN.unpack_from(data, offset)
        offset += _SPAN.size
        name = bytes(data[offset : offset + length])
        offset += length
        if len(name) != length:
            raise ValueError("the envelope ends within its weight versions")
        version_spans.append(VersionSpan(name.decode(), start, end))  # UnicodeDecodeError is a ValueError
    return tuple(version_spans), offset


def _read_bitmap(data: memoryview, offset: int, rows: int) -> tuple[np.ndarray, int]:
    """Read the bitmap of valid rows; return it as `[rows]` bool, and the offset of what follows."""
    num_bytes = -(-rows // 8)
    if len(data) - offset < num_bytes:
        raise ValueError("the envelope ends within its bitmap")
    bits = np.unpackbits(np.frombuffer(data[offset : offset + num_bytes], np.uint8), bitorder="little").astype(bool)
    if bits[rows:].any() or bits[:rows].all():
        raise ValueError("the bitmap of rows is not one that an envelope has")
    return bits[:rows], offset + num_bytes


def _check_plain(ids: np.ndarray, head: _Header) -> np.ndarray:
    """Check the ids of a plain payload, and return them in the signature's dtype."""
    return check_ids(ids, replace(head.signature, moe_layers=head.layers), "routes in an envelope")


# The compact payload: for every plane of every field of a word, all layers.


def _plane_sizes(rows: int, code: SetCode) -> list[tuple[int, int, int, int]]:
    """Return (field, first bit, width, bytes a layer) of each plane."""
    words = -(-rows // code.group)
    fields = [(field, *plane) for field, bits in enumerate(code.fields) for plane in bit_planes.plane_layout(bits)]
    return [(field, shift, width, bit_planes.plane_bytes(words, width)) for field, shift, width in fields]


def _plane_views(payload: np.ndarray, rows: int, layers: int, code: SetCode) -> list[tuple[int, int, int, np.ndarray]]:
    """Return (field, first bit, width, uint8 `[layers, bytes]` within the payload) of each plane."""
    views, offset = [], 0
    for field, shift, width, size in _plane_sizes(rows, code):
        views.append((field, shift, width, payload[offset : offset + layers * size].reshape(layers, size)))
        offset += layers * size
    return views


def _encode_compact(ids: np.ndarray, code: SetCode) -> np.ndarray:
    """Encode ids `[rows, layers, topk]` as a compact payload, uint8."""
    rows, layers, _ = ids.shape
    payload = np.empty(sum(size for *_, size in _plane_sizes(rows, code)) * layers, dtype=np.uint8)
    views = _plane_views(payload, rows, layers, code)
    for chunk in layer_chunks(rows, layers):
        columns = sorted_sets(ids[:, chunk])
        check_distinct(columns, "routes to encode")
        words = code.encode(columns)
        for field, shift, width, plane in views:
            bit_planes.write_plane(words[field], shift, width, plane[chunk])
    return payload


def _decode_compact(payload: memoryview, rows: int, layers: int, code: SetCode) -> np.ndarray:
    """Decode a compact payload to ids `[rows, layers, topk]`."""
    views = _plane_views(np.frombuffer(payload, np.uint8), rows, layers, code)
    ids = np.empty((rows, layers, code.topk), dtype=code.dtype)
    for chunk in layer_chunks(rows, layers):
        num_layers = chunk.stop - chunk.start
        words = [np.zeros((num_layers, -(-rows // code.group)), dtype=np.int64) for _ in code.fields]
        for field, shift, width, plane in views:
            bit_planes.read_plane(plane[chunk], shift, width, words[field])
        columns = code.decode(words, rows)
        for layer in range(num_layers):
            ids[:, chunk.start + layer] = columns[:, layer].T
    return ids
