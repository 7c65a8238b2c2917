"""A checkpoint seen under another one's names and shapes, so that the engine need not know how each was saved.

A `CanonicalIndex` files a checkpoint's tensors by the boxes they are of canonical tensors (`spelling`). Two checkpoints hold the
same weights if their charts cover the same elements, each once; where one names or stacks them otherwise, a `RenamedView`
reads a region of it by going from the pretrained checkpoint's coordinates to canonical ones and on to its own.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from megatron_bai.checkpoint.boxes import Box, box_slices
from megatron_bai.checkpoint.reader import CheckpointReader, ChunkStream, ScratchBuffers
from megatron_bai.checkpoint.tensor_index import Chunk, TensorInfo
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge.tensor_names.canonical_names import EXPERT, LAYER, canonical_box
from megatron_bai.merge.tensor_names.vocabulary import EMBEDDING, OUTPUT, is_vocab_tensor, read_vocab_info


class CanonicalIndex:
    """Where a checkpoint's tensors lie in the canonical ones.

    Args:
        tensors: by key.
        rows: of the vocabulary's tensors, those that count; None: all.

    Raises:
        UserError: two tensors hold the same elements, such as a norm under both of its names.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], rows: int | None):
        self.path = path
        self.tensors = tensors
        self.canonical_boxes = {key: canonical_box(key, entry.shape) for key, entry in tensors.items()}
        self.boxes: dict[str, Box] = {}
        # One entry for each canonical tensor, or for each of its layers where those are apart: a chunk is a tensor.
        found: dict[tuple[str, int | None], list[Chunk]] = defaultdict(list)
        for key, at in self.canonical_boxes.items():
            sizes = at.sizes
            if rows is not None and sizes and is_vocab_tensor(key):
                sizes = (min(sizes[0], rows), *sizes[1:])
            self.boxes[key] = at.origin, sizes
            apart = at.axes[:1] == (LAYER,) and len(at.sizes) > len(tensors[key].shape)
            found[at.name, at.origin[0] if apart else None].append(Chunk(at.origin, sizes, key, 0, 0))
        self._entries = {at: _index_chunks(chunks) for at, chunks in found.items()}
        self._apart = {name for name, layer in found if layer is not None}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for (name, _), entry in self._entries.items():
            self.shapes[name] = _max_extent([entry.shape, self.shapes.get(name, entry.shape)])
        for key, at in self.canonical_boxes.items():
            held = list(self.overlapping(at.name, self.boxes[key]))
            if len(held) > 1:
                other = next(k for k, _ in held if k != key)
                raise UserError(f"{path}: {key} and {other} hold the same weights: remove one of them")

    def add_alias(self, name: str, key: str) -> None:
        """Let the tensor `key` be the canonical tensor `name` as well."""
        self._entries[name, None] = _index_chunks([Chunk(*self.boxes[key], key, 0, 0)])
        self.shapes[name] = self._entries[name, None].shape

    def overlapping(self, name: str, box: Box) -> Iterator[tuple[str, Box]]:
        """The tensors that hold elements of a box of a canonical tensor, each with the box it holds of it."""
        layers = range(box[0][0], box[0][0] + box[1][0]) if name in self._apart else ()
        for layer in (None, *layers):
            entry = self._entries.get((name, layer))
            if entry is not None:
                yield from ((chunk.file, part) for chunk, part in entry.overlapping(*box))

    def count_elements(self, name: str, box: Box) -> int:
        """How many elements of a box there are."""
        return sum(math.prod(sizes) for _, (_, sizes) in self.overlapping(name, box))


def _index_chunks(chunks: list[Chunk]) -> TensorInfo:
    reach = _max_extent([tuple(map(sum, zip(c.offsets, c.sizes, strict=True))) for c in chunks])
    return TensorInfo(chunks[0].file, torch.uint8, reach, tuple(chunks))


def _max_extent(ends: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(max, zip(*ends, strict=True))) if len({len(end) for end in ends}) == 1 else ends[0]


