"""Translated readers: a checkpoint under the names of the other format, for a merge whose output is in that.

A family's table (`model/families`) says which published tensors a slice of Megatron's is made of. Its functions move
whole rows, so they are asked once, with row numbers in place of weights, and a box of a translated tensor is then read
as the runs of rows that it is made of, and no more. Layers and experts are stacked as Megatron-Core saves them here;
how the source stacks its own is a `RenamedView`'s business, below this one.
"""

import functools
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from megatron_bai.checkpoint.boxes import Box, box_slices, intersect_boxes
from megatron_bai.checkpoint.hf_files import SafetensorsReader, SafetensorsWriter
from megatron_bai.checkpoint.reader import CheckpointReader, ChunkStream, ScratchBuffers
from megatron_bai.checkpoint.tensor_index import Chunk, ObjectInfo, Record, TensorInfo
from megatron_bai.checkpoint.torch_dist import TorchDistWriter
from megatron_bai.checkpoint.weight_checks import is_state, require_plain_weights
from megatron_bai.checkpoint.writer import CheckpointWriter, TensorSpec
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge.tensor_names.canonical_names import canonical_box
from megatron_bai.merge.tensor_names.family_names import family_names
from megatron_bai.merge.tensor_names.renamed_view import CanonicalIndex, RenamedView, rename_to_base
from megatron_bai.merge.tensor_names.tied_copies import find_tied_copies
from megatron_bai.model.architecture import Architecture, read_architecture
from megatron_bai.model.families.param_mapping import ParamMapping
from megatron_bai.model.hf_mapping import megatron_slice, slice_indices

_FILE_BYTES = 4 << 30  # of a safetensors file, where no source has files of that format
_LINEAR = re.compile(r"\blayers\..*\.linear_\w+\.weight$")
Rows = tuple[tuple[int, int, int], ...]
"""Runs of rows: the first in a published tensor, the first in Megatron's slice, and how many."""


def _save_empty() -> bytes:
    """Return what Megatron-Core stores for a module without a state of its own."""
    archive = io.BytesIO()
    torch.save([None], archive)
    return archive.getvalue()


_EMPTY = _save_empty()


@dataclass(frozen=True)
class Piece:
    """A box of a translated tensor that is one box of a tensor in the source's format.

    Attributes:
        box: in the translated tensor.
        key: of the source's tensor.
        offsets: in that, of the box.
        sizes: of the box in that, which has as many elements.
    """

    box: Box
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Translation:
    """A translated tensor.

    Attributes:
        shape: of the tensor.
        axes: number of its stacked axes.
        slices: by position along these, what the slice is made of.
    """

    shape: tuple[int, ...]
    axes: int
    slices: dict[tuple[int, ...], list[Piece]]


