"""Comparison of checkpoints: the content of one, its provenance, and the distance of two."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.boxes import split_box
from megatron_bai.checkpoint.carried_files import PROVENANCE, has_provenance
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.reader import CheckpointReader, ScratchBuffers
from megatron_bai.checkpoint.tensor_index import TensorInfo
from megatron_bai.checkpoint.weight_checks import is_state, require_output_layer, require_plain_weights
from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.merge.execution.thread_pool import single_torch_thread
from megatron_bai.merge.execution.tiles import TILE
from megatron_bai.merge.recipe.recipe import NON_SETTINGS, format_settings
from megatron_bai.merge.tensor_names.param_groups import param_group
from megatron_bai.merge.tensor_names.vocabulary import read_vocab_info
from megatron_bai.model.architecture import find_architecture
from megatron_bai.model.hf_mapping import VALUE_HEAD
from megatron_bai.model.required_tensors import require_tensors
from megatron_bai.utils.strict_json import parse
from megatron_bai.utils.terminal_text import make_console

_MAX_NAMED = 20  # tensors that differ, by name


@dataclass
class Distance:
    """The difference of two checkpoints in a set of tensors; sums over elements, in float64.

    With a the first's elements and b the second's: `cosine` is a·b / (‖a‖‖b‖), `relative` is ‖a − b‖ / ‖a‖.
    """

    elements: int = 0
    aa: float = 0.0  # Σ a²
    bb: float = 0.0  # Σ b²
    ab: float = 0.0  # Σ a·b
    dd: float = 0.0  # Σ (a − b)²
    differing: list[str] = field(default_factory=list)  # tensors with an element that is not the same
    tensors: int = 0

    @property
    def distance(self) -> float:
        """‖a − b‖."""
        return math.sqrt(self.dd)

    @property
    def relative(self) -> float:
        """‖a − b‖ / ‖a‖, NaN where a is 0."""
        return self.distance / math.sqrt(self.aa) if self.aa else math.nan

    @property
    def cosine(self) -> float:
        """The cosine of the angle between a and b, NaN where one is 0."""
        return self.ab / math.sqrt(self.aa) / math.sqrt(self.bb) if self.aa and self.bb else math.nan


def compare_checkpoints(a: CheckpointReader, b: CheckpointReader) -> dict[str, Distance]:
    """Compute the distance of two checkpoints in each parameter group, over the tensors that both have with one shape.

    Reads both once, in tiles; the two may be sharded differently.

    Args:
        a: the first checkpoint, to which `Distance.relative` relates the difference.
        b: the second. Its dtypes may be others than the first's.

    Returns:
        Distances by name of the group; a group without such tensors is not in it.

    Raises:
        UserError: a record cannot be read, or its bytes are not those that were saved.
    """
    groups: dict[str, Distance] = defaultdict(Distance)
    with single_torch_thread():
        for key in sorted(a.tensors.keys() & b.tensors.keys()):
            if a.tensors[key].shape == b.tensors[key].shape:
                _add(groups[param_group(key)], a, b, a.tensors[key])
    return dict(groups)


def _add(group: Distance, a: CheckpointReader, b: CheckpointReader, entry: TensorInfo) -> None:
    """Add the sums of one tensor."""
    same = True
    for chunk in entry.chunks:
        for box in split_box(chunk.offsets, chunk.sizes, TILE):
            own_x = a.read(entry.key, *box).clone()  # the next read reuses the scratch memory
            own_y = b.read(entry.key, *box)
            x, y = own_x.to(torch.float64), own_y.to(torch.float64)
            difference = x - y
            exact = own_x.dtype == own_y.dtype and not own_x.is_floating_point()  # float64 rounds large integers
            unequal = own_x != own_y if exact else (x != y) & ~(x.isnan() & y.isnan())
            same = same and not unequal.any()
            group.aa += float(x.square().sum())
            group.bb += float(y.square().sum())
            group.ab += float((x * y).sum())
            group.dd += float(difference.square().sum())
    group.elements += math.prod(entry.shape)
    group.tensors += 1
    if not same:
        group.differing.append(entry.key)


def inspect_checkpoint(config: Config) -> None:
    """Print what `inspect.path` holds and, with `inspect.other`, how it differs from that checkpoint.

    Raises:
        UserError: one of the two is no complete checkpoint, or is not what was written.
    """
    if not config.inspect.path:
        raise UserError("inspect.path is empty: give a checkpoint's directory")
    console = make_console(soft_wrap=True)  # tables fit the terminal, lines are not wrapped
    scratch = ScratchBuffers()
    with open_checkpoint(config.inspect.path, scratch) as source:
        if config.inspect.verify:
            _verify(console, source)
        _print_content(console, source)
        _print_problems(console, source)
        _print_provenance(console, source.path)
        if config.inspect.other:
            with open_checkpoint(config.inspect.other, scratch) as other:
                for each in (source, other):
                    require_plain_weights(each.path, _model_tensors(each))
                if config.inspect.verify:
                    _verify(console, other)
                _print_comparison(console, source, other)
                other.require_unchanged()
        source.require_unchanged()


def _verify(console: Console, source: CheckpointReader) -> None:
    """Verify a checkpoint by the checksums that it has: its manifest's, or else its format's."""
    if manifest.verify_weights(source.path):
        console.print(f"{source.path}: every file is what was written")
    elif compared := source.verify_all():
        console.print(f"{source.path}: {compared:,} bytes of tensors and objects are what was saved")
    else:
        console.print(f"{source.path} has no checksums: damage that keeps the sizes goes unseen")


def _print_content(console: Console, source: CheckpointReader) -> None:
    """Print a table of the tensors by parameter group."""
    table = Table("group", "tensors", "elements", "bytes", "dtypes", title=str(source.path), title_justify="left")
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    dtypes: dict[str, set[str]] = defaultdict(set)
    for entry in source.tensors.values():
        for name in (param_group(entry.key), "all"):
            rows[name].update(tensors=1, elements=math.prod(entry.shape), bytes=entry.nbytes)
            dtypes[name].add(str(entry.dtype).removeprefix("torch."))
    rows["all"] = rows.pop("all", Counter())  # last
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:,}" for c in ("tensors", "elements", "bytes")), ", ".join(sorted(dtypes[name])))
    console.print(table)
    if source.objects:
        console.print(f"{len(source.objects)} objects that are no tensors (such as {next(iter(source.objects))})")


def _model_tensors(source: CheckpointReader) -> dict[str, TensorInfo]:
    """Return a checkpoint's tensors without optimizer and generators."""
    return {key: entry for key, entry in source.tensors.items() if not is_state(key)}


