"""The output directory around the tensors: what is carried over, what is noted, and whether there is anything to do."""

import dataclasses
import datetime
import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import megatron_bai
from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.hf_files import SafetensorsReader
from megatron_bai.checkpoint.reader import CheckpointReader
from megatron_bai.errors import UserError
from megatron_bai.merge.execution import journal
from megatron_bai.merge.recipe.output_spec import config_with_dtype
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.recipe import Recipe
from megatron_bai.merge.recipe.regions import Fate, Region
from megatron_bai.merge.tensor_names.param_groups import matches

PROVENANCE = "provenance.json"
CONFIG = "config.json"
CARD = "README.md"  # the model card of a Hugging Face checkpoint: the pretrained one's would be wrong
REVISION = 1  # of the merge's definition: raised when the same inputs would give other tensors


def carried_files(base: CheckpointReader) -> list[Path]:
    """Files of the pretrained checkpoint that the output gets unchanged, relative to it."""
    replaced = {PROVENANCE, CARD} if isinstance(base, SafetensorsReader) else {PROVENANCE}
    return [path for path in base.other_files() if path.as_posix() not in replaced]


def fingerprint(plan: Plan, result_index: int, sources: dict[str, str]) -> str:
    """A hash of everything an output depends on, whatever the paths are called.

    Args:
        result_index: the number of the plan's sum.
        sources: by path, what stands for each source's tensors: `identity` before reading, `prove`'s hash after.
    """
    base, rows = plan.base, plan.input_weights[result_index]
    used = [i for i in range(len(plan.inputs)) if any(row[i] != 0 for row in rows.values())]
    what = {
        "revision": REVISION,
        "inputs": [sources[str(plan.inputs[i].path)] for i in used],
        "layout": [(key, [(c.offsets, c.sizes) for c in base.tensors[key].chunks]) for key in plan.outputs],
        "outputs": [
            (r.name, str(r.dtype), [rows[r.name][i] for i in used] if r.name in rows else r.fate.value)
            for parts in plan.regions.values()
            for r in parts
        ],
        "recipe": plan.recipes[result_index].fingerprint_fields(),
        "places": used if plan.recipes[result_index].elementwise else None,
        "kept": sources[str(base.path)] if plan.has_kept_rows else None,
        "form": dataclasses.astuple(dataclasses.replace(plan.output_spec, dtype=None)),
        "objects": [
            (key, hashlib.sha256(base.read_object(key)).hexdigest()) for unit in plan.units for key in unit.objects
        ],
        "files": [
            (path.as_posix(), hashlib.sha256((base.path / path).read_bytes()).hexdigest())
            for path in carried_files(base)
        ],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def check_target(target: Path, plan: Plan) -> None:
    """Refuse a target that would overwrite something other than an earlier merge.

    Raises:
        UserError: the target is a source, lies in one, or is another kind of directory.
    """
    for source in plan.dropped:
        if Path(source) in (target, *target.parents):
            raise UserError(f"merge.output {target} is one of the sources or lies inside it: choose another directory")
    if target.exists() and not (target / PROVENANCE).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"merge.output {target} exists and is no merge's output: choose another directory")


def bytes_left(plan: Plan, stages: Sequence[Path]) -> int:
    """The bytes of all units that unfinished outputs lack."""
    finished = [journal.finished_names(stage) for stage in stages]
    return sum(unit.nbytes for unit in plan.units for names in finished if unit.name not in names)


def check_space(plan: Plan, stages: Sequence[Path]) -> None:
    """Refuse to begin what the disk cannot hold; what an unfinished merge has written already needs no more room.

    Raises:
        UserError: the disk is too small.
    """
    place = stages[0].parent
    needed, free = bytes_left(plan, stages), shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{place} has {free:,} bytes free, the merge needs {needed:,}: make room first")


def is_up_to_date(target: Path, mark: str) -> bool:
    """Whether `target` is complete and was written by a merge with this mark."""
    try:
        info = manifest.read_info(target)
    except UserError:
        return False  # damaged: merge again
    return info is not None and info.get("merge", {}).get("mark") == mark


