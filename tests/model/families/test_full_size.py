"""Published models at full size: the architecture that is read, and an account of every element that is published.

Nothing is built: the table of a family says the shapes of its parameters.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from model.families.full_size import MODELS, FullSize

from megatron_bai.errors import UserError
from megatron_bai.memory_plan.rank_memory import count_params
from megatron_bai.model.architecture import Architecture, read_architecture
from megatron_bai.model.families.param_mapping import ParamMapping

EACH = pytest.mark.parametrize("name", MODELS)


def read(full: FullSize, directory: Path, **changes: Any) -> Architecture:
    (directory / "config.json").write_text(json.dumps(full.describe() | changes))
    return read_architecture(directory)


def count(kinds: Iterable[ParamMapping], model: Architecture, layers: int = 0) -> int:
    """Number of elements; of so many layers of each kind, 0: of as many as it has."""
    found = 0
    for kind in kinds:
        stacks = [layers or len(model.layers(kind.layers)), model.num_experts][: kind.num_stacked_axes]
        found += math.prod(kind.shape(model)) * math.prod(stacks)
    return found


def beside(part: str, model: Architecture) -> int:
    """Number of elements that are published beside a model's parameters."""
    h = model.hidden_size
    if part == "frequencies":  # of half a head, of which the hidden size is made
        return model.num_layers * (h // model.num_attention_heads // 2)
    if part == "copies":
        return 2 * model.vocab_size * h
    layer = [kind for kind in model.mappings.values() if kind.num_stacked_axes and kind.layers != "dense"]
    return count(layer, model, 1) + 2 * h * h + 3 * h  # eh_proj; enorm, hnorm, shared_head.norm


@EACH
def test_the_architecture_is_the_published_one(name: str, tmp_path: Path) -> None:
    full = MODELS[name]
    model, described = read(full, tmp_path), full.describe()
    sizes = {**model.family.hf_fields, "rope_theta": "rope_theta"}
    assert {theirs: getattr(model, ours) for ours, theirs in sizes.items() if theirs in described} == {
        theirs: described[theirs] for theirs in sizes.values() if theirs in described
    }
    assert list(model.moe_layers) == list(range(full.dense, model.num_layers))
    rope = model.family.rope_arguments(model)
    found = {**rope.gpt, **rope.config, **model.family.transformer_arguments(model)}
    assert {key: found.get(key) for key in full.arguments} == full.arguments
    neutral = {"position_embedding_type": "rope", "mscale_all_dim": 0.0, "beta_slow": 1}  # of a kind of positions
    rest = {key: value for key, value in found.items() if key not in full.arguments and neutral.get(key) != value}
    assert not rest, "what is said here of the model beyond what is known of it"


@EACH
def test_the_table_has_every_element_that_is_published(name: str, tmp_path: Path) -> None:
    full = MODELS[name]
    model = read(full, tmp_path)
    params = count_params(model)
    buffers = [kind for kind in model.mappings.values() if not kind.trained]
    total = count(model.mappings.values(), model)
    assert params.total == total - count(buffers, model)
    if full.stored:
        assert total + sum(beside(part, model) for part in full.beside) == full.stored
    most, active = full.billions
    assert round_as(most, params.total) or total == pytest.approx(most * 1e9, rel=0.015)
    passed = params.active(model) - full.uncounted * model.vocab_size * model.hidden_size
    assert round_as(active, passed) or passed == pytest.approx(active * 1e9, rel=0.02)


def round_as(billions: float, number: float) -> bool:
    """Whether a number is what is stated, in the digits that are stated."""
    digits = len(str(billions).partition(".")[2])
    return round(number / 1e9, digits) == billions


@pytest.mark.parametrize("name", [name for name, full in MODELS.items() if full.quantised])
def test_weights_in_eight_bits_are_refused_as_published(name: str, tmp_path: Path) -> None:
    full = MODELS[name]
    with pytest.raises(UserError, match=r"quantised \(quantization_config, fp8\): dequantise the checkpoint"):
        read(full, tmp_path, quantization_config=full.quantised)


@EACH
def test_what_is_published_has_all_that_sglang_asks_for(name: str, tmp_path: Path) -> None:
    model = read(MODELS[name], tmp_path)
    assert model.family.stated(model).keys() <= model.raw.keys()
