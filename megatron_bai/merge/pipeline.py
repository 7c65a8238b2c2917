"""The steps of a merge: plan, measure, write, verify, and only then commit the result."""

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

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_bai.checkpoint import atomic_dir, manifest
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.output_paths import resolve_output, validate_directory
from megatron_bai.checkpoint.reader import READ_BYTES, ScratchBuffers
from megatron_bai.config import Merge
from megatron_bai.config.limits import validate_group
from megatron_bai.distributed.rank_group import RankGroup, cores_per_rank
from megatron_bai.errors import PermanentError, UserError
from megatron_bai.merge.execution import executor, journal
from megatron_bai.merge.execution.output_dir import bytes_left, check_space, check_target, list_carried
from megatron_bai.merge.execution.provenance import describe_difference, fingerprint, is_up_to_date, write_provenance
from megatron_bai.merge.execution.slice_stats import slices_to_measure, with_slice_stats
from megatron_bai.merge.execution.thread_pool import gc_disabled
from megatron_bai.merge.execution.tiles import SMALL_TILE, TILE
from megatron_bai.merge.execution.verify import verify_result
from megatron_bai.merge.methods import make_recipes
from megatron_bai.merge.recipe.output_spec import OutputSpec, make_output_spec
from megatron_bai.merge.recipe.plan import ITEM_BYTES, UNIT_BYTES, Plan, make_plan
from megatron_bai.merge.recipe.recipe import Recipe, resolve_sources
from megatron_bai.merge.recipe.regions import Fate
from megatron_bai.merge.recipe.sources_agree import compare_sources, find_repeated
from megatron_bai.merge.recipe.unread import refuse_unread_settings
from megatron_bai.merge.tensor_names.param_groups import matches
from megatron_bai.merge.tensor_names.renamed_view import RenamedView
from megatron_bai.merge.tensor_names.translated_reader import TranslatedReader
from megatron_bai.utils.terminal_text import make_console


@dataclass(frozen=True)
class MergeJob:
    """A merge to do: the recipe, and the directory of its result."""

    recipe: Recipe
    target: Path


def run_merge(settings: Merge, ranks: RankGroup, replace: bool = True) -> str:
    """Merge as the settings say. Collective.

    Args:
        settings: the group `merge`.
        ranks: which share the merge, of `merge_ranks`.
        replace: whether to replace an earlier merge at `merge.output`; else another one is an error.

    Returns:
        A line about the merge, or the plan with `merge.dry_run`.

    Raises:
        UserError: a setting, a source or a target does not allow the merge; the target is unchanged.
    """
    started = time.monotonic()
    jobs = make_jobs(settings)
    output_spec, threads = make_output_spec(settings), choose_threads(settings, jobs, cores_per_rank())
    with gc_disabled(), ExitStack() as stack:
        plan = open_and_plan(jobs, stack, ranks, ITEM_BYTES, output_spec=output_spec)
        refuse_unread_settings(settings, plan)
        if settings.dry_run:
            return format_plan(plan, jobs)
        num_written, num_checked = execute_jobs(plan, jobs, ranks, settings.verify, threads, replace)
    action = "merged" if num_written else "nothing to do, the output holds this merge:"
    size = f"{len(plan.outputs):,} tensors, {plan.bytes_written:,} bytes"
    times = f" {num_written} times" if num_written > 1 else ""
    verified = f", {num_checked:,} elements checked" if num_checked else ""
    differing = "".join(f"; {difference}" for difference in plan.differences)
    if plan.kept:
        size += f", {len(plan.kept)} tensors kept as in the pretrained checkpoint"
    return f"{action} {size}{times} in {time.monotonic() - started:.1f} s{verified}: {settings.output}{differing}"


def make_jobs(settings: Merge) -> list[MergeJob]:
    """Make the jobs that the settings ask for: one, or one for each value of a sweep.

    Paths are resolved, so that a checkpoint named in two ways counts as one.

    Raises:
        UserError: a setting of the method or `merge.output` is wrong.
    """
    validate_group("merge", settings)
    if not settings.output:
        raise UserError("merge.output is empty: give the directory to write")
    pretrained, members = resolve_sources(settings.pretrained, settings.members)
    output = Path(os.path.abspath(settings.output))
    validate_directory(output, "merge.output")
    recipes = make_recipes(dataclasses.replace(settings, members=members, pretrained=pretrained))
    return [MergeJob(recipe, resolve_output(output / name, "merge.output")) for name, recipe in recipes.items()]


