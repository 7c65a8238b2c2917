"""What a merge will do, decided from the checkpoints' indexes before any tensor is read.

Every tensor of every source gets one fate, and `plan` asserts that none is left over:

    merged    floating point, by the recipe's method
    equal     anything else (token tables, counters): must be the same in all sources, and is copied
    dropped   optimizer and random-number state, which no linear combination keeps valid

Objects that are no tensors (`_extra_state`: FP8 scaling factors and the like) are carried over from the pretrained
checkpoint, whose layout the output also takes. Those of the members are dropped, and may differ in number: newer
Transformer Engine releases write fewer.

The work is cut into pieces (one item of the output each) and units (one file each). The cut depends on the pretrained
checkpoint alone, never on the number of ranks.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from megatron_bai.errors import UserError
from megatron_bai.merge.boxes import Box, split
from megatron_bai.merge.groups import fits
from megatron_bai.merge.recipe import Measure, Recipe
from megatron_bai.merge.slices import Part, parts
from megatron_bai.merge.sources import Entry, Source

UNIT_BYTES = 256 << 20  # of one output file: small enough to balance ranks, large enough that files stay few
PIECE_BYTES = 16 << 20  # of one output item at most, whatever the size of the tensor
STATE = re.compile(r"^(chained_\d+\.)?optimizer\b|^(rng_state|rerun_state_machine_state|opt_param_scheduler)\b")


@dataclass(frozen=True)
class Output:
    """A tensor to write; `merged` or else equal in all sources."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    merged: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """The content of one output file."""

    name: str
    pieces: tuple[tuple[Output, Box], ...]
    objects: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A merge, ready to execute.

    Attributes:
        base: the pretrained checkpoint.
        inputs: the checkpoints that are read; those that no sum needs are not among them.
        recipes: for each checkpoint to write, the method.
        sums: likewise, the weights of `inputs` in each merged tensor.
        outputs: every tensor to write, by key.
        dropped: for each source's path, the tensors and objects that do not enter, by reason.
        measures: what the method's first passes found, by slice.
    """

    base: Source
    inputs: tuple[Source, ...]
    sums: tuple[dict[str, tuple[float, ...]], ...]
    outputs: dict[str, Output]
    units: tuple[Unit, ...]
    dropped: dict[str, dict[str, list[str]]]
    recipes: tuple[Recipe, ...] = ()
    measures: Mapping[str, Measure] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        return sum(source.tensors[key].nbytes for source in self.inputs for key in self.outputs)

    @property
    def bytes_written(self) -> int:
        """For each sum."""
        return sum(unit.nbytes for unit in self.units)

    def tiles(self, output: Output, box: Box, limit: int) -> Iterator[Box]:
        """Cut a box into boxes of at most `limit` elements, each in one slice where the method distinguishes them."""
        recipe = self.recipes[0]
        if output.merged and (recipe.passes or recipe.elementwise):
            return parts(output.key, output.shape, box, limit)
        return split(*box, limit)

    def measure(self, part: Part) -> Measure | None:
        """What was measured of the slice that `part` lies in."""
        return self.measures.get(part.name) if self.measures else None

    def coefficients(self, output: Output, box: Box) -> list[tuple[float, ...]]:
        """For each sum, the coefficients of `inputs` in one of the `tiles`."""
        measure = self.measure(Part(output.key, output.shape, box))
        return [recipe.coefficients(row[output.key], measure) for recipe, row in zip(self.recipes, self.sums)]

    def cut(self) -> str:
        """A hash of how the work is cut, which depends on the settings as well as on the checkpoints."""
        names = [(unit.name, unit.objects, [(o.key, box) for o, box in unit.pieces]) for unit in self.units]
        return hashlib.sha256(repr(names).encode()).hexdigest()


def plan(
    recipes: Sequence[Recipe],
    sources: dict[str, Source],
    piece_bytes: int = PIECE_BYTES,
    unit_bytes: int = UNIT_BYTES,
) -> Plan:
    """Decide every tensor's fate and cut the work.

    Args:
        recipes: one for each checkpoint to write, over the same sources.
        sources: the opened checkpoint of every term.
        piece_bytes: the largest item of the output, which is held in memory.
        unit_bytes: the size that output files are filled to.

    Raises:
        UserError: the sources do not hold the same tensors with the same shapes and dtypes, or a recipe's pattern fits
            no tensor; what is wrong is named.
    """
    names = [term.source for term in recipes[0].terms()]  # the first gives the layout
    base = sources[names[0]]
    kept = {name: _model_tensors(sources[name]) for name in names}
    for name in names[1:]:
        _require_same(base, kept[names[0]], sources[name], kept[name])
    outputs = {
        key: Output(key, entry.dtype, entry.shape, merged=entry.dtype.is_floating_point)
        for key, entry in kept[names[0]].items()
    }
    if not outputs:
        raise UserError(f"{base.path} holds no model tensors")
    objects = [key for key in base.objects if not STATE.search(key)]
    dropped = {str(source.path): _dropped(source, source is base) for source in sources.values()}
    for source in sources.values():
        fates = [*outputs, *(objects if source is base else ()), *chain(*dropped[str(source.path)].values())]
        assert sorted(fates) == sorted([*source.tensors, *source.objects]), f"{source.path}: not one fate for each key"
    inputs, sums = _sums(recipes, [key for key, output in outputs.items() if output.merged])
    units = _cut(base, outputs, objects, piece_bytes, unit_bytes)
    return Plan(base, tuple(sources[name] for name in inputs), sums, outputs, units, dropped, tuple(recipes))


