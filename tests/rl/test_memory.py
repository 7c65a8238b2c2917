"""What a rank holds, by arithmetic, is what Megatron-Core builds, at 30 billion parameters, too."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import published
from processes import TESTS, launch

from megatron_bai.config import Model, Parallel
from megatron_bai.memory_plan import rank_memory
from megatron_bai.model.architecture import read_architecture
from megatron_bai.model.hf_checkpoint import hf_config
from megatron_bai.model.hf_mapping import megatron_shapes

LARGE = Model(
    num_layers=48, hidden_size=2048, num_attention_heads=32, num_query_groups=4, head_dim=128, num_experts=128,
    moe_topk=8, moe_ffn_hidden_size=768, vocab_size=151936, max_position_embeddings=40960,
)  # fmt: skip
# Every dimension of another size; two tensor ranks and more divide them.
SMALL = Model(
    num_layers=4, hidden_size=96, num_attention_heads=8, num_query_groups=4, head_dim=16, num_experts=16, moe_topk=3,
    moe_ffn_hidden_size=40, vocab_size=224, max_position_embeddings=256,
)  # fmt: skip
LAYOUT = Parallel(tensor=4, expert=8, sequence=True)
STAGES = Parallel(tensor=4, expert=8, pipeline=2, sequence=True)
CASES: dict[str, tuple[int, int, Model, Parallel, str, str]] = {
    "8 GPUs": (0, 8, LARGE, LAYOUT, "bfloat16", "actor"),
    "32 GPUs, first stage": (3, 32, LARGE, STAGES, "bfloat16", "actor"),
    "32 GPUs, last stage": (31, 32, LARGE, STAGES, "bfloat16", "actor"),
    "32 GPUs, last stage, critic": (31, 32, LARGE, STAGES, "bfloat16", "critic"),
    "alone": (0, 1, SMALL, Parallel(), "float32", "whole"),
    "two kinds of replicas": (1, 16, SMALL, Parallel(tensor=4, expert=2, sequence=True), "bfloat16", "whole"),
    "two stages": (15, 16, SMALL, Parallel(tensor=2, expert=4, pipeline=2, sequence=True), "bfloat16", "whole"),
    "replicated experts": (5, 8, SMALL, Parallel(tensor=2, sequence=True), "float32", "whole"),
    "layer": (0, 1, SMALL, Parallel(), "float32", "layer"),
}


@pytest.fixture(scope="module")
def published_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in published.NAMES}
    for name, directory in found.items():
        (directory / "config.json").write_text(json.dumps(published.read(name)))
    return found


@pytest.fixture(scope="module")
def built(published_models: dict[str, Path]) -> dict[str, Any]:
    asked = [[asdict(part) if isinstance(part, Model | Parallel) else part for part in case] for case in CASES.values()]
    asked += [[0, 1, str(each), asdict(Parallel()), "float32", "family"] for each in published_models.values()]
    lines = launch(TESTS / "rl" / "memory_worker.py", json.dumps(asked), fresh=True).splitlines()
    return dict(zip([*CASES, *published_models], json.loads(lines[-1]), strict=True))


def test_the_model_has_the_parameters_its_makers_publish() -> None:
    """30.5 billion in all, 3.3 billion of a token's, 29.9 billion beside the embeddings."""
    whole = rank_memory.count_params(LARGE)
    beside = whole.total - 2 * LARGE.vocab_size * LARGE.hidden_size
    assert (round(whole.total / 1e9, 1), round(beside / 1e9, 1)) == (30.5, 29.9)
    assert whole.active(LARGE) / 1e9 == pytest.approx(3.3, abs=0.06)