def choose_threads(settings: Merge, jobs: Sequence[MergeJob], most: int) -> int:
    """Choose a rank's number of threads: `merge.threads`, or as many as `merge.memory_mib` has room for.

    Args:
        settings: the group `merge`.
        jobs: to merge at once.
        most: upper bound, unless `merge.threads` is set.

    Raises:
        UserError: there is no room for them, or for one.
    """
    bytes_per_thread = buffer_bytes_per_thread(jobs)
    room, least = (settings.memory_mib << 20) // bytes_per_thread, settings.threads or 1
    if room < least:
        needed, plural = math.ceil(least * bytes_per_thread / 2**20), "s" if least > 1 else ""
        raise UserError(
            f"merge.memory_mib is {settings.memory_mib}: at least {needed} are needed with {least} thread{plural}"
        )
    return settings.threads or min(room, most)


def buffer_bytes_per_thread(jobs: Sequence[MergeJob]) -> int:
    """Compute the size of one thread's buffers.

    It reads `READ_BYTES` at a time and a tile that it assembles from several tensors, and holds tiles of all sources or
    of the results in float64; an elementwise method holds both, and intermediate values.
    """
    num_results, recipe = len(jobs), jobs[0].recipe
    num_inputs = 1 + len(recipe.members)
    nbytes = 2 * READ_BYTES + (num_inputs + num_results + 4) * TILE * 8
    if recipe.elementwise:
        nbytes += (3 * num_inputs + num_results + 10) * SMALL_TILE * 8
    return nbytes


def open_and_plan(
    jobs: Sequence[MergeJob],
    stack: ExitStack,
    ranks: RankGroup,
    item_bytes: int = ITEM_BYTES,
    unit_bytes: int = UNIT_BYTES,
    output_spec: OutputSpec | None = None,
) -> Plan:
    """Open every source on every rank, and plan. Collective.

    Args:
        jobs: which differ in the setting that is swept only.
        stack: closes the sources.
        ranks: which share the merge.
        item_bytes: as for `make_plan`.
        unit_bytes: likewise.
        output_spec: likewise.

    Raises:
        UserError: a source cannot be read, or `make_plan` refuses the merge.
    """

    def plan_on_this_rank() -> Plan:
        scratch = ScratchBuffers()
        recipes = [job.recipe for job in jobs]
        paths = [term.source for term in recipes[0].terms()]
        sources = {path: stack.enter_context(open_checkpoint(path, scratch)) for path in paths}
        plan = make_plan(recipes, sources, item_bytes, unit_bytes, output_spec)
        base, *others = map(Path, paths)
        allowed, tokenizer = plan.output_spec.allow_different, plan.output_spec.tokenizer
        agreement = compare_sources(base, others, allowed, tokenizer)
        repeated = find_repeated(recipes[0].pretrained, recipes[0].members)
        agreement = dataclasses.replace(agreement, differences=(*repeated, *agreement.differences))
        return dataclasses.replace(plan, agreement=agreement, sources=tuple(sources.values()))

    plans: list[Plan] = []
    ranks.run_on_all(lambda: plans.append(plan_on_this_rank()))
    return plans[0]


