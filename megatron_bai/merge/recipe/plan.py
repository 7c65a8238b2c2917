"""The plan of a merge, decided from the checkpoints' indexes before any tensor is read.

Every tensor of every source gets one fate; `make_plan` asserts that none is forgotten:

    merged    floating point, by the recipe's method
    equal     anything else (token tables, counters): must be the same in all sources, and is copied
    kept      the vocabulary's padding rows, and tensors that `merge.keep` names: as the pretrained checkpoint has them
    dropped   optimizer and random-number state, which no linear combination keeps valid

The output has the names, shapes and objects of the pretrained checkpoint, the *base*:

- Sources in another format than the output's, the base's unless `merge.format` says another, are read through a
  `TranslatedReader`; what follows is of what that presents.
- Members that name or stack tensors otherwise are read through a `RenamedView`; together they must hold exactly the
  base's elements. Other numbers of layers or experts and missing or additional tensors are refused by name.
- The vocabulary's first rows, as many as there are tokens, are merged: `vocabulary.unpadded_vocab_size`.
- Tied embeddings: where all are tied there is one tensor. A tied member of an untied base gives its embedding for the
  output layer. An untied member of a tied base is refused.
- The router's bias (`expert_bias`) and, where the base has them in float32, the router's weights are merged like the
  rest and stay in float32, whatever `merge.dtype` is; a bias in less is float32 where a source has it so.
- A tied source that stores its output layer, too, is tied: the copy is left out. A source without one that is not tied
  is refused.
- Quantised weights are refused: such numbers mean nothing without their scales.
- Objects that are no tensors (`_extra_state`: FP8 scaling factors and the like) are the base's. Those of the members
  are dropped, and may differ in number: newer Transformer Engine releases write fewer.

The work is split into items of the output and units (one file each), which depend on the base and the settings alone,
never on the number of ranks.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from megatron_bai.checkpoint.boxes import Box, intersect_boxes, split_box
from megatron_bai.checkpoint.reader import CheckpointReader, ScratchBuffers
from megatron_bai.checkpoint.tensor_index import Chunk, TensorInfo
from megatron_bai.checkpoint.weight_checks import OUTPUT, is_state, require_output_layer, require_plain_weights
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.output_spec import ROUTER_BIAS, OutputSpec, choose_output_dtypes
from megatron_bai.merge.recipe.recipe import Recipe, SliceStats
from megatron_bai.merge.recipe.regions import Fate, OutputTensor, Region, make_kept_region, split_into_regions
from megatron_bai.merge.recipe.slices import SliceBox, split_by_slice
from megatron_bai.merge.recipe.sources_agree import Agreement, Difference
from megatron_bai.merge.tensor_names.canonical_names import canonical_box
from megatron_bai.merge.tensor_names.family_names import choose_canonical_names
from megatron_bai.merge.tensor_names.param_groups import matches
from megatron_bai.merge.tensor_names.renamed_view import CanonicalIndex, RenamedView, format_names, rename_to_base
from megatron_bai.merge.tensor_names.tied_copies import find_tied_copies
from megatron_bai.merge.tensor_names.translated_reader import TranslatedReader, format_of, translate_sources
from megatron_bai.merge.tensor_names.vocabulary import read_vocab_info, unpadded_vocab_size

UNIT_BYTES = 256 << 20  # of one output file: small enough to balance ranks, large enough that files stay few
ITEM_BYTES = 16 << 20  # of one output item at most, whatever the size of the tensor


@dataclass(frozen=True)
class WorkUnit:
    """The content of one output file.

    Attributes:
        name: of the unit, and of its file where the format has one for each.
        items: regions and the boxes of them that are one item each.
        objects: keys of the base's objects that are carried over.
        nbytes: of items and objects.
    """

    name: str
    items: tuple[tuple[Region, Box], ...]
    objects: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A merge that is ready to be executed, into one result or several.

    Attributes:
        base: the pretrained checkpoint.
        inputs: the checkpoints that are read, under the base's names; those that no result needs are not among them.
        recipes: of each result.
        input_weights: for each result, the weights of `inputs` in each merged region, by its name.
        outputs: every tensor to write, by key.
        regions: of every tensor, by its key.
        units: what is written, one file each.
        output_spec: how the results are written.
        dropped: for each source's path, the tensors and objects that are not used, by reason.
        agreement: what the sources say differently, and whose tokenizer the results have; None: not compared.
        slice_stats: what the method measured before the merge, by slice.
        sources: every one, as it was opened, also those of which no tensor is needed.
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
    agreement: Agreement | None = None
    slice_stats: Mapping[str, SliceStats] = field(default_factory=dict)
    sources: tuple[CheckpointReader, ...] = ()

    @property
    def has_kept_rows(self) -> bool:
        """Whether anything is kept as the base has it, which is then among the inputs."""
        return any(region.fate is Fate.KEPT for region in chain(*self.regions.values()))

    @property
    def bytes_read(self) -> int:
        """The bytes of all inputs."""
        return sum(source.tensors[key].nbytes for source in self.inputs for key in self.keys_read(source))

    def keys_read(self, source: CheckpointReader | RenamedView) -> list[str]:
        """Return the outputs that need an input: of others than the base, not those that are kept whole."""
        return [key for key in self.outputs if source is self.base or key not in self.kept]

    @functools.cached_property  # asked for each tensor
    def kept(self) -> frozenset[str]:
        """The outputs that are kept whole, as the base has them."""
        return frozenset(key for key, rows in self.regions.items() if all(row.fate is Fate.KEPT for row in rows))

    @property
    def bytes_written(self) -> int:
        """The bytes of one result."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def differences(self) -> tuple[Difference, ...]:
        """What the sources say differently, and is allowed."""
        return self.agreement.differences if self.agreement else ()

    def tiles(self, region: Region, box: Box, limit: int) -> Iterator[Box]:
        """Split a box into tiles of at most `limit` elements, each in one slice where the method needs that.

        Args:
            region: which the box lies in.
            box: of the output tensor.
            limit: largest number of elements of a tile, at least 1.

        Yields:
            Boxes of the output tensor in row-major order; the elements of each are contiguous within `box`.
        """
        recipe = self.recipes[0]
        if region.fate is Fate.MERGED and (recipe.stats_passes or recipe.elementwise):
            return split_by_slice(region.output, box, limit)
        return split_box(*box, limit)

    def stats_of(self, slice_box: SliceBox) -> SliceStats | None:
        """Return the statistics of the slice that `slice_box` lies in."""
        return self.slice_stats.get(slice_box.slice_name) if self.slice_stats else None

    def coefficients(self, region: Region, box: Box) -> list[tuple[float, ...]]:
        """Return for each result the coefficients of `inputs` in one of the `tiles`.

        Args:
            region: a merged region, which the tile lies in.
            box: of the tile, in the output tensor; in one slice where slices were measured.

        Returns:
            A tuple for each result, in the order of `recipes`, with one coefficient for each of `inputs`.
        """
        stats = self.stats_of(SliceBox(region.output, box))
        results = zip(self.recipes, self.input_weights, strict=True)
        return [recipe.coefficients(weights[region.name], stats) for recipe, weights in results]

    def layout_hash(self) -> str:
        """Return a hash of units and items, which depend on the settings as well as on the checkpoints."""
        names = [(unit.name, unit.objects, [(r.name, box) for r, box in unit.items]) for unit in self.units]
        return hashlib.sha256(repr(names).encode()).hexdigest()


