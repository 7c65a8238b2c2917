"""What a rank holds, by arithmetic, is what Megatron-Core builds, at 30 billion parameters, too."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from processes import TESTS, launch

from megatron_bai.config import Model, Parallel
from megatron_bai.memory_plan import rank_memory

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
def built() -> dict[str, Any]:
    asked = [[asdict(part) if isinstance(part, Model | Parallel) else part for part in case] for case in CASES.values()]
    lines = launch(TESTS / "rl" / "memory_worker.py", json.dumps(asked)).splitlines()
    return dict(zip(CASES, json.loads(lines[-1]), strict=True))


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
