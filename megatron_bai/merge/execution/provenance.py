"""Provenance: what a result depends on, as a fingerprint, and the record of it beside the result."""

import dataclasses
import datetime
import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

import megatron_bai
from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.carried_files import CONFIG, PROVENANCE, hash_file
from megatron_bai.errors import UserError
from megatron_bai.merge.execution.output_dir import CARD, carried_sources, list_carried
from megatron_bai.merge.execution.translated_files import write_translated_files
from megatron_bai.merge.recipe.output_spec import config_with_dtype
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.recipe import Recipe
from megatron_bai.merge.recipe.regions import Fate, OutputTensor, Region
from megatron_bai.merge.recipe.token_texts import with_token_ids
from megatron_bai.merge.tensor_names.param_groups import matches
from megatron_bai.merge.tensor_names.translated_reader import TranslatedReader, format_of

# Of the merge's definition: raised when the same inputs would give other tensors, and when a default changes, since a
# setting that came later is in no fingerprint where it has its default.
REVISION = 1


def fingerprint(plan: Plan, result_index: int, sources: dict[str, str]) -> str:
    """Return a hash of everything that a result depends on, whatever the paths are called.

    Args:
        plan: the merge.
        result_index: of the result among the plan's.
        sources: by path, a string for each source's tensors: `stat_fingerprint` before they are read, the digest of
            `verify_records` afterwards.
    """
    base, weights = plan.base, plan.input_weights[result_index]
    used = [i for i in range(len(plan.inputs)) if any(row[i] != 0 for row in weights.values())]
    fields = {
        "revision": REVISION,
        "inputs": [sources[str(plan.inputs[i].path)] for i in used],
        "layout": [(key, [(c.offsets, c.sizes) for c in base.tensors[key].chunks]) for key in plan.outputs],
        "outputs": [
            (r.name, str(r.dtype), [weights[r.name][i] for i in used] if r.name in weights else r.fate.value)
            for regions in plan.regions.values()
            for r in regions
        ],
        "recipe": plan.recipes[result_index].fingerprint_fields(),
        "places": used if plan.recipes[result_index].elementwise else None,
        "kept": sources[str(base.path)] if plan.has_kept_rows else None,
        "form": dataclasses.replace(plan.output_spec, dtype=None).fingerprint_fields(),
        "objects": [
            (key, hashlib.sha256(base.read_object(key)).hexdigest()) for unit in plan.units for key in unit.objects
        ],
        "files": [(path.as_posix(), hash_file(directory / path)) for path, directory in carried_sources(plan).items()],
    }
    if plan.agreement and plan.agreement.token_ids:
        fields["token_ids"] = plan.agreement.token_ids
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def is_up_to_date(target: Path, input_fingerprint: str) -> bool:
    """Return whether `target` is complete and was written by a merge with this fingerprint of its inputs.

    Args:
        target: directory of a result, or of one that is being written.
        input_fingerprint: `fingerprint` with the `stat_fingerprint` of each source.

    Returns:
        False too where nothing is there, or its manifest does not hold.
    """
    try:
        info = manifest.read_info(target)
    except UserError:
        return False  # damaged: merge again
    return info is not None and info.get("merge", {}).get("mark") == input_fingerprint


