"""What a merge will do, decided from the checkpoints' indexes before any tensor is read.

Every tensor of every source gets one fate, and `make_plan` asserts that none is left over:

    merged    floating point, by the recipe's method
    equal     anything else (token tables, counters): must be the same in all sources, and is copied
    kept      the vocabulary's padding rows: as the pretrained checkpoint has them
    dropped   optimizer and random-number state, which no linear combination keeps valid

The output has the names, shapes and objects of the pretrained checkpoint, the *base*:

- Members that name or stack tensors otherwise are read through a `RenamedView`; together they must hold exactly the base's
  elements. Other numbers of layers or experts and missing or additional tensors are refused by name.
- The vocabulary's first rows, as many as there are tokens, are merged. How many that is, `vocabulary.unpadded_vocab_size` says.
- Tied embeddings: where all are tied there is one tensor. A tied member of an untied base gives its embedding for the
  output layer. An untied member of a tied base is refused.
- The router's bias (`expert_bias`) and, where the base has them in float32, the router's weights are merged like the
  rest and stay in float32, whatever `merge.dtype` is.
- 8-bit floating point is refused: such numbers mean nothing without their scales.
- Objects that are no tensors (`_extra_state`: FP8 scaling factors and the like) are the base's. Those of the members
  are dropped, and may differ in number: newer Transformer Engine releases write fewer.

The work is cut into pieces (one item of the output each) and units (one file each). The cut depends on the base and the
settings alone, never on the number of ranks.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from megatron_bai.checkpoint.boxes import Box, intersect_boxes, split_box
from megatron_bai.checkpoint.reader import CheckpointReader, Chunk, ScratchBuffers, TensorInfo
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.output_spec import OutputSpec, output_dtypes
from megatron_bai.merge.recipe.recipe import Recipe, SliceStats
from megatron_bai.merge.recipe.regions import Fate, OutputTensor, Region, split_into_regions
from megatron_bai.merge.recipe.slices import SliceBox, split_by_slice
from megatron_bai.merge.tensor_names.param_groups import matches
from megatron_bai.merge.tensor_names.renamed_view import CanonicalIndex, RenamedView, format_names, rename_to_base
from megatron_bai.merge.tensor_names.vocabulary import unpadded_vocab_size

UNIT_BYTES = 256 << 20  # of one output file: small enough to balance ranks, large enough that files stay few
ITEM_BYTES = 16 << 20  # of one output item at most, whatever the size of the tensor
OPTIMIZER_STATE_KEY = re.compile(r"^(chained_\d+\.)?optimizer\b|^(rng_state|rerun_state_machine_state|opt_param_scheduler)\b")


@dataclass(frozen=True)
class WorkUnit:
    """The content of one output file."""

    name: str
    items: tuple[tuple[Region, Box], ...]
    objects: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A merge, ready to execute.

    Attributes:
        base: the pretrained checkpoint.
        inputs: the checkpoints that are read, under the base's names; those that no sum needs are not among them.
        recipes: for each checkpoint to write, the method.
        input_weights: likewise, the weights of `inputs` in each merged region, by its name.
        outputs: every tensor to write, by key.
        regions: of every tensor, by its key.
        output_spec: what the output looks like besides.
        dropped: for each source's path, the tensors and objects that do not enter, by reason.
        slice_stats: what the method's first passes found, by slice.
    """

    base: CheckpointReader
    inputs: tuple[CheckpointReader | RenamedView, ...]
    input_weights: tuple[dict[str, tuple[float, ...]], ...]
    outputs: dict[str, OutputTensor]
    regions: dict[str, tuple[Region, ...]]
    units: tuple[WorkUnit, ...]
    dropped: dict[str, dict[str, list[str]]]
    output_spec: OutputSpec
    recipes: tuple[Recipe, ...]
    slice_stats: Mapping[str, SliceStats] = field(default_factory=dict)

    @property
    def has_kept_rows(self) -> bool:
        """Whether anything is kept as the base has it, which is then among the inputs."""
        return any(region.fate is Fate.KEPT for each in self.regions.values() for region in each)

    @property
    def bytes_read(self) -> int:
        return sum(source.tensors[key].nbytes for source in self.inputs for key in self.outputs)

    @property
    def bytes_written(self) -> int:
        """For each sum."""
        return sum(unit.nbytes for unit in self.units)

    def tiles(self, region: Region, box: Box, limit: int) -> Iterator[Box]:
        """Cut a box into boxes of at most `limit` elements, each in one slice where the method distinguishes them."""
        recipe = self.recipes[0]
        if region.fate is Fate.MERGED and (recipe.stats_passes or recipe.elementwise):
            return split_by_slice(region.output, box, limit)
        return split_box(*box, limit)

    def stats_of(self, part: SliceBox) -> SliceStats | None:
        """What was measured of the slice that `part` lies in."""
        return self.slice_stats.get(part.slice_name) if self.slice_stats else None

    def coefficients(self, region: Region, box: Box) -> list[tuple[float, ...]]:
        """For each sum, the coefficients of `inputs` in one of the `tiles`."""
        stats = self.stats_of(SliceBox(region.output, box))
        return [recipe.coefficients(row[region.name], stats) for recipe, row in zip(self.recipes, self.input_weights, strict=True)]

    def layout_hash(self) -> str:
        """A hash of how the work is cut, which depends on the settings as well as on the checkpoints."""
        names = [(unit.name, unit.objects, [(r.name, box) for r, box in unit.items]) for unit in self.units]
        return hashlib.sha256(repr(names).encode()).hexdigest()