def make_plan(
    recipes: Sequence[Recipe],
    sources: dict[str, CheckpointReader],
    item_bytes: int = ITEM_BYTES,
    unit_bytes: int = UNIT_BYTES,
    output_spec: OutputSpec | None = None,
) -> Plan:
    """Decide every tensor's fate and split the work.

    Args:
        recipes: one for each checkpoint to write, over the same sources.
        sources: the opened checkpoint of every term.
        item_bytes: the largest item of the output, which one thread merges.
        unit_bytes: the size to which output files are filled, unless `output_spec` has another.
        output_spec: how the results are written; None: as the pretrained checkpoint.

    Raises:
        UserError: the sources do not hold the same weights in the same dtypes, `output_spec` does not suit them, or a
            recipe's pattern matches no tensor; what is wrong is named.
    """
    names = [term.source for term in recipes[0].terms()]  # the first gives the layout
    output_spec, scratch = output_spec or OutputSpec(), ScratchBuffers()
    sources = translate_sources(sources, output_spec.format or format_of(sources[names[0]]), scratch)
    base = sources[names[0]]
    all_tensors, copies = _usable_tensors([sources[name] for name in names], names)
    kept = _keys_to_keep(all_tensors, output_spec.keep)
    _require_output_layers({sources[name].path: tensors for name, tensors in all_tensors.items()}, kept)
    tensors = {name: {k: e for k, e in entries.items() if k not in kept} for name, entries in all_tensors.items()}
    base_tensors = tensors[names[0]]
    if not base_tensors:
        raise UserError(f"{base.path} holds no model tensors")
    if output_spec.chunk_bytes and base.stores_whole_tensors:
        raise UserError(f"merge.chunk_mib is for torch_dist: {base.path} holds every tensor in one piece, give 0")
    used = {sources[name].path: tensors[name] for name in names}
    vocab_size = unpadded_vocab_size(used, output_spec.vocab_size)
    base_index = CanonicalIndex(base.path, base_tensors, vocab_size, choose_canonical_names(used, format_of(base)))
    inputs = {name: rename_to_base(sources[name], tensors[name], base_index, vocab_size, scratch) for name in names[1:]}
    _require_dtypes(base, inputs.values(), base_tensors, any_float=output_spec.dtype is not None)
    dtypes = choose_output_dtypes(base_tensors, output_spec.dtype, [each.tensors for each in inputs.values()])
    outputs = {
        key: OutputTensor(key, dtypes[key], entry.shape, entry.dtype.is_floating_point, base_index.canonical_boxes[key])
        for key, entry in base_tensors.items()
    }
    regions = {key: split_into_regions(output, recipes[0].patterns, vocab_size) for key, output in outputs.items()}
    for key, region in _kept_regions(all_tensors[names[0]], kept).items():
        outputs[key], regions[key] = region.output, (region,)
    objects = [key for key in base.objects if not is_state(key)]
    dropped = {str(source.path): _dropped_keys(source, source is base, kept, copies) for source in sources.values()}
    used[base.path] = all_tensors[names[0]]
    for source in sources.values():
        _require_fates(source, [*used[source.path], *(objects if source is base else ())], dropped[str(source.path)])
        if isinstance(source, TranslatedReader):
            dropped[str(source.path)] |= source.left_out
    merged = [region for region in chain(*regions.values()) if region.fate is Fate.MERGED]
    any_kept = any(region.fate is Fate.KEPT for region in chain(*regions.values()))
    needed, weights = _input_weights(recipes, merged, {names[0]} if any_kept else set())
    file_bytes = output_spec.file_bytes or unit_bytes
    units = _make_units(base, regions, objects, item_bytes, file_bytes, output_spec.chunk_bytes)
    read = tuple(inputs.get(name, base) for name in needed)
    return Plan(base, read, weights, outputs, regions, units, dropped, output_spec, tuple(recipes))


