"""Renamed views: a checkpoint under another one's names and shapes, for an executor that does not know how it is saved.

A `CanonicalIndex` finds a checkpoint's tensors by the boxes of canonical tensors that they are (`canonical_names`). Two
checkpoints hold the same weights if their indexes cover the same elements, each once. Where one names or stacks them
otherwise, a `RenamedView` converts coordinates of the pretrained checkpoint to canonical ones and those to its own.
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
from megatron_bai.checkpoint.weight_checks import EMBEDDING, OUTPUT
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge.tensor_names.canonical_names import EXPERT, LAYER, canonical_box
from megatron_bai.merge.tensor_names.family_names import CanonicalNames
from megatron_bai.merge.tensor_names.vocabulary import is_vocab_tensor, read_vocab_info


class CanonicalIndex:
    """The tensors of a checkpoint as boxes of canonical tensors.

    Args:
        path: of the checkpoint, for errors.
        tensors: by key.
        vocab_size: number of rows of the vocabulary's tensors that are a token's; None: all.
        to_canonical: names the tensors.

    Attributes:
        to_canonical: likewise.
        canonical_boxes: of each tensor, by key.
        boxes: likewise, without the vocabulary's padding.
        shapes: of the canonical tensors, by name.

    Raises:
        UserError: two tensors hold the same elements, such as a norm under both of its names.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        vocab_size: int | None,
        to_canonical: CanonicalNames = canonical_box,
    ):
        self.path = path
        self.tensors = tensors
        self.to_canonical = to_canonical
        self.canonical_boxes = {key: to_canonical(key, entry.shape) for key, entry in tensors.items()}
        self.boxes: dict[str, Box] = {}
        # One for each canonical tensor, or for each layer where layers are separate: a chunk is a tensor
        chunks_of: dict[tuple[str, int | None], list[Chunk]] = defaultdict(list)
        for key, canonical in self.canonical_boxes.items():
            sizes = canonical.sizes
            if vocab_size is not None and sizes and is_vocab_tensor(key):
                sizes = (min(sizes[0], vocab_size), *sizes[1:])
            self.boxes[key] = canonical.origin, sizes
            is_separate = canonical.axes[:1] == (LAYER,) and len(canonical.sizes) > len(tensors[key].shape)
            layer = canonical.origin[0] if is_separate else None
            chunks_of[canonical.name, layer].append(Chunk(canonical.origin, sizes, key, 0, 0))
        self._tensors = {name: _index_chunks(chunks) for name, chunks in chunks_of.items()}
        self._has_separate_layers = {name for name, layer in chunks_of if layer is not None}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for (name, _), entry in self._tensors.items():
            self.shapes[name] = _max_extent([entry.shape, self.shapes.get(name, entry.shape)])
        for key, canonical in self.canonical_boxes.items():
            overlapping = list(self.overlapping(canonical.name, self.boxes[key]))
            if len(overlapping) > 1:
                other = next(k for k, _ in overlapping if k != key)
                raise UserError(f"{path}: {key} and {other} hold the same weights: remove one of them")

    def add_alias(self, name: str, key: str) -> None:
        """Add the tensor `key` as the canonical tensor `name` as well.

        Args:
            name: of a canonical tensor that the checkpoint lacks.
            key: of one of the checkpoint's tensors, without the vocabulary's padding.
        """
        self._tensors[name, None] = _index_chunks([Chunk(*self.boxes[key], key, 0, 0)])
        self.shapes[name] = self._tensors[name, None].shape

    def overlapping(self, name: str, box: Box) -> Iterator[tuple[str, Box]]:
        """Yield the tensors that hold elements of a box of a canonical tensor, each with the box of these elements.

        Args:
            name: of the canonical tensor; the checkpoint need not have it.
            box: in the canonical tensor.

        Yields:
            A tensor's key, and the box in the canonical tensor; the vocabulary's padding is in none.
        """
        layers = range(box[0][0], box[0][0] + box[1][0]) if name in self._has_separate_layers else ()
        for layer in (None, *layers):
            entry = self._tensors.get((name, layer))
            if entry is not None:
                yield from ((chunk.file, common) for chunk, common in entry.overlapping(*box))

    def count_elements(self, name: str, box: Box) -> int:
        """Count the elements of a box of a canonical tensor that there are.

        Args:
            name: of the canonical tensor; 0 elements where the checkpoint does not have it.
            box: in the canonical tensor; the vocabulary's padding in it does not count.
        """
        return sum(math.prod(sizes) for _, (_, sizes) in self.overlapping(name, box))