def make_plan(
    recipes: Sequence[Recipe],
    sources: dict[str, CheckpointReader],
    item_bytes: int = ITEM_BYTES,
    unit_bytes: int = UNIT_BYTES,
    output_spec: OutputSpec | None = None,
) -> Plan:
    """Decide every tensor's fate and cut the work.

    Args:
        recipes: one for each checkpoint to write, over the same sources.
        sources: the opened checkpoint of every term.
        item_bytes: the largest item of the output, which one thread merges.
        unit_bytes: the size that output files are filled to, unless the form says another.
        output_spec: of the output.

    Raises:
        UserError: the sources do not hold the same weights in the same dtypes, the form does not fit them, or a
            recipe's pattern fits no tensor; what is wrong is named.
    """
    names = [term.source for term in recipes[0].terms()]  # the first gives the layout
    base = sources[names[0]]
    kept = {name: _model_tensors(sources[name]) for name in names}
    if not kept[names[0]]:
        raise UserError(f"{base.path} holds no model tensors")
    output_spec = output_spec or OutputSpec()
    if output_spec.chunk_bytes and base.stores_whole_tensors:
        raise UserError(f"merge.chunk_mib is for torch_dist: {base.path} holds every tensor in one piece, give 0")
    for name in names[1:]:
        if type(base) is not type(sources[name]):
            raise UserError(f"{base.path} and {name} are in two formats: bring them into one with `convert`")
    used = {sources[name].path: kept[name] for name in names}
    rows = unpadded_vocab_size(used, output_spec.vocab_size)
    chart, scratch = CanonicalIndex(base.path, kept[names[0]], rows), ScratchBuffers()
    inputs = {name: rename_to_base(sources[name], kept[name], chart, rows, scratch) for name in names[1:]}
    _require_dtypes(base, inputs.values(), kept[names[0]], any_float=output_spec.dtype is not None)
    dtypes = output_dtypes(kept[names[0]], output_spec.dtype)
    outputs = {
        key: OutputTensor(key, dtypes[key], entry.shape, merged=entry.dtype.is_floating_point)
        for key, entry in kept[names[0]].items()
    }
    cut = {key: split_into_regions(output, recipes[0].patterns, rows) for key, output in outputs.items()}
    objects = [key for key in base.objects if not OPTIMIZER_STATE_KEY.search(key)]
    dropped = {str(source.path): _dropped_keys(source, source is base) for source in sources.values()}
    for source in sources.values():
        fates = [*used[source.path], *(objects if source is base else ()), *chain(*dropped[str(source.path)].values())]
        assert sorted(fates) == sorted([*source.tensors, *source.objects]), f"{source.path}: not one fate for each key"
    merged = [region for each in cut.values() for region in each if region.fate is Fate.MERGED]
    keeps = any(region.fate is Fate.KEPT for each in cut.values() for region in each)
    needed, weights = _input_weights(recipes, merged, {names[0]} if keeps else set())
    units = _make_units(base, cut, objects, item_bytes, output_spec.file_bytes or unit_bytes, output_spec.chunk_bytes)
    read = tuple(inputs.get(name, base) for name in needed)
    return Plan(base, read, weights, outputs, cut, units, dropped, output_spec, tuple(recipes))