class TranslatedReader(CheckpointReader):
    """A source under the other format's names: its weights alone, as `convert` would write them, in their own dtypes.

    Args:
        source: opened.
        format_name: `hf` or `megatron`, the one that the source is not in.
        scratch: buffers for what is copied.

    Attributes:
        source: likewise.
        format_name: likewise.
        architecture: that its `config.json` describes.
        left_out: its tensors and objects that have no translation, by reason.

    Raises:
        UserError: the architecture is not known, or the tensors are not those of one.
    """

    def __init__(self, source: CheckpointReader, format_name: str, scratch: ScratchBuffers):
        self.path, self.source, self.format_name = source.path, source, format_name
        self.architecture = model = read_architecture(source.path)
        self._scratch = scratch
        tensors = self._translatable_tensors()
        published, stacked = _published_tensors(model), _stacked_tensors(model)
        theirs, self._translations = (published, stacked) if format_name == "megatron" else (stacked, published)
        own = {key: TensorInfo(key, torch.uint8, entry.shape, ()) for key, entry in theirs.items()}
        # An hf source may have other names than the published ones; Megatron-Core's are the same for all families
        names = family_names(model) if format_name == "megatron" else canonical_box
        index = CanonicalIndex(source.path, own, model.vocab_size, names)
        self._view = rename_to_base(source, tensors, index, model.vocab_size, scratch)
        self._used = tensors
        self.tensors = {key: self._describe(key, entry) for key, entry in self._translations.items()}
        keys = _empty_states(self._translations) if format_name == "megatron" else ()
        self.objects = {key: ObjectInfo("", 0, len(_EMPTY)) for key in keys}

    @property
    def stores_whole_tensors(self) -> bool:  # type: ignore[override]  # of a format, elsewhere
        """Whether every tensor of the format is one chunk."""
        return self.format_name == "hf"

    def _translatable_tensors(self) -> dict[str, TensorInfo]:
        """Return the source's tensors of the model, and note the others."""
        source, model = self.source, self.architecture
        tensors = {key: entry for key, entry in source.tensors.items() if not is_state(key)}
        require_plain_weights(source.path, tensors)
        copies = find_tied_copies(source, tensors)
        dropped = {key for key in tensors if self.format_name == "megatron" and model.family.is_dropped(key, model)}
        reasons = {
            "optimizer or random-number state": [key for key in (*source.tensors, *source.objects) if is_state(key)],
            "copies of a tied embedding": sorted(copies),
            "not imported": sorted(dropped - copies),
            "objects are not translated": [key for key in source.objects if not is_state(key)],
        }
        self.left_out = {reason: keys for reason, keys in reasons.items() if keys}
        return {key: entry for key, entry in tensors.items() if key not in copies | dropped}

    def _describe(self, key: str, entry: Translation) -> TensorInfo:
        """Return a translated tensor: one chunk, or one for each slice of a stacked one."""
        dtypes = {self._view.tensors[piece.key].dtype for pieces in entry.slices.values() for piece in pieces}
        zeros, sizes = (0,) * (len(entry.shape) - entry.axes), (1,) * entry.axes + entry.shape[entry.axes :]
        chunks = tuple(Chunk((*at, *zeros), sizes, "", 0, 0) for at in entry.slices)
        return TensorInfo(key, functools.reduce(torch.promote_types, dtypes), entry.shape, chunks)

    def _overlapping(self, key: str, box: Box) -> Iterator[Piece]:
        """Yield the parts of a box of a tensor, each in one tensor of the source's format."""
        entry = self._translations[key]
        places = [range(low, low + size) for low, size in zip(*box, strict=True)][: entry.axes]
        for piece in (piece for at in product(*places) for piece in entry.slices[at]):
            if (common := intersect_boxes(piece.box, box)) is None:
                continue
            own = len(entry.shape) - entry.axes  # axes of a slice, which are the last of both
            shift = (low - start for low, start in zip(common[0][-own:], piece.box[0][-own:], strict=True))
            offsets = tuple(start + by for start, by in zip(piece.offsets[-own:], shift, strict=True))
            yield Piece(common, piece.key, piece.offsets[:-own] + offsets, piece.sizes[:-own] + common[1][-own:])

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Read a region of a translated tensor as `CheckpointReader.read` does.

        Args:
            key: of the tensor.
            offsets: of the region.
            sizes: of the region.

        Raises:
            UserError: as there.
        """
        pieces = list(self._overlapping(key, (offsets, sizes)))
        dtype = self.tensors[key].dtype
        if len(pieces) == 1 and self._view.tensors[pieces[0].key].dtype == dtype:
            return self._view.read(pieces[0].key, pieces[0].offsets, pieces[0].sizes).view(sizes)
        out = self._scratch.get("translated", math.prod(sizes) * dtype.itemsize).view(dtype).view(sizes)
        for piece in pieces:
            values = self._view.read(piece.key, piece.offsets, piece.sizes)
            out[box_slices(piece.box, offsets)].copy_(values.view(piece.box[1]))
        return out

    def read_object(self, key: str) -> bytes:
        """Return the archive of an empty `_extra_state`.

        Args:
            key: of the object.
        """
        return _EMPTY

    def stream(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStream | None:
        """Open a stream as `CheckpointReader.stream` does; None where several tensors or runs of rows hold the region.

        Args:
            key: of the tensor.
            offsets: of the region.
            sizes: of the region.
        """
        pieces = list(self._overlapping(key, (offsets, sizes)))
        if len(pieces) != 1:
            return None
        return self._view.stream(pieces[0].key, pieces[0].offsets, pieces[0].sizes)

    def locate_record(self, info: TensorInfo, chunk: Chunk) -> Record:
        """Refuse: the source has the records.

        Args:
            info: not used.
            chunk: likewise.
        """
        raise AssertionError("a translated tensor has no record of its own")

    def own_files(self) -> set[str]:
        """Return the names of the source's files that hold tensors or their index."""
        return self.source.own_files()

    def make_writer(self, tensors: Sequence[TensorSpec], file_bytes: int) -> CheckpointWriter:
        """Return a writer of the format that the source is translated to.

        Args:
            tensors: to write.
            file_bytes: that files are filled to where the format decides that beforehand; 0: 4 GiB.
        """
        if self.format_name == "hf":
            return SafetensorsWriter(None, tensors, file_bytes or _FILE_BYTES)
        return TorchDistWriter()

    def stat_fingerprint(self) -> str:
        """Return the source's."""
        return self.source.stat_fingerprint()

    def verify_records(self, keys: Iterable[str], ranks: RankGroup) -> str:
        """Verify all tensors that were translated as `CheckpointReader.verify_records` does. *Collective*.

        Args:
            keys: not used, as in `RenamedView`.
            ranks: which have read.

        Raises:
            PermanentError: the bytes of a record are not those that were saved.
        """
        return self.source.verify_records(self._used, ranks)

    def require_unchanged(self) -> None:
        """Raise unless the source's files are unchanged."""
        self.source.require_unchanged()

    def close(self) -> None:
        """Do nothing: who opened the source closes it."""


