"""A merge of three checkpoints of each family, in both formats and from differently stacked sources, is a closed form.

A family is `configs/NAME.json`: each gets all tests here.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
from model.families import published
from model.families.spelled import (
    PLAIN,
    SPELLINGS,
    Slices,
    Spell,
    Tensors,
    architecture,
    by_layer,
    checkpoints,
    draw,
    numbered,
    per_expert,
    same,
    write,
)
from tiers import tiered

from megatron_bai.checkpoint.tensor_index import TensorInfo
from megatron_bai.config import Merge
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.tensor_names.canonical_names import canonical_box
from megatron_bai.merge.tensor_names.family_names import choose_canonical_names
from megatron_bai.merge.tensor_names.renamed_view import CanonicalIndex
from megatron_bai.model.architecture import Architecture, read_architecture
from megatron_bai.model.hf_mapping import slice_indices

ALPHA, WEIGHTS = 0.6, (0.25, 0.75)
COEFFICIENTS = (ALPHA, (1 - ALPHA) * WEIGHTS[0], (1 - ALPHA) * WEIGHTS[1])


SOURCES = {
    "hf": ("published", "fused", "published"),
    "hf, a fused base": ("fused", "published", "fused"),
    "megatron": ("stacked", "by layer", "singly"),
    "megatron, by layer": ("by layer", "singly", "stacked"),
}
BAI = {"weights": list(WEIGHTS), "alpha": ALPHA}
THREE = ("published", "fused", "stacked")


def merge(name: str, spellings: tuple[str, ...], directory: Path, **settings) -> tuple[Tensors, Architecture]:
    """The output of a merge of three, whose sources are drawn by the seeds 0, 1, 2, unless they are there."""
    paths = [directory / f"{spelling} {seed}" for seed, spelling in enumerate(spellings)]
    for seed, (path, spelling) in enumerate(zip(paths, spellings)):
        if not path.exists():
            write(path, name, seed, spelling, checkpoints.rows)
    base, *members = map(str, paths)
    out = directory / f"out of {', '.join(spellings)} {settings.get('format', '')}"
    pipeline.run_merge(Merge(pretrained=base, members=members, output=str(out), **(settings or BAI)), RankGroup())
    return checkpoints.read(out), read_architecture(paths[0])


def exact(model: Architecture) -> tuple[Slices, Slices, Slices]:
    """α·pretrained + (1 − α)·Σ wᵢ·Mᵢ in float64, the sum of its terms' sizes, and the pretrained's."""
    drawn = [draw(model, seed) for seed in range(3)]
    terms = {place: [c * each[place].double() for c, each in zip(COEFFICIENTS, drawn)] for place in drawn[0]}
    sums = {place: torch.stack(each).sum(0) for place, each in terms.items()}
    return sums, {place: torch.stack(each).abs().sum(0) for place, each in terms.items()}, drawn[0]


def require_closed_form(found: Tensors, model: Architecture, spell: Spell) -> None:
    wanted, sizes, like = (spell(each, model) for each in exact(model))
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert value.dtype == like[key].dtype and value.shape == like[key].shape, key
        half_ulp = wanted[key].abs() * torch.finfo(value.dtype).eps / 2
        # terms are added in float32
        assert ((value.double() - wanted[key]).abs() <= half_ulp * 1.0001 + sizes[key] * 2**-22).all(), key


def by_published_names(found: Tensors, model: Architecture) -> Tensors:
    """Megatron's layers by the table with which `convert` and an import go from one format to the other."""
    slices: Slices = {}
    for kind in model.mappings.values():
        for index in slice_indices(kind, model):
            value = found[numbered(kind, index)]
            slices[kind, index] = value[index[1]] if len(index) == 2 else value
    return per_expert(slices, model)


def published_of_fused(found: Tensors, model: Architecture) -> Tensors:
    """What transformers 5 holds, as the family publishes it."""
    slices, renamed = {}, {}
    for kind in model.mappings.values():
        for index in slice_indices(kind, model):
            if kind.fused:
                slices[kind, index] = found[kind.fused_name(index)][index[1]]
            else:
                names = kind.names(index, other=bool(kind.other))
                renamed |= {name: found[here] for name, here in zip(kind.names(index), names, strict=True)}
    return renamed | per_expert(slices, model)