def _input_weights(
    recipes: Sequence[Recipe], merged: list[Region], also: set[str]
) -> tuple[list[str], tuple[dict[str, tuple[float, ...]], ...]]:
    """The sources that any region of any recipe needs and those in `also`, and their coefficients for each recipe and
    region."""
    for pattern in recipes[0].patterns:
        if not any(matches(pattern, region.key, region.layer) for region in merged):
            raise UserError(f"the pattern {pattern!r} of {_setting_with_pattern(recipes[0], pattern)} fits no tensor")
    all_terms = [{region.name: recipe.terms(region.key, region.layer) for region in merged} for recipe in recipes]
    needed = {term.source for terms in all_terms for row in terms.values() for term in row if term.coefficient != 0}
    needed |= also
    if recipes[0].elementwise:  # its `combine` knows the sources by their places
        needed.update(term.source for term in recipes[0].terms())
    inputs = [term.source for term in recipes[0].terms() if term.source in needed]
    weights = tuple(
        {name: tuple(term.coefficient for term in row if term.source in needed) for name, row in terms.items()}
        for terms in all_terms
    )
    return inputs, weights


def _setting_with_pattern(recipe: Recipe, pattern: str) -> str:
    """Where a pattern was given."""
    named = {name: value for name, value in recipe.settings.items() if name.endswith("_for")}
    return next(f"merge.{name}" for name, value in named.items() if pattern in dict(value))


def _model_tensors(source: CheckpointReader) -> dict[str, TensorInfo]:
    return {key: entry for key, entry in source.tensors.items() if not OPTIMIZER_STATE_KEY.search(key)}


def _dropped_keys(source: CheckpointReader, is_base: bool) -> dict[str, list[str]]:
    """What of a source does not enter, by reason."""
    reasons = {"optimizer or random-number state": [k for k in (*source.tensors, *source.objects) if OPTIMIZER_STATE_KEY.search(k)]}
    if not is_base:
        reasons["objects are taken from the pretrained checkpoint"] = [
            key for key in source.objects if not OPTIMIZER_STATE_KEY.search(key)
        ]
    return {reason: keys for reason, keys in reasons.items() if keys}


def _require_dtypes(
    base: CheckpointReader, others: Iterable[CheckpointReader | RenamedView], tensors: dict[str, TensorInfo], any_float: bool
) -> None:
    """A tensor has one dtype in all sources; `any_float`: or several, all floating point of 16 bits or more."""
    small = [key for key, entry in tensors.items() if entry.dtype.is_floating_point and entry.dtype.itemsize < 2]
    if small:
        raise UserError(f"{base.path} holds quantised tensors ({format_names(small)}): merge checkpoints of 16 bits or more")
    for other in others:
        pairs = {key: (entry.dtype, other.tensors[key].dtype) for key, entry in tensors.items()}
        differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if any_float:
            floats = torch.bfloat16, torch.float16, torch.float32, torch.float64
            differing = {key: pair for key, pair in differing.items() if not set(pair) <= set(floats)}
        if differing:
            floating = all(dtype.is_floating_point for pair in differing.values() for dtype in pair)
            listed = format_names(f"{key} ({a} and {b})" for key, (a, b) in differing.items())
            advice = ": choose the output's with merge.dtype" if floating else ""
            raise UserError(f"{base.path} and {other.path} differ in the dtype of {listed}{advice}")


def _make_units(
    base: CheckpointReader,
    cut: dict[str, tuple[Region, ...]],
    objects: list[str],
    item_bytes: int,
    unit_bytes: int,
    chunk_bytes: int,
) -> tuple[WorkUnit, ...]:
    """Pieces of regions along the base's chunks, or as large as `chunk_bytes` says, packed into units in the base's
    order; the objects go first."""
    units: list[WorkUnit] = []
    items: list[tuple[Region, Box]] = []
    size = sum(base.objects[key].length for key in objects)

    def finish() -> None:
        nonlocal items, objects, size
        units.append(WorkUnit(f"__{len(units)}_0", tuple(items), tuple(objects), size))
        items, objects, size = [], [], 0

    for key, own in cut.items():
        for region, box in _split_into_items(own, base.tensors[key].chunks, item_bytes, chunk_bytes):
            nbytes = math.prod(box[1]) * region.dtype.itemsize
            if size + nbytes > unit_bytes and (items or objects):
                finish()
            items.append((region, box))
            size += nbytes
    finish()
    return tuple(units)


def _split_into_items(
    parts: tuple[Region, ...], chunks: tuple[Chunk, ...], item_bytes: int, chunk_bytes: int
) -> Iterator[tuple[Region, Box]]:
    """The items of one tensor. None is in two regions."""
    for region in parts:
        limit = (chunk_bytes or item_bytes) // region.dtype.itemsize
        if chunk_bytes:
            boxes: Iterable[Box] = [region.box]
        else:
            boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks]
            if len(parts) > 1:
                boxes = [part for box in boxes if (part := intersect_boxes(region.box, box)) is not None]
        for offsets, sizes in boxes:
            yield from ((region, box) for box in split_box(offsets, sizes, limit))
