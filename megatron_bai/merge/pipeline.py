"""`megatron-bai merge`: plan, check, write, verify, and only then move the result into place."""

import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.reader import READ_BYTES, ScratchBuffers
from megatron_bai.config import Config, Merge
from megatron_bai.distributed.rank_group import RankGroup, cores_per_rank, merge_ranks
from megatron_bai.errors import PermanentError, UserError
from megatron_bai.merge.execution import executor, journal
from megatron_bai.merge.execution.output_dir import bytes_left, check_space, check_target
from megatron_bai.merge.execution.provenance import describe_difference, fingerprint, is_up_to_date, write_provenance
from megatron_bai.merge.execution.slice_stats import slices_to_measure, with_slice_stats
from megatron_bai.merge.execution.thread_pool import gc_disabled
from megatron_bai.merge.execution.tiles import SMALL_TILE, TILE
from megatron_bai.merge.execution.verify import verify_result
from megatron_bai.merge.methods import make_recipes
from megatron_bai.merge.recipe.output_spec import OutputSpec, make_output_spec
from megatron_bai.merge.recipe.plan import ITEM_BYTES, UNIT_BYTES, Plan, make_plan
from megatron_bai.merge.recipe.recipe import Recipe
from megatron_bai.merge.recipe.regions import Fate
from megatron_bai.merge.tensor_names.param_groups import matches
from megatron_bai.merge.tensor_names.renamed_view import RenamedView

VERIFY = ("none", "sample", "all")


@dataclass(frozen=True)
class MergeJob:
    """A merge to do: the recipe, and the directory that is to hold its result."""

    recipe: Recipe
    target: Path


def run(config: Config) -> None:
    """Merge as `config.merge` says, under torchrun or alone, and print one line about it.

    Raises:
        UserError: a setting, a source or a target does not allow the merge; the target is as it was.
    """
    with merge_ranks() as group:
        run_merge(config.merge, group)


def run_merge(settings: Merge, group: RankGroup, replace: bool = True) -> None:
    """Merge as the settings say, and print one line about it. Every rank calls it.

    Args:
        replace: an earlier merge at `merge.output`; else one made otherwise is an error.

    Raises:
        UserError: as `run`.
    """
    started = time.monotonic()
    jobs = make_jobs(settings)
    if settings.verify not in VERIFY:
        raise UserError(f"merge.verify is {settings.verify!r}: choose one of {', '.join(VERIFY)}")
    output_spec, threads = make_output_spec(settings), choose_threads(settings, jobs, cores_per_rank())
    with gc_disabled(), ExitStack() as stack:
        work = open_and_plan(jobs, stack, group, ITEM_BYTES, output_spec=output_spec)
        if settings.dry_run:
            group.run_on_first(lambda: print_plan(work, jobs))
            return
        written, checked = execute_jobs(work, jobs, group, settings.verify, threads, replace)
    if group.rank == 0:
        what = "merged" if written else "nothing to do, the output holds this merge:"
        size = f"{len(work.outputs):,} tensors, {work.bytes_written:,} bytes"
        times = f" {written} times" if written > 1 else ""
        verified = f", {checked:,} elements checked" if checked else ""
        print(f"{what} {size}{times} in {time.monotonic() - started:.1f} s{verified}: {settings.output}")


def make_jobs(settings: Merge) -> list[MergeJob]:
    """The merges that the settings ask for: one, or one for each value of a sweep.

    Paths are resolved, so that a checkpoint named in two ways counts as one.
    """
    if not settings.output:
        raise UserError("merge.output is empty: give the directory to write")
    members = [os.path.realpath(m) if m else "" for m in settings.members]
    pretrained = os.path.realpath(settings.pretrained) if settings.pretrained else ""
    output = Path(os.path.abspath(settings.output))
    recipes = make_recipes(dataclasses.replace(settings, members=members, pretrained=pretrained))
    return [MergeJob(recipe, output / name) for name, recipe in recipes.items()]


def choose_threads(settings: Merge, jobs: Sequence[MergeJob], most: int) -> int:
    """How many threads a rank has: `merge.threads`, or as many as `merge.memory_mib` has room for, `most` at most.

    Raises:
        UserError: there is no room for them, or for one.
    """
    each = buffer_bytes_per_thread(jobs)
    room, least = (settings.memory_mib << 20) // each, settings.threads or 1
    if room < least:
        needed, plural = math.ceil(least * each / 2**20), "s" if least > 1 else ""
        raise UserError(
            f"merge.memory_mib is {settings.memory_mib}: at least {needed} are needed with {least} thread{plural}"
        )
    return settings.threads or min(room, most)


