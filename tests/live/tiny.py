"""A Qwen3-MoE of 80 thousand random parameters, and the settings it is served with."""

from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bai.config import Rollout
from megatron_bai.routing.routes import RouteSignature

VOCAB, LENGTH, STOP = 64, 128, 1
SIGNATURE = RouteSignature(moe_layers=3, num_experts=8, topk=2)
ROLLOUT = Rollout(max_new_tokens=32, max_total_tokens=8192, request_timeout_s=60.0, sync="tensors")


def save_tiny(path: Path, seed: int, **changes: int) -> Path:
    """Save a random Qwen3-MoE whose logits are spread enough to be worth comparing (2 nats)."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=SIGNATURE.moe_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=SIGNATURE.num_experts,
        num_experts_per_tok=SIGNATURE.topk,
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        eos_token_id=STOP,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes))).save_pretrained(path)
    return path