def execute_jobs(
    plan: Plan,
    jobs: Sequence[MergeJob],
    ranks: RankGroup,
    check: str = "sample",
    threads: int = 1,
    replace: bool = True,
) -> tuple[int, int]:
    """Execute a plan: a target either ends complete and verified, or is unchanged. Collective.

    After an error or a kill the units finished until then stay beside the target, and the same merge resumes from them.

    Args:
        plan: of all jobs.
        jobs: one for each of the plan's results.
        ranks: which share the merge.
        check: `none`, `sample` or `all`: how much of the results is compared with the formula.
        threads: number of threads of this rank.
        replace: whether to replace earlier merges at the targets; else another one is an error.

    Returns:
        The number of targets written, where the others are up to date, and the number of elements compared.

    Raises:
        PermanentError: these sources cannot be merged, or a result is not what it should be; nothing stays.
        UserError: a source or a target does not allow the merge, or another process writes a target.
    """
    stats = ranks.run_on_first(lambda: {str(source.path): source.stat_fingerprint() for source in plan.inputs})
    fingerprints = ranks.run_on_first(lambda: [fingerprint(plan, k, stats) for k in range(len(jobs))])
    with ExitStack() as stack:
        needs_writing = functools.partial(_needs_writing, plan, stack, replace)
        pending = ranks.run_on_first(lambda: [k for k, job in enumerate(jobs) if needs_writing(job, fingerprints[k])])
        if not pending:
            return 0, 0
        jobs, fingerprints = [jobs[k] for k in pending], [fingerprints[k] for k in pending]
        weights, recipes = tuple(plan.input_weights[k] for k in pending), tuple(plan.recipes[k] for k in pending)
        plan = dataclasses.replace(plan, input_weights=weights, recipes=recipes)
        try:
            return len(jobs), _write_targets(plan, jobs, fingerprints, ranks, check, threads)
        except Exception as error:
            if ranks.rank == 0:
                _handle_failure(plan, [atomic_dir.staging_path(job.target) for job in jobs], error)
            raise


def _needs_writing(plan: Plan, stack: ExitStack, replace: bool, job: MergeJob, input_fingerprint: str) -> bool:
    """Return whether the job's target must be written; it is locked then until `stack` is closed."""
    target, staging = job.target, atomic_dir.staging_path(job.target)
    resumable = (staging / journal.DIRECTORY).is_dir()
    if is_up_to_date(target, input_fingerprint) and (resumable or not atomic_dir.has_leftovers(target)):
        return False
    check_target(target, plan)
    stack.enter_context(atomic_dir.lock(target))
    if is_up_to_date(target, input_fingerprint):
        atomic_dir.remove_leftovers(target)  # a merge was killed after it had committed its result
        return False
    if not replace and manifest.read_info(target) is not None:
        raise UserError(
            f"merge.output {target} holds another merge, {describe_difference(target, job.recipe)}: remove it, choose"
            " another merge.output, or replace it with the verb merge"
        )
    if is_up_to_date(staging, input_fingerprint):  # … just before
        shutil.rmtree(staging / journal.DIRECTORY, ignore_errors=True)
        atomic_dir.commit(target)
        return False
    return True


def _write_targets(
    plan: Plan, jobs: Sequence[MergeJob], fingerprints: Sequence[str], ranks: RankGroup, check: str, threads: int
) -> int:
    """Write, verify and commit every target; return the number of elements compared."""
    marks = [f"{input_fingerprint} {plan.layout_hash()}" for input_fingerprint in fingerprints]

    def open_directories() -> list[Path]:
        return [journal.open_staging_dir(job.target, mark) for job, mark in zip(jobs, marks, strict=True)]

    directories = ranks.run_on_first(open_directories, jobs[0].target)
    ranks.run_on_first(lambda: check_space(plan, directories))
    plan, norms = _measure_and_merge(plan, directories, ranks, threads)
    digests = {str(source.path): source.verify_records(plan.keys_read(source), ranks) for source in plan.inputs}
    num_checked, result_fingerprints = 0, []
    for k, (job, directory) in enumerate(zip(jobs, directories, strict=True)):
        write = functools.partial(write_provenance, directory, job.recipe, plan, digests, k, norms[k])
        result_fingerprints.append(ranks.run_on_first(write, directory))
        if check != "none":
            with open_checkpoint(directory) as written:
                num_checked += verify_result(plan, k, written, ranks, check_all=check == "all")

    def require_unchanged() -> None:
        for source in plan.sources:
            source.require_unchanged()

    ranks.run_on_all(require_unchanged)

    def finalize(k: int) -> None:
        info = manifest.read_info(plan.base.path) or {}
        merge_info = {"fingerprint": result_fingerprints[k], "mark": fingerprints[k]}
        crcs = journal.file_crcs(directories[k])
        manifest.finalize(directories[k], jobs[k].target, {**info, "merge": merge_info}, crcs, journal.DIRECTORY)

    for k, directory in enumerate(directories):
        ranks.run_on_first(functools.partial(finalize, k), directory)
    return num_checked


