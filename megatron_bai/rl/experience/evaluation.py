"""Evaluation on held-out prompts: avg@n with a confidence interval."""

import math
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.experience.failed_samples import count_failures
from megatron_bai.rl.experience.inference_engine import InferenceEngine
from megatron_bai.rl.session import Session
from megatron_bai.rollout.sample import Sample


def evaluate(session: Session, inference: InferenceEngine, stats: Stats) -> list[Sample]:
    """Sample `trainer.eval_samples` responses to each held-out prompt, with the new weights. Collective.

    Adds `eval_accuracy` (avg@n of the reward, whatever reward that is: the mean over prompts of a prompt's mean) with
    the ends of its 95 % interval, `eval_accuracy_low` and `eval_accuracy_high` (`confidence_interval`); `eval_best`,
    the mean over prompts of the best reward (pass@n where rewards are 0 and 1); `eval_length`, the mean length of
    responses in tokens, `eval_truncated`, the share cut off, and `eval_failed`, the share without a reward, lost
    samples among them. If training has another reward than the data's own check, `eval_exact` is the share of samples
    that this check finds right, of prompts with an answer that it can compare; it is left out where no prompt has
    one.

    Args:
        session: of the run.
        inference: its servers, with the new weights.
        stats: gets the metrics.

    Returns:
        This replica's samples, in groups, on every rank of it.
    """
    settings, task = session.settings, session.task
    count, n, seed = task.eval_size, settings.trainer.eval_samples, settings.run.seed
    start, end = (count * (session.dp_rank + i) // session.dp_size for i in (0, 1))
    prompts = task.prompts("eval", seed, start, end - start)
    samples = inference.sample(prompts, n, f"eval/{seed}", start, settings.trainer.eval_temperature)
    samples = [replace(sample, stream_index=start + sample.prompt_index) for sample in samples]
    count_failures(session, [sample.failure for sample in samples], "eval_failed", stats)
    rewards: list[list[float]] = [[] for _ in prompts]
    for sample in samples:
        if sample.reward is not None:
            rewards[sample.prompt_index].append(sample.reward)
        sampled = not sample.lost
        if sampled and settings.reward.name != "exact" and task.has_check(prompts[sample.prompt_index]):
            stats.ratio("eval_exact", task.reward(prompts[sample.prompt_index], sample.last_turn.tolist()), 1)
        stats.ratio("eval_length", sample.num_sampled, sampled)
        stats.ratio("eval_truncated", sampled and sample.finish != "stop", sampled)
    gathered: list[list[list[float]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rewards if session.is_replica_leader else [])
    by_prompt = [r for replica in gathered for r in replica if r]  # prompts without any reward are left out
    mean, half_width = confidence_interval(np.array([np.mean(r) for r in by_prompt]))
    values = {"eval_accuracy": mean, "eval_best": float(np.mean([max(r) for r in by_prompt]))}
    if half_width is not None:
        values |= {"eval_accuracy_low": mean - half_width, "eval_accuracy_high": mean + half_width}
    for name, value in values.items():
        stats.ratio(name, value, 1)
    return samples


def confidence_interval(means: np.ndarray, confidence: float = 0.95) -> tuple[float, float | None]:
    """Compute the mean over problems, and half the width of its confidence interval.

    Problems are drawn; the samples to one are not independent of each other, so each problem is one observation a_i,
    its mean. Half the width is t · s / √P with s² = Σ (a_i − mean)² / (P − 1) and t the quantile of Student's
    distribution with P − 1 degrees of freedom: the clustered standard error of arXiv 2411.00640, eq. 4, for clusters of
    equal size, with t in place of the normal quantile, which is too small for few problems.

    Args:
        means: `[P]` float64, a_i.
        confidence: probability that the interval holds the expectation.

    Returns:
        The mean; half the width, in the same unit, or None for a single problem. It is 0 where all problems have one
        mean, and then says nothing.
    """
    mean = float(means.mean())
    if len(means) < 2:
        return mean, None
    quantile = student_quantile((1 + confidence) / 2, len(means) - 1)
    return mean, quantile * float(means.std(ddof=1)) / math.sqrt(len(means))


def student_quantile(p: float, degrees: int) -> float:
    """Compute t with P(T ≤ t) = p of Student's distribution, to double precision.

    Args:
        p: probability, 0.5 ≤ p < 1.
        degrees: of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < p:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _student_cdf(middle, degrees) < p else (low, middle)
    return high


def _student_cdf(t: float, degrees: int) -> float:
    """Compute P(T ≤ t) for t ≥ 0 and whole degrees of freedom, by a finite series (Abramowitz and Stegun, 26.7.3/4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if degrees % 2:
        term = math.cos(angle) * sine
        inside = angle
        for k in range(3, degrees + 1, 2):
            inside += term
            term *= square * (k - 1) / k
        return 0.5 + inside / math.pi
    term, total = 1.0, 0.0
    for k in range(2, degrees + 1, 2):
        total += term
        term *= square * (k - 1) / k
    return 0.5 + sine * total / 2