def format_of(source: CheckpointReader | RenamedView) -> str:
    """Return the format whose names a reader has, `hf` or `megatron`."""
    if isinstance(source, TranslatedReader):
        return source.format_name
    return "hf" if isinstance(source, SafetensorsReader) else "megatron"


def translate_sources(
    sources: dict[str, CheckpointReader], format_name: str, scratch: ScratchBuffers
) -> dict[str, CheckpointReader]:
    """Return sources that all have the names of one format.

    Args:
        sources: opened, by name.
        format_name: `hf` or `megatron`.
        scratch: buffers for what is copied.

    Raises:
        UserError: as `TranslatedReader`.
    """
    return {
        name: source if format_of(source) == format_name else TranslatedReader(source, format_name, scratch)
        for name, source in sources.items()
    }


def _row_runs(kind: ParamMapping, model: Architecture) -> list[Rows]:
    """Return for each published tensor of a kind which rows of Megatron's slice it is.

    Raises:
        UserError: it is not made of whole rows.
    """
    rows, rest = kind.shape(model)[0], (2,) * (len(kind.shape(model)) - 1)
    probe = torch.arange(rows * math.prod(rest)).view(rows, *rest)
    try:
        parts = list(kind.split(probe, model))
        found = [part.reshape(part.shape[0], -1)[:, 0] // math.prod(rest) for part in parts]
        same = all(torch.equal(probe[rows], part) for rows, part in zip(found, parts, strict=True))
        same = same and torch.equal(kind.merge(parts, model), probe)
    except (RuntimeError, IndexError):
        same = False
    if not same:
        raise UserError(
            f"{kind.megatron} of {model.family.name} is not made of whole rows of {', '.join(kind.hf)}: bring the"
            " sources into one format with `convert`"
        )
    return [tuple(_runs(numbers.tolist())) for numbers in found]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of a list in which each number is one more than that before."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield start, numbers[start], i - start
            start = i


def _runs_of(model: Architecture) -> list[tuple[ParamMapping, list[Rows]]]:
    """Return the kinds of parameters with the rows of their published tensors."""
    return [(kind, _row_runs(kind, model)) for kind in model.mappings.values()]


def _published_tensors(model: Architecture) -> dict[str, Translation]:
    """Return the tensors as they are published, with their pieces of Megatron's."""
    found = {}
    for kind, parts in _runs_of(model):
        rest = kind.shape(model)[1:]
        zeros = (0,) * len(rest)
        for index in slice_indices(kind, model):
            key, at = megatron_slice(kind, index, model)
            for name, runs in zip(kind.names(index), parts, strict=True):
                pieces = [
                    Piece(((there, *zeros), (n, *rest)), key, (*at, here, *zeros), ((1,) * len(at) + (n, *rest)))
                    for there, here, n in runs
                ]
                found[name] = Translation((sum(n for _, _, n in runs), *rest), 0, {(): pieces})
    return found


def _stacked_tensors(model: Architecture) -> dict[str, Translation]:
    """Return the tensors as Megatron-Core saves them, with their pieces of the published ones."""
    found: dict[str, Translation] = {}
    for kind, parts in _runs_of(model):
        shape, zeros = kind.shape(model), (0,) * (len(kind.shape(model)) - 1)
        for index in slice_indices(kind, model):
            key, at = megatron_slice(kind, index, model)
            counts = (model.num_layers, model.num_experts)[len(index) - len(at) : len(index)]
            translation = found.setdefault(key, Translation((*counts, *shape), len(at), {}))
            translation.slices[at] = [
                Piece(((*at, here, *zeros), ((1,) * len(at) + (n, *shape[1:]))), name, (there, *zeros), (n, *shape[1:]))
                for name, runs in zip(kind.names(index), parts, strict=True)
                for there, here, n in runs
            ]
    return found


def _empty_states(translations: Mapping[str, Translation]) -> Iterator[str]:
    """Yield the keys of `_extra_state`, which Megatron-Core asks for: of every slice of a linear layer, and empty."""
    for key, entry in translations.items():
        if _LINEAR.search(key):
            counts = ".".join(map(str, entry.shape[: entry.axes] or (1,)))
            for at in entry.slices:
                yield f"{key.removesuffix('weight')}_extra_state/shard_{'.'.join(map(str, at or (0,)))}_{counts}"