def _print_problems(console: Console, source: CheckpointReader) -> None:
    """Print what keeps other verbs from using a checkpoint: quantised weights, lost tensors."""
    tensors = _model_tensors(source)
    try:
        require_plain_weights(source.path, tensors)
        require_output_layer(source.path, tensors, lambda path: read_vocab_info(path).tied)
        if (model := find_architecture(source.path)) is not None:  # others may still be merged
            require_tensors(source.path, model, critic=VALUE_HEAD.megatron in tensors)
    except UserError as error:
        console.print(f"refused by other verbs: {error}")


def _print_provenance(console: Console, path: Path) -> None:
    """Print how a checkpoint was merged, if it was."""
    if not has_provenance(path):
        console.print("not the output of a merge")
        return
    try:
        _print_recipe(console, parse((path / PROVENANCE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / PROVENANCE} is damaged ({error!r}): restore the checkpoint from a copy") from None


def _print_recipe(console: Console, provenance: dict[str, Any]) -> None:
    """Print recipe and sources of a merge."""
    recipe, versions = provenance["recipe"], provenance["versions"]
    settings = {name: value for name, value in recipe.items() if name not in NON_SETTINGS}
    console.print(
        f"merged {provenance['created']} by megatron_bai {versions['megatron_bai']}, torch {versions['torch']};"
        f" {recipe['method']}: {format_settings(settings)}; fingerprint {provenance['fingerprint'][:16]}"
    )
    for name, values in settings.items():
        for pattern, value in values.items() if name.endswith("_for") else ():
            console.print(f"  {name} {pattern}: {value}")
    for source in provenance["sources"]:
        dropped = ", ".join(f"{len(keys)} entries not used: {why}" for why, keys in source["dropped"].items())
        console.print(f"  {source['coefficient']:.6g} × {source['path']} ({source['digest'][:16]}) {dropped}".rstrip())


def _print_comparison(console: Console, a: CheckpointReader, b: CheckpointReader) -> None:
    """Print how many tensors differ, their names, those that are in one only, and the distances by group."""
    shared = sorted(a.tensors.keys() & b.tensors.keys())
    reshaped = [key for key in shared if a.tensors[key].shape != b.tensors[key].shape]
    groups = compare_checkpoints(a, b)
    differing = sorted([*reshaped, *(key for d in groups.values() for key in d.differing)])
    console.print(f"{len(differing)} of {len(shared)} tensors differ between {a.path} and {b.path}")
    shapes = {key: f": different shapes {a.tensors[key].shape} and {b.tensors[key].shape}" for key in reshaped}
    for key in differing[:_MAX_NAMED]:
        console.print(f"  {key}{shapes.get(key, '')}")
    if len(differing) > _MAX_NAMED:
        console.print(f"  and {len(differing) - _MAX_NAMED} more")
    for one, other in ((a, b), (b, a)):
        only = sorted(one.tensors.keys() - other.tensors.keys())
        if only:
            console.print(f"only in {one.path}: {len(only)} tensors, {', '.join(only[:5])}{' …' if only[5:] else ''}")
    table = Table("group", "tensors", "differing", "‖a − b‖", "‖a − b‖/‖a‖", "cosine", title=f"a − b, b = {b.path}")
    for name, d in groups.items():
        numbers = (f"{d.distance:.6g}", f"{d.relative:.6g}", f"{d.cosine:.8f}")
        table.add_row(name, str(d.tensors), str(len(d.differing)), *numbers)
    console.print(table)
