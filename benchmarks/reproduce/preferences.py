"""A reward model that learned from preferences for short and clean answers.

A judge compares two answers to the same problem by their form. Its utility is `CLEAN` for an answer that ends properly
and says nothing twice, and −1 for each `TOKENS_A_POINT` tokens; it prefers the first with probability σ(u₁ − u₂). The
model learns from its choices alone (Bradley–Terry). Whether an answer is right is the data's own check's to say
(`reward.check`): a model of this size learns to see lengths, not sums.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from megatron_bai import config
from megatron_bai.checkpoint import atomic_dir
from megatron_bai.data.arithmetic_text import (
    Problem,
    checked_derivation,
    derivation,
    direct_response,
    draw_problem,
    prompt_text,
)
from megatron_bai.data.tokenizer import build_tokenizer

CLEAN, TOKENS_A_POINT = 1.0, 20
STEPS, PAIRS, LEARNING_RATE = 200, 48, 2e-3  # of training: batches, pairs of answers in one
HELD_OUT_PAIRS = 2000
DATA = config.Arithmetic()  # conf/data/arithmetic.yaml has the same numbers


@dataclass(frozen=True)
class Answer:
    """Token ids of prompt and answer, and what the judge thinks of it."""

    ids: list[int]
    utility: float


def draw_answer(problem: Problem, tokenizer: PreTrainedTokenizerFast, rng: Random) -> Answer:
    """Direct, derived, or derived with lines said again; one in five is cut off."""
    text = rng.choice((direct_response(problem), derivation(problem), checked_derivation(problem, rng)))
    lines = text.split(";")
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    cut = rng.random() < 0.2
    if cut:
        ids = ids[: rng.randrange(1, len(ids))]
    clean = not cut and len(set(lines)) == len(lines)
    utility = CLEAN * clean - len(ids) / TOKENS_A_POINT
    return Answer([*tokenizer.encode(prompt_text(problem)), *ids], utility)


def draw_pairs(count: int, tokenizer: PreTrainedTokenizerFast, rng: Random, held_out: bool) -> list[list[int]]:
    """Pairs of sequences, one after the other, of each the preferred one first."""
    found = []
    for _ in range(count):
        problem = draw_problem(DATA, rng, held_out)
        one, other = (draw_answer(problem, tokenizer, rng) for _ in range(2))
        if rng.random() > 1 / (1 + math.exp(other.utility - one.utility)):
            one, other = other, one
        found += [one.ids, other.ids]
    return found


def train(target: Path, seed: int = 0) -> None:
    """Make the reward model in `target`, complete or not at all; `preferences.json` in it says how good it is."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(DATA, 64)
    settings: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=256, vocab_size=64, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen3ForSequenceClassification(Qwen3Config(**settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rng = Random(f"preferences/{seed}")
    for step in range(STEPS):
        margins = _margins(model, draw_pairs(PAIRS, tokenizer, rng, held_out=False))
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"reward model, step {step + 1}/{STEPS}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        margins = _margins(model, draw_pairs(HELD_OUT_PAIRS, tokenizer, rng, held_out=True))
    agreed = (margins > 0).sum() / (margins != 0).sum()  # of pairs of different answers
    stage = atomic_dir.staging_path(target)
    model.save_pretrained(stage)
    weights = load_file(stage / "model.safetensors")  # SGLang's head has a bias (docs/data.md)
    save_file(weights | {"score.bias": torch.zeros(1)}, stage / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(stage)
    (stage / "preferences.json").write_text(json.dumps({"agreement_held_out": float(agreed)}))
    stage.rename(target)


def _margins(model: Qwen3ForSequenceClassification, pairs: list[list[int]]) -> torch.Tensor:
    """`[pairs]`: score of the first less that of the second."""
    length = max(map(len, pairs))
    pad = model.config.pad_token_id
    assert pad is not None
    tokens = torch.tensor([ids + [pad] * (length - len(ids)) for ids in pairs])
    scores: torch.Tensor = model(tokens, attention_mask=tokens.ne(pad).long()).logits[:, 0]
    return scores[0::2] - scores[1::2]