def _input_weights(
    recipes: Sequence[Recipe], merged: list[Region], always_needed: set[str]
) -> tuple[list[str], tuple[dict[str, tuple[float, ...]], ...]]:
    """Return the sources that are needed by a region or always, and their weights for each recipe and region."""
    for pattern in recipes[0].patterns:
        if not any(matches(pattern, region.key, region.layer) for region in merged):
            raise UserError(f"the pattern {pattern!r} of {_setting_with_pattern(recipes[0], pattern)} fits no tensor")
    all_terms = [{region.name: recipe.terms(region.key, region.layer) for region in merged} for recipe in recipes]
    needed = {term.source for terms in all_terms for row in terms.values() for term in row if term.coefficient != 0}
    needed |= always_needed
    if recipes[0].elementwise:  # its `combine` identifies the sources by their index
        needed.update(term.source for term in recipes[0].terms())
    inputs = [term.source for term in recipes[0].terms() if term.source in needed]
    weights = tuple(
        {name: tuple(term.coefficient for term in row if term.source in needed) for name, row in terms.items()}
        for terms in all_terms
    )
    return inputs, weights


def _setting_with_pattern(recipe: Recipe, pattern: str) -> str:
    """Return the setting in which a pattern was given."""
    return next(f"merge.{n}" for n, value in recipe.settings.items() if n.endswith("_for") and pattern in dict(value))


def _model_tensors(source: CheckpointReader) -> dict[str, TensorInfo]:
    """Return the tensors of a source that are no optimizer or random-number state."""
    return {key: entry for key, entry in source.tensors.items() if not is_state(key)}


def _keys_to_keep(all_tensors: dict[str, dict[str, TensorInfo]], patterns: Sequence[str]) -> set[str]:
    """Return the names of all sources that a pattern of `merge.keep` matches."""
    keys = {key for tensors in all_tensors.values() for key in tensors}
    for pattern in patterns:
        if not any(matches(pattern, key, _layer(key)) for key in keys):
            raise UserError(f"the pattern {pattern!r} of merge.keep fits no tensor of any source")
    return {key for key in keys if any(matches(pattern, key, _layer(key)) for pattern in patterns)}


def _kept_regions(tensors: dict[str, TensorInfo], kept: set[str]) -> dict[str, Region]:
    """Return the regions of the base's tensors that are kept whole."""
    entries = {key: entry for key, entry in tensors.items() if key in kept}
    return {k: make_kept_region(OutputTensor(k, e.dtype, e.shape, merged=False)) for k, e in entries.items()}


def _layer(key: str) -> int | None:
    """Return the one layer that a tensor is of, by its name; None for others."""
    return next(iter(canonical_box(key, ()).layers or ()), None)