def buffer_bytes_per_thread(jobs: Sequence[MergeJob]) -> int:
    """The buffers of one thread.

    It reads a span, and a tile that it puts together from several tensors, and holds tiles of all sources or of the
    sums in float64; an elementwise method holds both, and what its arithmetic leaves between.
    """
    sums, recipe = len(jobs), jobs[0].recipe
    inputs = 1 + len(recipe.members)
    size = 2 * READ_BYTES + (inputs + sums + 4) * TILE * 8
    if recipe.elementwise:
        size += (3 * inputs + sums + 10) * SMALL_TILE * 8
    return size


def open_and_plan(
    jobs: Sequence[MergeJob],
    stack: ExitStack,
    group: RankGroup,
    item_bytes: int = ITEM_BYTES,
    unit_bytes: int = UNIT_BYTES,
    output_spec: OutputSpec | None = None,
) -> Plan:
    """Open every source on every rank and plan. The jobs differ in what is swept only. `stack` closes the sources."""

    def work() -> Plan:
        scratch = ScratchBuffers()
        recipes = [job.recipe for job in jobs]
        paths = [term.source for term in recipes[0].terms()]
        sources = {path: stack.enter_context(open_checkpoint(path, scratch)) for path in paths}
        return make_plan(recipes, sources, item_bytes, unit_bytes, output_spec)

    plans: list[Plan] = []
    group.run_on_all(lambda: plans.append(work()))
    return plans[0]


def execute_jobs(
    work: Plan, jobs: Sequence[MergeJob], group: RankGroup, check: str = "sample", threads: int = 1, replace: bool = True
) -> tuple[int, int]:
    """Execute a plan: a target either ends complete and checked, or stays as it was. Every rank calls it.

    Whatever stops it, the units finished until then are kept beside the target, and the same merge goes on from there.

    Args:
        jobs: one for each of the plan's sums.
        check: `none`, `sample` or `all`: how much of the written checkpoints is compared with the formula.
        threads: of this rank.
        replace: earlier merges in the targets' place; else one made otherwise is an error.

    Returns:
        how many targets were written, the others being up to date, and how many elements were compared.

    Raises:
        PermanentError: these sources cannot be merged, or a result is not what it should be; nothing is kept.
        UserError: a source or a target does not allow the merge, or another process writes a target.
    """
    identities = group.run_on_first(lambda: {str(source.path): source.stat_fingerprint() for source in work.inputs})
    marks = group.run_on_first(lambda: [fingerprint(work, k, identities) for k in range(len(jobs))])
    with ExitStack() as stack:
        is_to_do = functools.partial(_needs_writing, work, stack, replace)
        todo = group.run_on_first(lambda: [k for k, job in enumerate(jobs) if is_to_do(job, marks[k])])
        if not todo:
            return 0, 0
        jobs, marks = [jobs[k] for k in todo], [marks[k] for k in todo]
        weights, recipes = tuple(work.input_weights[k] for k in todo), tuple(work.recipes[k] for k in todo)
        work = dataclasses.replace(work, input_weights=weights, recipes=recipes)
        try:
            return len(jobs), _write(work, jobs, marks, group, check, threads)
        except Exception as error:
            if group.rank == 0:
                _handle_failure(work, [atomic_dir.staging_path(job.target) for job in jobs], error)
            raise


def _needs_writing(work: Plan, stack: ExitStack, replace: bool, job: MergeJob, mark: str) -> bool:
    """Whether the job's target must be written, which then nobody else may until `stack` is closed."""
    target = job.target
    resumable = (atomic_dir.staging_path(target) / journal.DIRECTORY).is_dir()
    if is_up_to_date(target, mark) and (resumable or not atomic_dir.has_leftovers(target)):
        return False
    check_target(target, work)
    stack.enter_context(atomic_dir.lock(target))
    if is_up_to_date(target, mark):
        atomic_dir.remove_leftovers(target)  # a merge was killed after it had put its result in place
        return False
    if not replace and manifest.read_info(target) is not None:
        raise UserError(
            f"merge.output {target} holds another merge, {describe_difference(target, job.recipe)}: remove it, choose another "
            "merge.output, or replace it with the verb merge"
        )
    if is_up_to_date(atomic_dir.staging_path(target), mark):  # … just before
        shutil.rmtree(atomic_dir.staging_path(target) / journal.DIRECTORY, ignore_errors=True)
        atomic_dir.commit(target)
        return False
    return True


