"""Distance of the training engine's policy from the inference engine's, on the tokens the latter sampled.

r = π/μ of a token, π the policy in the training engine and μ in the inference engine, both with the weights the
rollout was made with.
"""

import torch

from megatron_bai.monitor.stats import Stats

RATIO_THRESHOLDS = (1.5, 2.0, 5.0)  # τ


def add_discrepancy(stats: Stats, suffix: str, train: torch.Tensor, infer: torch.Tensor, mask: torch.Tensor) -> None:
    """Add metrics of the discrepancy over response tokens sampled from μ, each name followed by `suffix`.

    `kl_k1` is the mean of log μ − log π in nats (arXiv 2512.01374): an unbiased estimate of KL(μ ‖ π), may be
    negative on a batch. `kl_k3` is the mean of r − 1 − log r (arXiv 2510.11370), another: never negative, less
    variance. `logprob_gap` is the mean of |log r|. `f_1.5`, `f_2`, `f_5` are F(τ), the share of tokens with
    max(r, 1/r) > τ (arXiv 2510.11370).
    `ess_discrepancy` is the effective sample size of the token weights r, see `Stats.sample_size`.
    `perplexity_ratio` is exp((1/|y|) Σ_t log μ − log π), a response's perplexity under π over that under μ: the mean
    over responses with tokens, and `perplexity_ratio_max` the largest.

    Args:
        stats: to add to.
        suffix: of the metrics' names.
        train: `[B, T]` log π, one response a row.
        infer: `[B, T]` log μ.
        mask: `[B, T]` bool, tokens of responses.
    """
    log_ratio = (train - infer).double().masked_fill(~mask, 0.0)
    tokens = log_ratio[mask]
    stats.mean("kl_k1" + suffix, -tokens)
    stats.mean("kl_k3" + suffix, tokens.expm1() - tokens)
    stats.mean("logprob_gap" + suffix, tokens.abs())
    for threshold in RATIO_THRESHOLDS:
        stats.mean(f"f_{threshold:g}{suffix}", tokens.abs().exp() > threshold)
    stats.sample_size("ess_discrepancy" + suffix, tokens.exp())
    lengths = mask.sum(1)
    ratios = (-log_ratio.sum(1)[lengths > 0] / lengths[lengths > 0]).exp()
    stats.mean("perplexity_ratio" + suffix, ratios)
    stats.max("perplexity_ratio_max" + suffix, ratios)