def _index_chunks(chunks: list[Chunk]) -> TensorInfo:
    """Make a canonical tensor whose chunks are tensors, which finds those that overlap with a box."""
    extent = _max_extent([tuple(map(sum, zip(c.offsets, c.sizes, strict=True))) for c in chunks])
    return TensorInfo(chunks[0].file, torch.uint8, extent, tuple(chunks))


def _max_extent(ends: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the largest end in each axis; the first ends where the numbers of axes differ."""
    return tuple(map(max, zip(*ends, strict=True))) if len({len(end) for end in ends}) == 1 else ends[0]


class RenamedView:
    """A source under the names and shapes of another, with what the executor needs of a `CheckpointReader`.

    Attributes:
        path: of the source.
        tensors: by the other's key, with the other's shape and the source's dtype; without chunks.
    """

    def __init__(self, source: CheckpointReader, index: CanonicalIndex, base: CanonicalIndex, scratch: ScratchBuffers):
        self.path = source.path
        self.tensors: dict[str, TensorInfo] = {}
        self._source, self._index, self._base, self._scratch = source, index, base, scratch
        for key, entry in base.tensors.items():
            matches = index.overlapping(base.canonical_boxes[key].name, base.boxes[key])
            dtypes = {index.tensors[name].dtype for name, _ in matches}
            dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else entry.dtype
            self.tensors[key] = TensorInfo(key, dtype, entry.shape, ())

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Read a box of a tensor in the source's dtype, valid until the next `read`, as `CheckpointReader.read` does.

        A box in one tensor of the source is not copied; from several tensors it is copied once.

        Args:
            key: of the other's tensor.
            offsets: of the box in the other's tensor.
            sizes: of the box, which holds nothing of the vocabulary's padding.

        Returns:
            A tensor of shape `sizes`; from several tensors of the source, in the dtype that `tensors` has for `key`.

        Raises:
            UserError: a record cannot be read, or its bytes are not those that were saved.
        """
        canonical = self._base.canonical_boxes[key]
        low, extent = canonical.to_canonical(offsets, sizes)
        matches = list(self._index.overlapping(canonical.name, (low, extent)))
        assert sum(math.prod(box[1]) for _, box in matches) == math.prod(sizes), f"{self.path}: {key} {offsets} {sizes}"
        if len(matches) == 1:
            return self._read(*matches[0]).view(sizes)
        dtype = self.tensors[key].dtype
        out = self._scratch.get("view", math.prod(sizes) * dtype.itemsize).view(dtype).view(extent)
        for name, box in matches:
            out[box_slices(box, low)].copy_(self._read(name, box))
        return out.view(sizes)

    def stream(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStream | None:
        """Open a stream as `CheckpointReader.stream` does; None where several tensors of the source hold the box.

        Args:
            key: of the other's tensor.
            offsets: of the box in the other's tensor.
            sizes: of the box.

        Returns:
            The stream, or None also where the box's elements are not contiguous in one record of the source.
        """
        canonical = self._base.canonical_boxes[key]
        matches = list(self._index.overlapping(canonical.name, canonical.to_canonical(offsets, sizes)))
        return self._source.stream(matches[0][0], *self._native(*matches[0])) if len(matches) == 1 else None

    def _read(self, name: str, box: Box) -> torch.Tensor:
        """Read a box of a canonical tensor that lies in the source's tensor `name`."""
        return self._source.read(name, *self._native(name, box)).view(box[1])

    def _native(self, name: str, box: Box) -> Box:
        """Convert a box of a canonical tensor to one of the source's tensor `name`."""
        return self._index.canonical_boxes[name].to_native(box, len(self._index.tensors[name].shape))

    def require_unchanged(self) -> None:
        """Raise unless the source's files are unchanged, as `CheckpointReader.require_unchanged` does."""
        self._source.require_unchanged()

    def stat_fingerprint(self) -> str:
        """Return the source's, as `CheckpointReader.stat_fingerprint` does."""
        return self._source.stat_fingerprint()

    def verify_records(self, keys: Iterable[str], ranks: RankGroup) -> str:
        """Verify all tensors as `CheckpointReader.verify_records` does. *Collective* over `ranks`.

        Args:
            keys: not used: all tensors that the view was made of are verified.
            ranks: which have read.

        Returns:
            The hash under the source's own names, so that it does not depend on those of the other.

        Raises:
            PermanentError: the bytes of a record are not those that were saved.
        """
        return self._source.verify_records(self._index.tensors, ranks)


def rename_to_base(
    source: CheckpointReader,
    tensors: dict[str, TensorInfo],
    base: CanonicalIndex,
    vocab_size: int | None,
    scratch: ScratchBuffers,
) -> CheckpointReader | RenamedView:
    """Return a source under the names of the pretrained checkpoint: the source itself where it has the same.

    Args:
        source: of the tensors.
        tensors: of the source, those to merge, by key.
        base: the pretrained checkpoint's index.
        vocab_size: as for `CanonicalIndex`.
        scratch: buffers for what is copied.

    Raises:
        UserError: the two do not hold the same elements; what is missing or has another shape is named.
    """
    if {k: e.shape for k, e in tensors.items()} == {k: e.shape for k, e in base.tensors.items()}:
        return source
    index = CanonicalIndex(source.path, tensors, vocab_size, base.to_canonical)
    _tie_output_layer(index, base)
    _require_counts(base, index)
    _require_covered(base, index, "keeps those of the pretrained checkpoint")
    _require_covered(index, base, "leaves them out")
    return RenamedView(source, index, base, scratch)


def _tie_output_layer(index: CanonicalIndex, base: CanonicalIndex) -> None:
    """Let the embedding of a tied source be its output layer as well, where the pretrained checkpoint has one.

    Raises:
        UserError: the pretrained is tied and the source is not.
    """
    outputs = [[name for name in c.shapes if OUTPUT.search(name) and name.endswith("weight")] for c in (index, base)]
    if outputs[0] and not outputs[1]:
        raise UserError(
            f"{base.path} has tied embeddings and {index.path} has not: one tensor cannot hold {outputs[0][0]} as well;"
            " take the untied one as merge.pretrained"
        )
    embedding = next((key for key in index.tensors if EMBEDDING.search(key) and is_vocab_tensor(key)), None)
    if outputs[1] and not outputs[0] and embedding and read_vocab_info(index.path).tied is not False:
        index.add_alias(outputs[1][0], embedding)


def _require_counts(base: CanonicalIndex, index: CanonicalIndex) -> None:
    """Raise a UserError unless both have as many layers and experts, and the same other sizes, of what both have."""
    message = f"{base.path} and {index.path} differ in the"
    shared = {box.name: (key, box.axes) for key, box in base.canonical_boxes.items() if box.name in index.shapes}
    for counted in (LAYER, EXPERT):
        for name, (_, axes) in shared.items():
            for axis, m, n in zip(axes, base.shapes[name], index.shapes[name], strict=False):
                if axis == counted and m != n:
                    raise UserError(f"{message} number of {counted} of {name} ({m} and {n}): they cannot be merged")
    for name, (key, axes) in shared.items():
        a, b = (c.shapes[name][len(axes) :] for c in (base, index))
        if a != b:
            raise UserError(f"{message} shape of {key} ({a} and {b})")


def _require_covered(one: CanonicalIndex, other: CanonicalIndex, effect: str) -> None:
    """Raise a UserError unless every element of the one is in the other; `effect` is that of `merge.keep`."""
    missing = []
    for key, canonical in one.canonical_boxes.items():
        count, expected = other.count_elements(canonical.name, one.boxes[key]), math.prod(one.boxes[key][1])
        if count == 0 and expected or canonical.name not in other.shapes:
            missing.append(key)
        elif count != expected:
            raise UserError(f"{other.path} holds {count} of the {expected} elements of {key} of {one.path}")
    if missing:
        pattern = missing[0].partition(".")[0]
        pattern = pattern if all(key.partition(".")[0] == pattern for key in missing) else "PATTERN"
        whole = pattern in {key.partition(".")[0] for key in one.tensors if key not in missing}
        raise UserError(
            f"{other.path} lacks {format_names(missing)} of {one.path}: they are not the same architecture; if they"
            f" need not be merged, 'merge.keep=[{'PATTERN' if whole else pattern}]' {effect}"
        )


def format_names(names: Iterable[str], limit: int = 5) -> str:
    """Format the first of many names.

    Args:
        names: in any order; they are sorted.
        limit: how many are listed; of the rest only the number is given.

    Returns:
        Names with commas between, such as `a, b`, and `and 3 more` where there are more.
    """
    names = sorted(names)
    remaining = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + remaining
