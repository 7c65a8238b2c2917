"""Evaluation on held-out prompts."""

import torch

from megatron_bai.data import Prompt
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.inference import Inference
from megatron_bai.rl.session import Session


def evaluate(session: Session, inference: Inference, stats: Stats) -> None:
    """Add `eval_accuracy` and `eval_length`: one sample to each held-out prompt, with the new weights."""
    seed, count = session.settings.run.seed, session.settings.data.eval_prompts
    prompts: list[Prompt] = session.task.prompts("eval", seed, 0, count)
    part = prompts[session.data_rank :: session.data_size]
    samples = inference.sample(part, 1, seed=seed)
    right = [session.task.reward(part[sample.prompt], sample.response) for sample in samples]
    stats.mean("eval_accuracy", torch.tensor(right))
    stats.mean("eval_length", torch.tensor([float(len(sample.response)) for sample in samples]))
