"""The output directory around the tensors: what may be overwritten, what is carried over, and the room it needs."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_bai.checkpoint.hf_files import SafetensorsReader
from megatron_bai.checkpoint.reader import CheckpointReader
from megatron_bai.errors import UserError
from megatron_bai.merge.execution import journal
from megatron_bai.merge.recipe.plan import Plan

PROVENANCE = "provenance.json"
CONFIG = "config.json"
CARD = "README.md"  # the model card of a Hugging Face checkpoint: the pretrained one's would be wrong


def carried_files(base: CheckpointReader) -> list[Path]:
    """Return the files of the pretrained checkpoint that the output gets unchanged, relative to it."""
    replaced = {PROVENANCE, CARD} if isinstance(base, SafetensorsReader) else {PROVENANCE}
    return [path for path in base.other_files() if path.as_posix() not in replaced]


def check_target(target: Path, plan: Plan) -> None:
    """Refuse a target that would overwrite something other than an earlier merge.

    Args:
        target: the directory of the result.
        plan: of the merge.

    Raises:
        UserError: the target is a source, lies in one, or is another kind of directory.
    """
    for source in plan.dropped:
        if Path(source) in (target, *target.parents):
            raise UserError(f"merge.output {target} is one of the sources or lies inside it: choose another directory")
    if target.exists() and not (target / PROVENANCE).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"merge.output {target} exists and is no merge's output: choose another directory")


def bytes_left(plan: Plan, stages: Sequence[Path]) -> int:
    """Count the bytes of all units that unfinished results lack.

    Args:
        plan: of the merge.
        stages: staging directory of each unfinished result; every result has all of the plan's units.

    Returns:
        Bytes of items and objects; headers and indexes are not counted.
    """
    finished = [journal.finished_names(stage) for stage in stages]
    return sum(unit.nbytes for unit in plan.units for names in finished if unit.name not in names)


def check_space(plan: Plan, stages: Sequence[Path]) -> None:
    """Refuse a merge that the disk cannot hold; what is written already needs no more room.

    Args:
        plan: of the merge.
        stages: staging directory of each unfinished result. The free space is that of the first one's file system.

    Raises:
        UserError: the disk is too small.
    """
    directory = stages[0].parent
    needed, free = bytes_left(plan, stages), shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(f"{directory} has {free:,} bytes free, the merge needs {needed:,}: make room first")
