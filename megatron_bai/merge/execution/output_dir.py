"""The output directory around the tensors: what may be overwritten, what is carried over, and the room it needs."""

import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron_bai.checkpoint.carried_files import (
    CarriedFiles,
    has_provenance,
    is_tokenizer_file,
    list_carried_files,
)
from megatron_bai.checkpoint.output_paths import require_apart
from megatron_bai.errors import UserError
from megatron_bai.merge.execution import journal
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.tensor_names.translated_reader import TranslatedReader, format_of

CARD = "README.md"  # the model card of a Hugging Face checkpoint: the pretrained one's would be wrong


def list_carried(plan: Plan) -> CarriedFiles:
    """List the files of the pretrained checkpoint that the output gets unchanged, and those that it does not get."""
    base = plan.base
    is_translated = isinstance(base, TranslatedReader)
    is_hf = format_of(base) == "hf" or is_translated  # written to it, or from it
    carried = list_carried_files(base.path, base.own_files(), same_format=not is_hf)
    replaced = {CARD} if is_hf else set()
    return CarriedFiles([path for path in carried.names if path.as_posix() not in replaced], carried.left_out)


def carried_sources(plan: Plan) -> dict[Path, Path]:
    """Return the files that the output gets from a source, relative to it, with the directory of that source.

    They are the base's, but for the tokenizer's where the output has another source's.
    """
    base, names = plan.base, list_carried(plan).names
    tokenizer = plan.agreement.tokenizer if plan.agreement else base.path
    if tokenizer == base.path:
        return dict.fromkeys(names, base.path)
    files = {path: base.path for path in names if not is_tokenizer_file(path)}
    files |= {path: tokenizer for path in list_carried_files(tokenizer).names if is_tokenizer_file(path)}
    return dict(sorted(files.items()))


def check_target(target: Path, plan: Plan) -> None:
    """Refuse a target that would overwrite something other than an earlier merge.

    Args:
        target: the directory of the result.
        plan: of the merge.

    Raises:
        UserError: the target is a source, lies in one, or is another kind of directory.
    """
    require_apart(target, "merge.output", [("one of the sources", source) for source in plan.dropped])
    if target.exists() and not has_provenance(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"merge.output {target} exists and is no merge's output: choose another directory")


def bytes_left(plan: Plan, stages: Sequence[Path]) -> int:
    """Count the bytes of all units that unfinished results lack.

    Args:
        plan: of the merge.
        stages: staging directory of each unfinished result; every result has all of the plan's units.

    Returns:
        Bytes of items and objects; headers and indexes are not counted.
    """
    return sum(_bytes_left(plan, stage) for stage in stages)


def _bytes_left(plan: Plan, stage: Path) -> int:
    """Count the bytes of all units that one unfinished result lacks."""
    finished = journal.finished_names(stage)
    return sum(unit.nbytes for unit in plan.units if unit.name not in finished)


def check_space(plan: Plan, stages: Sequence[Path]) -> None:
    """Refuse a merge that the disks cannot hold; what is written already needs no more room.

    Args:
        plan: of the merge.
        stages: staging directory of each unfinished result, which may lie on several file systems.

    Raises:
        UserError: a disk is too small.
    """
    by_device: dict[int, list[Path]] = defaultdict(list)
    for stage in stages:
        by_device[stage.stat().st_dev].append(stage)
    for on_device in by_device.values():
        directory = on_device[0].parent
        needed, free = bytes_left(plan, on_device), shutil.disk_usage(directory).free
        if free < needed:
            raise UserError(f"{directory} has {free:,} bytes free, the merge needs {needed:,}: make room first")
