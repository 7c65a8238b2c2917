"""What a checkpoint lacks, has besides or in another shape is named before a weight is read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import ARCHITECTURE
from whole_models import Tensors, hf_tensors, megatron_tensors, write_hf, write_megatron

from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError
from megatron_bai.model import hf_checkpoint
from megatron_bai.model.architecture import read_architecture
from megatron_bai.model.hf_reader import HFReader
from megatron_bai.model.required_tensors import require_tensors

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROUTER = "decoder.layers.mlp.router.weight"
HEAD = Path(__file__).parent.parent / "data" / "head-2fa74aa"
TIED = replace(ARCHITECTURE, tied=True)


@pytest.mark.parametrize("name", sorted({name.replace(".2.", ".3.") for name in hf_tensors()})[::29])
def test_every_rank_names_a_tensor_of_another_shape_whoever_holds_it(name: str, tmp_path: Path) -> None:
    tensors = hf_tensors()
    tensors[name] = tensors[name][1:].clone()
    with pytest.raises(UserError, match=rf"{name} has shape \(.*\), the model needs \("):
        HFReader(write_hf(tmp_path / "c", tensors)).require_tensors_of(ARCHITECTURE)


def test_a_tied_model_may_have_its_output_layer_stored_a_second_time(tmp_path: Path) -> None:
    tensors = hf_tensors()
    again = write_hf(tmp_path / "again", tensors | {OUTPUT: tensors[EMBEDDING].clone()})
    HFReader(again).require_tensors_of(TIED)
    with pytest.raises(UserError, match="lm_head.weight is not model.embed_tokens.weight, and config.json says"):
        HFReader(write_hf(tmp_path / "other", tensors)).require_tensors_of(TIED)
    del tensors[OUTPUT]
    HFReader(write_hf(tmp_path / "once", tensors)).require_tensors_of(TIED)


def test_a_rank_that_cannot_read_a_tensor_ends_the_wait_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[Exception] = []

    class Ranks(RankGroup):
        def run_on_all(self, function: Callable[[], Any], location: object = "") -> list[Any]:
            try:
                return super().run_on_all(function, location)
            except UserError as error:
                failed.append(error)
                raise

    def fail(*_: object) -> None:
        raise UserError("cannot read tensor")

    monkeypatch.setattr(hf_checkpoint, "current_ranks", Ranks)
    monkeypatch.setattr(hf_checkpoint, "fill_parameters", fail)
    with pytest.raises(UserError, match="cannot read tensor"):
        hf_checkpoint.load_hf([], ARCHITECTURE, write_hf(tmp_path / "c", hf_tensors()))
    assert failed, "an error outside of a collective leaves the other ranks in it"


def without(key: str, critic: bool = False) -> Tensors:
    return {name: tensor for name, tensor in megatron_tensors(critic).items() if name != key}


def reshaped(key: str, *shape: int) -> Tensors:
    return megatron_tensors() | {key: torch.ones(shape)}


def added(key: str, *shape: int) -> Tensors:
    return megatron_tensors() | {key: torch.ones(shape or (3,))}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (without(ROUTER), f"has no {ROUTER}: it is the checkpoint of another kind of model"),
        (without("decoder.final_layernorm.weight"), "has no decoder.final_layernorm.weight"),
        (reshaped(ROUTER, 4, 7, 48), rf"{ROUTER} has shape \(4, 7, 48\), the model needs \(4, 8, 48\)"),
        (
            reshaped("output_layer.weight", 55, 48),
            r"output_layer.weight has shape \(55, 48\), the model needs \(56, 48",
        ),
        (reshaped("output_layer.weight", 56, 47), r"output_layer.weight has shape \(56, 47\)"),
        (added("decoder.layers.mlp.router.expert_bias", 4, 8), "router.expert_bias, which no model of its config.json"),
        (added("decoder.layers.mlp.shared_experts.linear_fc1.weight"), "shared_experts.linear_fc1.weight, which no"),
        (added("mtp.layers.0.eh_proj.weight"), "has mtp.layers.0.eh_proj.weight, which no model"),
        (megatron_tensors(critic=True), "has no output_layer.weight"),
    ],
)
def test_what_a_torch_dist_checkpoint_lacks_or_has_besides_is_named(
    tensors: Tensors, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        require_tensors(write_megatron(tmp_path / "c", tensors), ARCHITECTURE)


def test_a_critic_in_place_of_a_tied_actor_is_named(tmp_path: Path) -> None:
    """Neither has an output layer: Megatron-Core itself would leave the head out without an error."""
    critic = write_megatron(tmp_path / "critic", megatron_tensors(critic=True))
    with pytest.raises(UserError, match="critic has value_head.weight, which no model"):
        require_tensors(critic, TIED)


def test_rows_of_padding_and_what_is_no_weight_may_be_there(tmp_path: Path) -> None:
    tensors = reshaped("output_layer.weight", 64, 48) | {
        "embedding.word_embeddings.weight": torch.ones(128, 48),
        "optimizer.state.exp_avg.output_layer.weight": torch.ones(4),
        "rng_state.cpu": torch.ones(4),
        "rotary_pos_emb.inv_freq": torch.ones(8),
    }
    require_tensors(write_megatron(tmp_path / "c", tensors), ARCHITECTURE)


def test_a_critic_is_taken_for_a_critic_alone(tmp_path: Path) -> None:
    critic = write_megatron(tmp_path / "critic", megatron_tensors(critic=True))
    require_tensors(critic, ARCHITECTURE, critic=True)
    with pytest.raises(UserError, match="has no value_head.weight"):
        require_tensors(write_megatron(tmp_path / "actor", megatron_tensors()), ARCHITECTURE, critic=True)
    with pytest.raises(UserError, match=r"is no torch_dist checkpoint: a critic's is what objective.critic_save names"):
        require_tensors(write_hf(tmp_path / "hf", hf_tensors()), ARCHITECTURE, critic=True)


@pytest.mark.parametrize("name", ["pretrained", "merged", "converted", "split", "run/checkpoints/step-00002", "critic"])
def test_what_an_older_head_wrote_has_all(name: str) -> None:
    require_tensors(HEAD / name, read_architecture(HEAD / name), critic=name == "critic")