def describe_difference(target: Path, recipe: Recipe) -> str:
    """What the merge at `target` did otherwise than this recipe, in a few words, by its provenance."""
    try:
        noted = json.loads((target / PROVENANCE).read_text())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"whose {PROVENANCE} cannot be read"
    described = json.loads(json.dumps(recipe.describe()))
    for name in (name for name in described if name != "terms"):
        if noted.get(name) != described[name]:
            return f"with merge.{name} {noted.get(name)} instead of {described[name]}"
    return "of sources that have changed since, or in another form"


def write_provenance(
    stage: Path, recipe: Recipe, plan: Plan, digests: dict[str, str], result_index: int, norms: dict[str, float]
) -> str:
    """Copy the carried files and write `provenance.json`: everything one needs to check or repeat the merge.

    Args:
        digests: of the tensors of every source that was read, by path.
        result_index: the number of the plan's sum.

    Returns:
        the output's fingerprint.
    """
    for path in carried_files(plan.base):
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base.path / path, stage / path)
    if plan.output_spec.dtype is not None and (stage / CONFIG).is_file():
        (stage / CONFIG).write_text(config_with_dtype((stage / CONFIG).read_text(), plan.output_spec.dtype))
    coefficients = {term.source: term.coefficient for term in recipe.terms()}
    sources = [
        {"path": path, "coefficient": coefficient, "digest": digests.get(path), "dropped": plan.dropped[path]}
        for path, coefficient in coefficients.items()
        if path in digests or path == str(plan.base.path)  # of a base with coefficient 0, only the layout was used
    ]
    mark = fingerprint(plan, result_index, digests)
    tensors: dict[str, Any] = {}
    for o in plan.outputs.values():
        about = {"dtype": str(o.dtype).removeprefix("torch."), "shape": o.shape}
        norm = {"norm": norms[o.key]} if o.merged else {}
        parts = [_about(region, recipe) for region in plan.regions[o.key]]
        tensors[o.key] = about | norm | (parts[0] if len(parts) == 1 else {"fate": "by rows", "rows": parts})
    text: dict[str, Any] = {
        "fingerprint": mark,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recipe": recipe.describe(),
        "sources": sources,
        "carried_files": [path.as_posix() for path in carried_files(plan.base)],
        "carried_objects": [key for unit in plan.units for key in unit.objects],
        "versions": {
            "megatron_bai": megatron_bai.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "tensors": tensors,
    }
    (stage / PROVENANCE).write_text(json.dumps(text, indent=1) + "\n")
    if isinstance(plan.base, SafetensorsReader):
        (stage / CARD).write_text(model_card(recipe))
    return mark


def _about(region: Region, recipe: Recipe) -> dict[str, Any]:
    """A region's fate, its rows where it is a part of its tensor, and its coefficients where a pattern gave them."""
    about: dict[str, Any] = {"fate": region.fate.value}
    if region.box[1] != region.output.shape:
        about["rows"] = [region.box[0][0], region.box[0][0] + region.box[1][0]]
    if region.fate is Fate.MERGED and any(matches(pattern, region.key, region.layer) for pattern in recipe.patterns):
        about["coefficients"] = [term.coefficient for term in recipe.terms(region.key, region.layer)]
    return about


def model_card(recipe: Recipe) -> str:
    """What Hugging Face shows of a merged model."""
    names = [Path(term.source).name for term in recipe.terms()]
    rows = [f"| {Path(term.source).name} | {term.coefficient:.6g} |" for term in recipe.terms()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [merge]",
            "base_model:",
            *(f"- {json.dumps(name)}" for name in names),
            "---",
            "",
            f"Merged from {len(names)} checkpoints by {recipe.title} with {recipe.summarize()}; made with megatron_bai"
            f" {megatron_bai.__version__}. See `{PROVENANCE}`.",
            "",
            f"| Checkpoint | {'Weight' if recipe.stats_passes or recipe.elementwise else 'Coefficient'} |",
            "|---|---|",
            *rows,
            "",
        ]
    )
