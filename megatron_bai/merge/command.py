"""`megatron-bai merge`: plan, check, write, verify, and only then move the result into place."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_bai.config import Config, Merge
from megatron_bai.errors import UserError
from megatron_bai.merge import engine
from megatron_bai.merge.formats import open_source
from megatron_bai.merge.output import check_target, fingerprint, is_current, write_provenance
from megatron_bai.merge.plan import PIECE_BYTES, UNIT_BYTES, Plan, plan
from megatron_bai.merge.ranks import Ranks, ranks
from megatron_bai.merge.recipe import Recipe
from megatron_bai.merge.sources import SPAN_BYTES, Scratch
from megatron_bai.merge.verify import verify
from megatron_bai.model import manifest

VERIFY = ("none", "sample", "all")


@dataclass(frozen=True)
class Outcome:
    """What a merge did. `written` is False where the target already held the result."""

    written: bool
    tensors: int
    nbytes: int
    checked: int  # elements compared with the formula


def run(config: Config) -> None:
    """Merge as `config.merge` says, under torchrun or alone, and print one line about it.

    Raises:
        UserError: a setting, a source or the target does not allow the merge; the target is as it was.
    """
    started = time.monotonic()
    settings = config.merge
    recipe = recipe_of(settings)
    if not settings.output:
        raise UserError("merge.output is empty: give the directory to write")
    if settings.verify not in VERIFY:
        raise UserError(f"merge.verify is {settings.verify!r}: choose one of {', '.join(VERIFY)}")
    with ranks() as group, ExitStack() as stack:
        work = prepare(recipe, stack, group, piece_bytes(settings.memory_mib))
        if settings.dry_run:
            group.first(lambda: describe(work, recipe, Path(settings.output)))
            return
        outcome = merge(work, recipe, Path(settings.output), group, settings.verify)
    if group.rank == 0:
        seconds = time.monotonic() - started
        checked = f", {outcome.checked:,} elements checked" if outcome.checked else ""
        what = "merged" if outcome.written else "nothing to do, the output holds this merge:"
        size = f"{outcome.tensors:,} tensors, {outcome.nbytes:,} bytes"
        print(f"{what} {size} in {seconds:.1f} s{checked}: {settings.output}")


def recipe_of(settings: Merge) -> Recipe:
    """The recipe with its paths resolved, so that a checkpoint named in two ways counts as one."""
    members = tuple(os.path.realpath(m) if m else "" for m in settings.members)
    pretrained = os.path.realpath(settings.pretrained) if settings.pretrained else ""
    return Recipe(pretrained, members, tuple(settings.weights), settings.alpha)


def piece_bytes(memory_mib: int) -> int:
    """The largest output item that keeps a rank's buffers within `memory_mib`.

    A rank holds one item, `torch.save`'s copy of it, and scratch memory for reading (two spans) and adding (16 MiB).

    Raises:
        UserError: there is no room for an item.
    """
    scratch = 2 * SPAN_BYTES + (16 << 20)
    room = ((memory_mib << 20) - scratch) // 2
    if room < 1 << 20:
        raise UserError(f"merge.memory_mib is {memory_mib}: at least {(scratch >> 20) + 2} are needed")
    return min(room, PIECE_BYTES)


def prepare(
    recipe: Recipe, stack: ExitStack, group: Ranks, piece: int = PIECE_BYTES, unit: int = UNIT_BYTES
) -> Plan:
    """Open every source on every rank and plan. `stack` closes them."""

    def work() -> Plan:
        scratch = Scratch()
        terms = recipe.terms()
        sources = {term.source: stack.enter_context(open_source(term.source, scratch)) for term in terms}
        return plan(terms, sources, piece, unit)

    plans: list[Plan] = []
    group.together(lambda: plans.append(work()))
    return plans[0]


def merge(work: Plan, recipe: Recipe, target: Path, group: Ranks, check: str = "sample") -> Outcome:
    """Execute a plan: the target either ends complete and checked, or stays as it was. Every rank calls it.

    Args:
        check: `none`, `sample` or `all`: how much of the written checkpoint is compared with the formula.

    Raises:
        UserError: a source or the target does not allow the merge, or the result is not what it should be.
    """
    target = Path(os.path.abspath(target))
    digests = _digests(work, recipe, group)
    mark = group.first(lambda: fingerprint(work, digests))
    if group.first(lambda: is_current(target, mark)):
        return Outcome(False, len(work.outputs), work.bytes_written, 0)
    group.first(lambda: check_target(target, work))
    stage = group.first(lambda: manifest.staging(target))
    try:
        with _progress(work, group) as advance:
            norms = engine.execute(work, stage, group, advance)
        group.first(lambda: write_provenance(stage, recipe, work, digests, mark, norms))
        checked = 0
        if check != "none":
            with open_source(stage) as written:
                checked = verify(work, written, group, everything=check == "all")
        info = manifest.read(work.base.path) or {}
        group.first(lambda: manifest.seal(stage, target, {**info, "merge": {"fingerprint": mark}}))
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(stage, ignore_errors=True)
        raise
    return Outcome(True, len(work.outputs), work.bytes_written, checked)


def _digests(work: Plan, recipe: Recipe, group: Ranks) -> dict[str, str]:
    """The content hash of every source that enters, by path; the ranks share the sources."""
    sources = {str(source.path): source for source in (work.base, *(source for source, _ in work.inputs))}
    mine = list(sources)[group.rank :: group.size]
    shares = group.together(lambda: {path: sources[path].digest(work.outputs) for path in mine})
    found = {path: digest for share in shares for path, digest in share.items()}
    return {path: found[path] for path in sources}


@contextmanager
def _progress(work: Plan, group: Ranks) -> Iterator[Callable[[int], None]]:
    """A bar of the bytes this rank reads, on rank 0 of a terminal."""
    console = Console(stderr=True)
    share = sum(unit.nbytes for unit in engine.share(work.units, group)) / max(work.bytes_written, 1)
    columns = TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=group.rank > 0 or not console.is_terminal) as bar:
        task = bar.add_task("merge", total=int(work.bytes_read * share))
        yield lambda count: bar.advance(task, count)


def describe(work: Plan, recipe: Recipe, target: Path) -> None:
    """Print the plan; nothing of a tensor has been read."""
    for term in recipe.terms():
        print(f"{term.coefficient:.9g} × {term.source}")
        for reason, keys in work.dropped[term.source].items():
            print(f"    not used, {reason}: {len(keys)} entries such as {keys[0]}")
    merged = sum(output.merged for output in work.outputs.values())
    objects = sum(len(unit.objects) for unit in work.units)
    equal = len(work.outputs) - merged
    print(f"{merged} tensors merged, {equal} must be equal and are copied, {objects} objects carried")
    print(f"reads {work.bytes_read:,} bytes, writes {work.bytes_written:,} bytes in {len(work.units)} files to {target}")
