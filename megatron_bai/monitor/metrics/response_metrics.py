"""Metrics of a step's responses: lengths, rewards, and rewards by length."""

from collections.abc import Mapping, Sequence

import torch

from megatron_bai.monitor.metrics.metric_names import COUNT_PREFIX, PART_PREFIX, REWARD_PREFIX, TOKENS_METRIC
from megatron_bai.monitor.stats import Stats, quantile

QUANTILES = (0.1, 0.5, 0.9)


def add_response_metrics(
    stats: Stats,
    lengths: torch.Tensor,
    truncated: torch.Tensor,
    rewards: torch.Tensor,
    group_size: int,
    bucket: int,
    valid: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
) -> None:
    """Add the metrics of a replica's responses.

    `reward_mean`; `reward_std` and `group_variance`, the means over groups of the standard deviation and of the
    variance of a group's rewards (over its samples, not over one less); `uniform_groups`, the share of groups whose
    rewards are all equal: they have no gradient. `response_length_mean` and `_max` in tokens; `truncated_fraction`,
    responses that ended for another reason than the end of the text.
    `reward_by_length/LOW`: mean reward of the responses of LOW to LOW + bucket − 1 tokens (arXiv 2509.00309).

    Args:
        stats: to add to.
        lengths: `[B]` int64, tokens; the samples of a group are consecutive.
        truncated: `[B]` bool.
        rewards: `[B]` float.
        group_size: samples of a group.
        bucket: width of a length bucket in tokens.
        valid: `[B]` bool, samples that have a reward; None for all. The others count in lengths alone.
        sampled: `[B]` bool, samples that are not lost; None for all.
    """
    valid = torch.ones_like(truncated) if valid is None else valid
    sampled = torch.ones_like(truncated) if sampled is None else sampled
    rewards = rewards.double()
    stats.mean("reward_mean", rewards[valid])
    _add_groups(stats, rewards.reshape(-1, group_size), valid.reshape(-1, group_size))
    stats.mean("response_length_mean", lengths[sampled])
    stats.max("response_length_max", lengths[sampled])
    stats.mean("truncated_fraction", truncated[sampled])
    stats.tally("response_length", lengths[sampled])
    lows = lengths // bucket * bucket
    for low in lows[valid].unique().tolist():
        stats.mean(f"{REWARD_PREFIX}{low}", rewards[valid & (lows == low)])


def add_reward_parts(stats: Stats, parts: Sequence[Mapping[str, float]]) -> None:
    """Add the mean of each part of a reward that is a sum: `reward_part/NAME`, without its weight.

    Args:
        stats: to add to.
        parts: of each sample, by name; empty where it has no reward.
    """
    for name in sorted({name for each in parts for name in each}):
        stats.mean(f"{PART_PREFIX}{name}", torch.tensor([each[name] for each in parts if name in each]).double())


def add_conversation_metrics(stats: Stats, turns: list[int], sampled: list[int], given: list[int], failed: int) -> None:
    """Add the metrics of a replica's conversations, of samples that are not lost.

    `turns_mean`; `env_tokens_fraction`, the share of response tokens that the environment gave; `env_failed_fraction`,
    the share of samples that ended by a failure of the environment.

    Args:
        stats: to add to.
        turns: of the model, of each sample.
        sampled: tokens of each response that the model sampled.
        given: those that the environment gave.
        failed: samples that the environment failed.
    """
    stats.ratio("turns_mean", sum(turns), len(turns))
    stats.ratio("env_tokens_fraction", sum(given), sum(given) + sum(sampled))
    stats.ratio("env_failed_fraction", failed, len(turns))


def _add_groups(stats: Stats, rewards: torch.Tensor, valid: torch.Tensor) -> None:
    """Add metrics of groups, from `[groups, group_size]` tensors; a group without a reward counts in none."""
    rewarded = valid.any(dim=1)
    rewards, valid = rewards[rewarded], valid[rewarded]
    counts = valid.sum(dim=1)
    means = (rewards * valid).sum(dim=1) / counts
    variances = ((rewards - means[:, None]).square() * valid).sum(dim=1) / counts
    stats.mean("reward_std", variances.sqrt())
    stats.mean("group_variance", variances)
    low, high = (rewards.masked_fill(~valid, fill) for fill in (float("inf"), float("-inf")))
    stats.mean("uniform_groups", low.amin(dim=1) == high.amax(dim=1))


def compute_response_metrics(stats: Stats, bucket: int) -> dict[str, float]:
    """Compute the metrics that need the lengths of the whole step.

    `response_length_p10`, `_p50`, `_p90` (see `stats.quantile`), `response_tokens`, their sum, and
    `responses_by_length/LOW`, the number of responses in a length bucket.

    Args:
        stats: of the whole step.
        bucket: width of a length bucket in tokens.
    """
    lengths = stats.tallies.get("response_length")
    if not lengths:
        return {}
    metrics: dict[str, float] = {f"response_length_p{share * 100:g}": quantile(lengths, share) for share in QUANTILES}
    metrics[TOKENS_METRIC] = sum(length * count for length, count in lengths.items())
    for length, count in sorted(lengths.items()):
        name = f"{COUNT_PREFIX}{length // bucket * bucket}"
        metrics[name] = metrics.get(name, 0) + count
    return metrics