@pytest.mark.parametrize("name", published.NAMES)
def test_a_merge_of_three_is_its_closed_form_and_has_the_same_bits_in_both_formats(name: str, tmp_path: Path) -> None:
    found, model = merge(name, SOURCES["megatron, by layer"], tmp_path)
    theirs, _ = merge(name, SOURCES["hf"], tmp_path)
    require_closed_form(found, model, by_layer)
    require_closed_form(theirs, model, per_expert)
    same(by_published_names(found, model), theirs)
    if any(kind.experts_together for kind in model.mappings.values()):  # transposed, and no runs of rows
        with pytest.raises(UserError, match="is not made of whole rows of .*: bring the sources into one format"):
            merge(name, ("stacked", "fused", "published"), tmp_path, format="hf", **BAI)
        return
    across, _ = merge(name, ("stacked", "fused", "published"), tmp_path, format="hf", **BAI)
    same(across, theirs)


@pytest.mark.long
@pytest.mark.parametrize("spelled", ["hf, a fused base", "megatron"])
@pytest.mark.parametrize("name", published.NAMES)
def test_the_output_is_stacked_as_the_base_is(name: str, spelled: str, tmp_path: Path) -> None:
    found, model = merge(name, SOURCES[spelled], tmp_path)
    require_closed_form(found, model, SPELLINGS[SOURCES[spelled][0]][1])


# Elements are dropped by the names of parameters, and signs elected: nothing may depend on how a source names them.
DARE = {"method": "dare_ties", "drop_rate": 0.5, "seed": 3}
CASES = [("mixtral", "hf"), ("minimax_m2", "megatron"), ("mixtral", "megatron"), ("minimax_m2", "hf")]
CASES += [("qwen3_moe_dense_mix", "hf"), ("deepseek_v3", "megatron"), ("bailing_moe_v2", "hf")]


@pytest.mark.parametrize("case", tiered(CASES, CASES[:1]), ids=", ".join)
def test_any_mixture_of_three_has_the_bits_of_one_of_converted_sources(
    case: tuple[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, output = case
    mixtures = list(product(THREE, repeat=3))
    if not request.node.get_closest_marker("long"):
        mixtures = [("published", "fused", "stacked"), ("fused", "published", "stacked")]
    converted: dict[str, Tensors] = {}
    for mixture in mixtures:
        spelled = mixture[0] if SPELLINGS[mixture[0]][0] == output else PLAIN[output]  # the base's names stay
        if spelled not in converted:
            converted[spelled], _ = merge(name, (spelled,) * 3, tmp_path, **DARE)
        found, model = merge(name, mixture, tmp_path, format=output, **DARE)
        same(found, converted[spelled])
    if output == "hf":
        same(published_of_fused(converted["fused"], model), converted["published"])


@pytest.mark.parametrize("name", published.NAMES)
def test_published_and_fused_names_are_the_same_boxes(name: str, tmp_path: Path) -> None:
    model = architecture(name, tmp_path)
    tensors = {
        spelling: {
            key: TensorInfo(key, value.dtype, tuple(value.shape), ())
            for key, value in SPELLINGS[spelling][1](draw(model, 0), model).items()
        }
        for spelling in ("published", "fused")
    }
    together = choose_canonical_names(dict(zip((tmp_path, tmp_path / "no config.json"), tensors.values())))
    for to_canonical in (together, choose_canonical_names({tmp_path: tensors["fused"]})):
        one, other = (CanonicalIndex(tmp_path, each, None, to_canonical) for each in tensors.values())
        assert one.shapes == other.shapes
        for key, box in one.boxes.items():
            canonical = one.canonical_boxes[key]
            assert other.count_elements(canonical.name, box) == torch.Size(box[1]).numel(), key
    alone = choose_canonical_names({tmp_path: tensors["published"], tmp_path / "other": tensors["published"]})
    for key, canonical in one.canonical_boxes.items():
        assert alone(key, tensors["published"][key].shape) == canonical, "sources that are all published mean the same"
    is_common = not any("block_sparse_moe" in key or "gate_up_proj" in key for key in tensors["published"])
    assert (alone is canonical_box) == is_common, "a family's table takes seconds to import"