def _measure_and_merge(
    plan: Plan, directories: Sequence[Path], ranks: RankGroup, threads: int
) -> tuple[Plan, list[dict[str, float]]]:
    """Measure slices where the method needs that, and merge; return the plan with the statistics, and the norms."""
    slices = slices_to_measure(plan)
    bytes_a_pass = len(plan.inputs) * sum(item.nbytes for item in executor.assign_to_rank(slices, ranks))
    with _progress_bar("measuring", plan.recipes[0].stats_passes * bytes_a_pass, ranks) as on_bytes_read:
        plan = with_slice_stats(plan, slices, ranks, on_bytes_read, threads)
    written_here = sum(unit.nbytes for unit in executor.assign_to_rank(plan.units, ranks))
    fraction = written_here / max(plan.bytes_written, 1)
    with _progress_bar("merging", int(plan.bytes_read * fraction), ranks) as on_bytes_read:
        return plan, executor.execute_plan(plan, directories, ranks, on_bytes_read, threads)


def _handle_failure(plan: Plan, directories: Sequence[Path], error: Exception) -> None:
    """Remove what no merge can resume from, or say what stays and what is missing.

    Raises:
        UserError: in place of one: its message, and how to resume.
    """
    directories = [directory for directory in directories if directory.is_dir()]  # of a sweep some may be committed
    missing = bytes_left(plan, directories)
    finished = plan.bytes_written * len(directories) - missing
    if isinstance(error, PermanentError) or not finished:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
        return
    if isinstance(error, UserError):
        short = missing - shutil.disk_usage(directories[0].parent).free
        room = f", which takes {short:,} bytes more than are free" if short > 0 else ""
        raise UserError(
            f"{error}; {finished:,} bytes are finished and kept: run the merge again, it goes on with the other"
            f" {missing:,}{room}"
        ) from None


@contextmanager
def _progress_bar(label: str, total: int, ranks: RankGroup) -> Iterator[Callable[[int], None]]:
    """Show a bar of the bytes that this rank reads, on rank 0 of a terminal; none where there is nothing to do."""
    console = make_console(stderr=True)
    columns = (
        TextColumn(label, markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=ranks.rank > 0 or not (total and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def format_plan(plan: Plan, jobs: Sequence[MergeJob]) -> str:
    """Format what a merge would do, without reading a tensor.

    Args:
        plan: of all jobs.
        jobs: one for each of the plan's results.
    """
    lines = [line for job in jobs for line in _format_job(plan, job)]
    views = (RenamedView, TranslatedReader)
    lines += [f"read under other names or shapes: {source.path}" for source in plan.inputs if isinstance(source, views)]
    for path, reasons in plan.dropped.items():
        lines += [
            f"not used of {path}, {reason}: {len(keys)} entries such as {keys[0]}" for reason, keys in reasons.items()
        ]
    if left_out := list_carried(plan).describe_left_out(plan.base.path):
        lines.append(left_out)
    lines += map(str, plan.differences)
    num_merged = sum(output.merged for output in plan.outputs.values())
    num_equal = len(plan.outputs) - num_merged
    num_objects = sum(len(unit.objects) for unit in plan.units)
    times = f"{len(jobs)} times " if len(jobs) > 1 else ""
    lines += [
        f"{num_merged} tensors merged, {num_equal} must be equal and are copied, {num_objects} objects carried",
        f"reads {plan.bytes_read:,} bytes, writes {times}{plan.bytes_written:,} bytes in {len(plan.units)} units",
    ]
    return "\n".join(lines)


def _format_job(plan: Plan, job: MergeJob) -> Iterator[str]:
    """Yield the lines about one result: its terms, and the regions that have other ones."""
    yield f"{job.target}: {job.recipe.method}, {job.recipe.summarize()}"
    yield from (f"    {term.coefficient:.9g} × {term.source}" for term in job.recipe.terms())
    for region in chain(*plan.regions.values()):
        if region.fate is Fate.KEPT:
            yield f"    {region.name}: kept as in {plan.base.path}"
        elif any(matches(pattern, region.key, region.layer) for pattern in job.recipe.patterns):
            terms = job.recipe.terms(region.key, region.layer)
            yield f"    {region.name}: {', '.join(f'{term.coefficient:.9g}' for term in terms)}"