def _sums(recipes: Sequence[Recipe], keys: list[str]) -> tuple[list[str], tuple[dict[str, tuple[float, ...]], ...]]:
    """The sources that any tensor of any recipe needs, and their coefficients for each recipe and tensor."""
    for pattern in recipes[0].patterns:
        if not any(fits(pattern, key) for key in keys):
            raise UserError(f"the pattern {pattern!r} of {_setting_of(recipes[0], pattern)} fits no tensor")
    all_terms = [{key: recipe.terms(key) for key in keys} for recipe in recipes]
    needed = {term.source for terms in all_terms for row in terms.values() for term in row if term.coefficient != 0}
    if recipes[0].elementwise:  # its `combine` knows the sources by their places
        needed.update(term.source for term in recipes[0].terms())
    inputs = [term.source for term in recipes[0].terms() if term.source in needed]
    sums = tuple(
        {key: tuple(term.coefficient for term in row if term.source in needed) for key, row in terms.items()}
        for terms in all_terms
    )
    return inputs, sums


def _setting_of(recipe: Recipe, pattern: str) -> str:
    """Where a pattern was given."""
    named = {name: value for name, value in recipe.settings.items() if name.endswith("_for")}
    return next(f"merge.{name}" for name, value in named.items() if pattern in dict(value))


def _model_tensors(source: Source) -> dict[str, Entry]:
    return {key: entry for key, entry in source.tensors.items() if not STATE.search(key)}


def _dropped(source: Source, is_base: bool) -> dict[str, list[str]]:
    """What of a source does not enter, by reason."""
    reasons = {"optimizer or random-number state": [k for k in (*source.tensors, *source.objects) if STATE.search(k)]}
    if not is_base:
        reasons["objects are taken from the pretrained checkpoint"] = [
            key for key in source.objects if not STATE.search(key)
        ]
    return {reason: keys for reason, keys in reasons.items() if keys}


def _require_same(base: Source, expected: dict[str, Entry], other: Source, found: dict[str, Entry]) -> None:
    if type(base) is not type(other):
        raise UserError(f"{base.path} and {other.path} are in two formats: bring them into one with `convert`")
    for path, missing in ((other.path, expected.keys() - found.keys()), (base.path, found.keys() - expected.keys())):
        if missing:
            against = base.path if path == other.path else other.path
            raise UserError(f"{path} lacks {_some(missing)} of {against}: they are not the same architecture")
    for what in ("shape", "dtype"):
        pairs = {k: (getattr(expected[k], what), getattr(found[k], what)) for k in expected}
        differing = {f"{key} ({a} and {b})" for key, (a, b) in pairs.items() if a != b}
        if differing:
            raise UserError(f"{base.path} and {other.path} differ in the {what} of {_some(differing)}")


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _cut(
    base: Source, outputs: dict[str, Output], objects: list[str], piece_bytes: int, unit_bytes: int
) -> tuple[Unit, ...]:
    """Pieces along the base's chunks, packed into units in the base's order; the objects go first."""
    units: list[Unit] = []
    pieces: list[tuple[Output, Box]] = []
    size = sum(base.objects[key].length for key in objects)

    def finish() -> None:
        nonlocal pieces, objects, size
        units.append(Unit(f"__{len(units)}_0", tuple(pieces), tuple(objects), size))
        pieces, objects, size = [], [], 0

    for key, output in outputs.items():
        for chunk in base.tensors[key].chunks:
            for box in split(chunk.offsets, chunk.sizes, piece_bytes // output.dtype.itemsize):
                nbytes = math.prod(box[1]) * output.dtype.itemsize
                if size + nbytes > unit_bytes and (pieces or objects):
                    finish()
                pieces.append((output, box))
                size += nbytes
    finish()
    return tuple(units)
