"""The tiny Qwen3-MoE of the tests that build one: small, with every dimension of another size."""

import numpy as np

from megatron_bai.config import Model
from megatron_bai.model.architecture import architecture_of
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.routes import RouteSignature

MODEL = Model(
    num_layers=4,
    hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    num_experts=8,
    moe_topk=2,
    moe_ffn_hidden_size=40,
    vocab_size=56,
    max_position_embeddings=64,
    rope_theta=5000.0,
    norm_epsilon=1e-6,
    init_std=0.1,
)
ARCHITECTURE = architecture_of(MODEL)
SIGNATURE = RouteSignature(MODEL.num_layers, MODEL.num_experts, MODEL.moe_topk)


def random_routes(rows: int, random: np.random.Generator) -> np.ndarray:
    """`[rows, layers, topk]` uint8: experts drawn uniformly, as a router would hardly choose them."""
    scores = random.random((rows, MODEL.num_layers, MODEL.num_experts))
    return scores.argsort(axis=-1)[..., : MODEL.moe_topk].astype(np.uint8)


def samples(count: int, random: np.random.Generator, longest: int = 24) -> list[Sample]:
    """Rollouts of random tokens and routes, of different lengths, one of them empty and one a single token."""
    found = []
    for number in range(count):
        prompt = int(random.integers(3, 8))
        total = prompt + (number if number < 2 else int(random.integers(2, longest - prompt + 1)))
        logprobs = random.normal(-4.2, 0.5, total - prompt).astype(np.float32)
        tokens = random.integers(0, MODEL.vocab_size, total)
        routes = random_routes(total - 1, random)
        found.append(Sample(number // 4, tokens, prompt, logprobs, routes, (), "stop"))
    return found