class RenamedView:
    """A source under the names and shapes of another; it has what the engine asks of a `CheckpointReader`.

    Attributes:
        path: of the source.
        tensors: by the other's key, with the other's shape and the source's dtype; without chunks.
    """

    def __init__(self, source: CheckpointReader, chart: CanonicalIndex, base: CanonicalIndex, scratch: ScratchBuffers):
        self.path = source.path
        self.tensors: dict[str, TensorInfo] = {}
        self._source, self._chart, self._base, self._scratch = source, chart, base, scratch
        for key, entry in base.tensors.items():
            dtypes = {chart.tensors[name].dtype for name, _ in chart.overlapping(base.canonical_boxes[key].name, base.boxes[key])}
            dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else entry.dtype
            self.tensors[key] = TensorInfo(key, dtype, entry.shape, ())

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A region of a tensor in the source's dtype, valid until the next `read`, as `CheckpointReader.read` gives it.

        What lies in one tensor of the source is not copied, what is scattered over several is copied once.
        """
        at = self._base.canonical_boxes[key]
        low, extent = at.to_canonical(offsets, sizes)
        parts = list(self._chart.overlapping(at.name, (low, extent)))
        assert sum(math.prod(part[1]) for _, part in parts) == math.prod(sizes), f"{self.path}: {key} {offsets} {sizes}"
        if len(parts) == 1:
            return self._read(*parts[0]).view(sizes)
        dtype = self.tensors[key].dtype
        out = self._scratch.get("view", math.prod(sizes) * dtype.itemsize).view(dtype).view(extent)
        for name, part in parts:
            out[box_slices(part, low)].copy_(self._read(name, part))
        return out.view(sizes)

    def stream(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStream | None:
        """As `CheckpointReader.stream`; None where several tensors of the source hold the region."""
        at = self._base.canonical_boxes[key]
        parts = list(self._chart.overlapping(at.name, at.to_canonical(offsets, sizes)))
        return self._source.stream(parts[0][0], *self._native(*parts[0])) if len(parts) == 1 else None

    def _read(self, name: str, box: Box) -> torch.Tensor:
        """A box of a canonical tensor, which lies in the source's tensor `name`."""
        return self._source.read(name, *self._native(name, box)).view(box[1])

    def _native(self, name: str, box: Box) -> Box:
        """A box of a canonical tensor as one of the source's tensor `name`."""
        return self._chart.canonical_boxes[name].to_native(box, len(self._chart.tensors[name].shape))

    def stat_fingerprint(self) -> str:
        return self._source.stat_fingerprint()

    def verify_records(self, keys: Iterable[str], ranks: RankGroup) -> str:
        """As `CheckpointReader.verify_records`, over all tensors: they are the same whatever the other's names are."""
        return self._source.verify_records(self._chart.tensors, ranks)


def rename_to_base(
    source: CheckpointReader, tensors: dict[str, TensorInfo], base: CanonicalIndex, rows: int | None, scratch: ScratchBuffers
) -> CheckpointReader | RenamedView:
    """A source under the names of the pretrained checkpoint: itself where it has them anyway.

    Args:
        tensors: of the source, those to merge.
        base: the pretrained checkpoint's chart.
        rows: as for `CanonicalIndex`.

    Raises:
        UserError: the two do not hold the same elements; what is missing or has another shape is named.
    """
    if {k: e.shape for k, e in tensors.items()} == {k: e.shape for k, e in base.tensors.items()}:
        return source
    chart = CanonicalIndex(source.path, tensors, rows)
    _tie_output_layer(chart, base)
    _require_counts(base, chart)
    for one, other in ((base, chart), (chart, base)):
        _require_covered(one, other)
    return RenamedView(source, chart, base, scratch)


def _tie_output_layer(chart: CanonicalIndex, base: CanonicalIndex) -> None:
    """A tied model has no output layer of its own: where the pretrained has one, it is the embedding.

    Raises:
        UserError: the pretrained is tied and the source is not.
    """
    outputs = [[name for name in c.shapes if OUTPUT.search(name) and name.endswith("weight")] for c in (chart, base)]
    if outputs[0] and not outputs[1]:
        raise UserError(
            f"{base.path} has tied embeddings and {chart.path} has not: one tensor cannot hold {outputs[0][0]} as well;"
            " take the untied one as merge.pretrained"
        )
    embedding = next((key for key in chart.tensors if EMBEDDING.search(key) and is_vocab_tensor(key)), None)
    if outputs[1] and not outputs[0] and embedding and read_vocab_info(chart.path).tied is not False:
        chart.add_alias(outputs[1][0], embedding)


def _require_counts(base: CanonicalIndex, chart: CanonicalIndex) -> None:
    """Layers, experts and then other sizes agree, of what both have."""
    where = f"{base.path} and {chart.path} differ in the"
    places = {at.name: (key, at.axes) for key, at in base.canonical_boxes.items() if at.name in chart.shapes}
    for what in (LAYER, EXPERT):
        for name, (_, axes) in places.items():
            for axis, m, n in zip(axes, base.shapes[name], chart.shapes[name], strict=False):
                if axis == what and m != n:
                    raise UserError(f"{where} number of {what} of {name} ({m} and {n}): they cannot be merged")
    for name, (key, axes) in places.items():
        a, b = (c.shapes[name][len(axes) :] for c in (base, chart))
        if a != b:
            raise UserError(f"{where} shape of {key} ({a} and {b})")


def _require_covered(one: CanonicalIndex, other: CanonicalIndex) -> None:
    """Every element of the one is in the other."""
    missing = []
    for key, at in one.canonical_boxes.items():
        held, wanted = other.count_elements(at.name, one.boxes[key]), math.prod(one.boxes[key][1])
        if held == 0 and wanted or at.name not in other.shapes:
            missing.append(key)
        elif held != wanted:
            raise UserError(f"{other.path} holds {held} of the {wanted} elements of {key} of {one.path}")
    if missing:
        raise UserError(f"{other.path} lacks {format_names(missing)} of {one.path}: they are not the same architecture")


def format_names(names: Iterable[str], limit: int = 5) -> str:
    """The first names of many."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