def describe_difference(target: Path, recipe: Recipe) -> str:
    """Describe how the merge at `target` differs from this recipe, by its provenance.

    Args:
        target: directory of an earlier result.
        recipe: of the merge that would replace it.

    Returns:
        A clause about the earlier merge: the first setting that differs, else that its sources or form do, or that its
        provenance cannot be read.
    """
    try:
        recorded = json.loads((target / PROVENANCE).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"whose {PROVENANCE} cannot be read"
    described = json.loads(json.dumps(recipe.describe()))
    recorded = json.loads(json.dumps(recipe.describe_defaults())) | recorded  # settings that did not exist then
    for name in (name for name in described if name != "terms"):
        if recorded.get(name) != described[name]:
            return f"with merge.{name} {recorded.get(name)} instead of {described[name]}"
    return "of sources that have changed since, or in another form"


def write_provenance(
    stage: Path, recipe: Recipe, plan: Plan, digests: dict[str, str], result_index: int, norms: dict[str, float]
) -> str:
    """Copy the carried files and write `provenance.json`, with which the merge can be checked and repeated.

    Args:
        stage: the directory in which the result is written.
        recipe: of the result.
        plan: the merge.
        digests: of the tensors of every source that was read, by path.
        result_index: of the result among the plan's.
        norms: the 2-norm of every merged tensor, by key.

    Returns:
        The result's fingerprint.
    """
    carried = carried_sources(plan)
    for path, directory in carried.items():
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / path, stage / path)
    if isinstance(plan.base, TranslatedReader):
        write_translated_files(plan.base, stage, plan.outputs)
    if plan.agreement and plan.agreement.token_ids and (stage / CONFIG).is_file():
        text = (stage / CONFIG).read_text(encoding="utf-8")
        (stage / CONFIG).write_text(with_token_ids(text, plan.agreement.token_ids), encoding="utf-8")
    if plan.output_spec.dtype is not None and (stage / CONFIG).is_file():
        text = (stage / CONFIG).read_text(encoding="utf-8")
        (stage / CONFIG).write_text(config_with_dtype(text, plan.output_spec.dtype), encoding="utf-8")
    result_fingerprint = fingerprint(plan, result_index, digests)
    provenance: dict[str, Any] = {
        "fingerprint": result_fingerprint,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recipe": recipe.describe(),
        "format": format_of(plan.base),
        "sources": _describe_sources(recipe, plan, digests),
        "differences": [{"key": each.key, "values": each.values, "outcome": each.outcome} for each in plan.differences],
        "tokenizer": str(plan.agreement.tokenizer if plan.agreement else plan.base.path),
        "carried_files": [path.as_posix() for path in carried],
        "files_left_out": list_carried(plan).left_out,
        "carried_objects": [key for unit in plan.units for key in unit.objects],
        "versions": {
            "megatron_bai": megatron_bai.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "tensors": {
            key: _describe_tensor(output, plan.regions[key], recipe, norms) for key, output in plan.outputs.items()
        },
    }
    (stage / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    if format_of(plan.base) == "hf":
        (stage / CARD).write_text(make_model_card(recipe), encoding="utf-8")
    return result_fingerprint


def _describe_sources(recipe: Recipe, plan: Plan, digests: dict[str, str]) -> list[dict[str, Any]]:
    """Describe every source that was read, and the base, of which with coefficient 0 only the layout was used."""
    formats = {str(source.path): format_of(source) for source in plan.sources}
    coefficients = {term.source: term.coefficient for term in recipe.terms()}
    return [
        {
            "path": path,
            "coefficient": coefficient,
            "format": formats[path],
            "digest": digests.get(path),
            "dropped": plan.dropped[path],
        }
        for path, coefficient in coefficients.items()
        if path in digests or path == str(plan.base.path)
    ]


def _describe_tensor(
    output: OutputTensor, regions: tuple[Region, ...], recipe: Recipe, norms: dict[str, float]
) -> dict[str, Any]:
    """Describe an output tensor and its regions."""
    about = {"dtype": str(output.dtype).removeprefix("torch."), "shape": output.shape}
    norm = {"norm": norms[output.key]} if output.merged else {}
    fates = [_describe_region(region, recipe) for region in regions]
    return about | norm | (fates[0] if len(fates) == 1 else {"fate": "by rows", "rows": fates})


def _describe_region(region: Region, recipe: Recipe) -> dict[str, Any]:
    """Return a region's fate, its rows where it is not all of its tensor, and its coefficients if by a pattern."""
    about: dict[str, Any] = {"fate": region.fate.value}
    if region.box[1] != region.output.shape:
        about["rows"] = [region.box[0][0], region.box[0][0] + region.box[1][0]]
    if region.fate is Fate.MERGED and any(matches(pattern, region.key, region.layer) for pattern in recipe.patterns):
        about["coefficients"] = [term.coefficient for term in recipe.terms(region.key, region.layer)]
    return about


def make_model_card(recipe: Recipe) -> str:
    """Make the text that Hugging Face shows of a merged model."""
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