def _write(
    work: Plan, jobs: Sequence[MergeJob], marks: Sequence[str], group: RankGroup, check: str, threads: int
) -> int:
    """Write, prove, check and seal every target; returns how many elements were compared."""
    checked, cut = 0, work.layout_hash()

    def stage() -> list[Path]:
        return [journal.open_staging_dir(job.target, f"{mark} {cut}") for job, mark in zip(jobs, marks, strict=True)]

    directories = group.run_on_first(stage, jobs[0].target)
    group.run_on_first(lambda: check_space(work, directories))
    slices = slices_to_measure(work)
    total = work.recipes[0].stats_passes * len(work.inputs) * sum(s.nbytes for s in executor.assign_to_rank(slices, group))
    with _progress("measuring", total, group) as on_bytes_read:
        work = with_slice_stats(work, slices, group, on_bytes_read, threads)
    share = sum(unit.nbytes for unit in executor.assign_to_rank(work.units, group)) / max(work.bytes_written, 1)
    with _progress("merging", int(work.bytes_read * share), group) as on_bytes_read:
        norms = executor.execute_plan(work, directories, group, on_bytes_read, threads)
    digests = {str(source.path): source.verify_records(work.outputs, group) for source in work.inputs}
    prints = []
    for k, (job, directory) in enumerate(zip(jobs, directories, strict=True)):
        note = functools.partial(write_provenance, directory, job.recipe, work, digests, k, norms[k])
        prints.append(group.run_on_first(note, directory))
        if check != "none":
            with open_checkpoint(directory) as written:
                checked += verify_result(work, k, written, group, check_all=check == "all")

    def seal(k: int) -> None:
        info = manifest.read_info(work.base.path) or {}
        about = {**info, "merge": {"fingerprint": prints[k], "mark": marks[k]}}
        sums = journal.file_crcs(directories[k])
        manifest.finalize(directories[k], jobs[k].target, about, sums, journal.DIRECTORY)

    for k, directory in enumerate(directories):
        group.run_on_first(functools.partial(seal, k), directory)
    return checked


def _handle_failure(work: Plan, stages: Sequence[Path], error: Exception) -> None:
    """After an error: delete what nothing can go on from, or say what is kept and what is missing.

    Raises:
        UserError: in place of one: it, and how to go on.
    """
    stages = [stage for stage in stages if stage.is_dir()]  # of a sweep some may be in place
    left = bytes_left(work, stages)
    kept = work.bytes_written * len(stages) - left
    if isinstance(error, PermanentError) or not kept:
        for stage in stages:
            shutil.rmtree(stage, ignore_errors=True)
        return
    if isinstance(error, UserError):
        short = left - shutil.disk_usage(stages[0].parent).free
        room = f", which takes {short:,} bytes more than are free" if short > 0 else ""
        raise UserError(
            f"{error}; {kept:,} bytes are finished and kept: run the merge again, it goes on with the other"
            f" {left:,}{room}"
        ) from None


@contextmanager
def _progress(what: str, total: int, group: RankGroup) -> Iterator[Callable[[int], None]]:
    """A bar of the bytes this rank reads, on rank 0 of a terminal; none where there is nothing to do."""
    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=group.rank > 0 or not (total and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def print_plan(work: Plan, jobs: Sequence[MergeJob]) -> None:
    """Print the plan; nothing of a tensor has been read."""
    for job in jobs:
        print(f"{job.target}: {job.recipe.method}, {job.recipe.summarize()}")
        for term in job.recipe.terms():
            print(f"    {term.coefficient:.9g} × {term.source}")
        for region in chain(*work.regions.values()):
            if region.fate is Fate.KEPT:
                print(f"    {region.name}: kept as in {work.base.path}")
            elif any(matches(pattern, region.key, region.layer) for pattern in job.recipe.patterns):
                terms = job.recipe.terms(region.key, region.layer)
                print(f"    {region.name}: {', '.join(f'{term.coefficient:.9g}' for term in terms)}")
    for source in work.inputs:
        if isinstance(source, RenamedView):
            print(f"read under other names or shapes: {source.path}")
    for path, reasons in work.dropped.items():
        for reason, keys in reasons.items():
            print(f"not used of {path}, {reason}: {len(keys)} entries such as {keys[0]}")
    merged = sum(output.merged for output in work.outputs.values())
    objects = sum(len(unit.objects) for unit in work.units)
    equal = len(work.outputs) - merged
    print(f"{merged} tensors merged, {equal} must be equal and are copied, {objects} objects carried")
    times = f"{len(jobs)} times " if len(jobs) > 1 else ""
    print(f"reads {work.bytes_read:,} bytes, writes {times}{work.bytes_written:,} bytes in {len(work.units)} units")