def _usable_tensors(
    sources: Sequence[CheckpointReader], names: Sequence[str]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[Path, set[str]]]:
    """Return the tensors of the model by source's name, and by path those left out as a tied embedding's copy."""
    all_tensors, copies = {}, {}
    for name, source in zip(names, sources, strict=True):
        tensors = _model_tensors(source)
        require_plain_weights(source.path, tensors)
        copies[source.path] = find_tied_copies(source, tensors)
        all_tensors[name] = {key: entry for key, entry in tensors.items() if key not in copies[source.path]}
    return all_tensors, copies


def _require_output_layers(all_tensors: Mapping[Path, Iterable[str]], kept: set[str]) -> None:
    """Refuse a source, of the paths given, that has lost its output layer, unless `merge.keep` has the base's."""
    if not any(OUTPUT.search(key) for key in kept):
        for path, keys in all_tensors.items():
            require_output_layer(path, keys, lambda path: read_vocab_info(path).tied)


def _require_fates(source: CheckpointReader, keys: Iterable[str], dropped: Mapping[str, list[str]]) -> None:
    """Assert that what is used of a source and what is dropped are its keys, each once."""
    fates = [*keys, *chain(*dropped.values())]
    assert sorted(fates) == sorted([*source.tensors, *source.objects]), f"{source.path}: not one fate for each key"


def _dropped_keys(
    source: CheckpointReader, is_base: bool, kept: set[str], copies: Mapping[Path, set[str]]
) -> dict[str, list[str]]:
    """Return the keys of a source that are not used, by reason."""
    keys = (*source.tensors, *source.objects)
    reasons = {"optimizer or random-number state": [key for key in keys if is_state(key)]}
    reasons["copies of a tied embedding"] = sorted(copies[source.path])
    if not is_base:
        reasons["merge.keep takes them from the pretrained checkpoint alone"] = [
            k for k in source.tensors if k in kept - copies[source.path]
        ]
        reasons["objects are taken from the pretrained checkpoint"] = [
            key for key in source.objects if not is_state(key)
        ]
    return {reason: keys for reason, keys in reasons.items() if keys}


def _require_dtypes(
    base: CheckpointReader,
    others: Iterable[CheckpointReader | RenamedView],
    tensors: dict[str, TensorInfo],
    any_float: bool,
) -> None:
    """Raise a UserError unless dtypes are the same; those of 16 bits or more differ with `any_float`, and of a bias."""
    floats = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
    for other in others:
        pairs = {key: (entry.dtype, other.tensors[key].dtype) for key, entry in tensors.items()}
        differing = {
            key: pair
            for key, pair in pairs.items()
            if pair[0] != pair[1] and not ((any_float or ROUTER_BIAS.search(key)) and floats >= set(pair))
        }
        if differing:
            floating = all(dtype.is_floating_point for pair in differing.values() for dtype in pair)
            listed = format_names(f"{key} ({a} and {b})" for key, (a, b) in differing.items())
            advice = ": choose the output's with merge.dtype" if floating else ""
            raise UserError(f"{base.path} and {other.path} differ in the dtype of {listed}{advice}")


def _make_units(
    base: CheckpointReader,
    regions: dict[str, tuple[Region, ...]],
    objects: list[str],
    item_bytes: int,
    unit_bytes: int,
    chunk_bytes: int,
) -> tuple[WorkUnit, ...]:
    """Pack items into units in the base's order, after the objects."""
    units: list[WorkUnit] = []
    items: list[tuple[Region, Box]] = []
    nbytes = sum(base.objects[key].length for key in objects)

    def finish() -> None:
        nonlocal items, objects, nbytes
        units.append(WorkUnit(f"__{len(units)}_0", tuple(items), tuple(objects), nbytes))
        items, objects, nbytes = [], [], 0

    for key, tensor_regions in regions.items():
        for region, box in _split_into_items(tensor_regions, base.tensors[key].chunks, item_bytes, chunk_bytes):
            item_nbytes = math.prod(box[1]) * region.dtype.itemsize
            if nbytes + item_nbytes > unit_bytes and (items or objects):
                finish()
            items.append((region, box))
            nbytes += item_nbytes
    finish()
    return tuple(units)


def _split_into_items(
    regions: tuple[Region, ...], chunks: tuple[Chunk, ...], item_bytes: int, chunk_bytes: int
) -> Iterator[tuple[Region, Box]]:
    """Yield the items of one tensor, along the base's chunks or of `chunk_bytes`; none is in two regions."""
    for region in regions:
        limit = (chunk_bytes or item_bytes) // region.dtype.itemsize
        if chunk_bytes:
            boxes: Iterable[Box] = [region.box]
        else:
            boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks]
            if len(regions) > 1:
                boxes = [common for box in boxes if (common := intersect_boxes(region.box, box)) is not None]
        for offsets, sizes in boxes:
            yield from ((region, box) for box in split_box(offsets, sizes, limit))