@pytest.mark.distributed
@pytest.mark.parametrize("case", [name for name, asked in CASES.items() if asked[5] != "layer"])
def test_parameters_of_a_rank_are_megatrons(case: str, built: dict[str, Any]) -> None:
    rank, processes, model, parallel, _, kind = CASES[case]
    stage = rank * parallel.pipeline // processes  # Megatron numbers the ranks of a stage one after the other
    own = rank_memory.count_params(model, parallel, stage, kind == "critic")
    assert (own.dense, own.experts) == (built[case]["dense"], built[case]["experts"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", [name for name, asked in CASES.items() if asked[5] == "whole"])
def test_bytes_in_training_are_megatrons(case: str, built: dict[str, Any]) -> None:
    """But for what pads Megatron's buffers to equal parts: less than 128 elements a rank and buffer."""
    rank, processes, model, parallel, dtype, _ = CASES[case]
    own = rank_memory.count_params(model, parallel, rank * parallel.pipeline // processes)
    expected = rank_memory.state_bytes(own, parallel, processes, dtype)
    assert expected.weights == built[case]["weights"]
    for name in ("gradients", "optimizer"):
        assert built[case][name] == pytest.approx(getattr(expected, name), abs=2 * 128 * 12 * processes), name


@pytest.mark.distributed
def test_activations_of_a_layer_are_nearly_megatrons(built: dict[str, Any]) -> None:
    """Megatron-Core's layers for a CPU are not fused, and keep somewhat more than is counted."""
    attention, moe, _ = rank_memory.layer_activation_bytes(SMALL, Parallel(), 1, "float32")
    assert 1.0 <= built["layer"] / (attention + moe) <= 1.5


@pytest.mark.distributed
@pytest.mark.parametrize("name", published.NAMES)
def test_a_familys_parameters_and_saved_tensors_are_megatrons(
    name: str, published_models: dict[str, Path], built: dict[str, Any]
) -> None:
    model = read_architecture(published_models[name])
    own = rank_memory.count_params(model)
    assert (own.dense, own.experts) == (built[name]["dense"], built[name]["experts"])
    assert megatron_shapes(model) == {key: tuple(shape) for key, shape in built[name]["saved"].items()}


@pytest.mark.distributed
@pytest.mark.parametrize("name", published.NAMES)
def test_activations_of_a_familys_layers_are_nearly_megatrons(
    name: str, published_models: dict[str, Path], built: dict[str, Any]
) -> None:
    """Of each layer, dense or not, and of its shared experts, whose input is the layer's. A CPU's are not fused."""
    model, kept = read_architecture(published_models[name]), iter(built[name]["kept"])
    shared, entry = 4 * rank_memory.shared_expert_values(model), 4 * model.hidden_size
    attention, moe, _ = rank_memory.layer_activation_bytes(model, Parallel(), 1, "float32")
    for layer in range(model.num_layers):
        expected, found = attention, 0.0
        if layer not in model.moe_layers:
            expected += rank_memory.dense_activation_bytes(model, Parallel(), 1, "float32")
        else:
            expected += moe
            if shared:
                found = next(kept) - entry
                assert 1.0 <= found / shared <= 1.3
        assert 1.0 <= (next(kept) + found) / expected <= 1.65
    assert next(kept, None) is None


def test_shared_experts_are_an_mlp_of_all_tokens_that_tensor_ranks_split(tmp_path: Path) -> None:
    def moe(experts: int, tensor: int) -> float:
        changes = {"n_shared_experts": experts, "moe_intermediate_size": 1408}
        (tmp_path / "config.json").write_text(json.dumps(published.read("glm4_moe") | changes))
        return rank_memory.layer_activation_bytes(
            read_architecture(tmp_path), Parallel(tensor=tensor), 4096, "bfloat16"
        )[1]

    assert moe(3, 1) - moe(1, 1) == 4096 * 2 * 4 * 2 * 1408
    assert moe(3, 8) - moe(1, 8) == 4096 // 8 * 2 * 4 * 2 * 1408


def test_recomputation_and_stages_hold_what_they_say() -> None:
    def held(stage: int = 0, micro_batches: int = 8, **layout: Any) -> float:
        return rank_memory.activation_bytes(LARGE, Parallel(**layout), stage, 4096, micro_batches, "bfloat16")

    attention, moe, entry = rank_memory.layer_activation_bytes(LARGE, Parallel(), 4096, "bfloat16")
    assert held() == 48 * (attention + moe) + moe
    assert held(recompute="moe") == 48 * (attention + entry) + 2 * moe
    assert held(recompute="full") == 48 * entry + attention + 2 * moe
    assert held(pipeline=4) == held() and held(3, pipeline=4) == 12 * (attention + moe) + moe
    assert held(pipeline=4, micro_batches=2) == 2 * 12 * (attention + moe) + moe  # there are no more of them
    # Megatron's interleaved schedule: 2 · 3 + 1 · 4 chunks ahead and one in work, of 6 layers each.
    assert held(pipeline=4, virtual_pipeline=2) == 11 * 6 * (attention + moe) + moe


def test_layers_without_experts_hold_an_mlp(tmp_path: Path) -> None:
    """The first of two stages has one dense layer beside 23 with experts; the second has experts alone."""
    changes = {"mlp_only_layers": [0], "intermediate_size": 6144}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(LARGE, torch.bfloat16) | changes))
    model = read_architecture(tmp_path)

    def held(stage: int, recompute: str) -> float:
        layout = Parallel(pipeline=2, recompute=recompute)
        return rank_memory.activation_bytes(model, layout, stage, 4096, 1, "bfloat16")

    attention, moe, entry = rank_memory.layer_activation_bytes(LARGE, Parallel(), 4096, "bfloat16")
    dense = 4096 * (2 * 2048 + 4 * 6144) * 2
    assert held(0, "none") == 24 * attention + 23 * moe + dense + moe
    assert held(0, "moe") == 24 * attention + 23 * entry + dense + 2 * moe
    assert held(0, "full") == 24 * entry + attention + 2 * moe
    assert held(1, "none") == 24 * (attention + moe) + moe
