"""Group Sequence Policy Optimization (arXiv 2507.18071, eq. 5 to 7)."""

from megatron_bai import config
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.batch import Batch
from megatron_bai.rl.objectives.checks import check_clipped
from megatron_bai.rl.objectives.correction import corrected
from megatron_bai.rl.objectives.objective import Objective, PerToken
from megatron_bai.rl.objectives.terms import add_clipped, clipped_surrogate, lengths, log_ratio, per_token, whole


def loss(logprobs: PerToken, batch: Batch, settings: config.Gspo) -> tuple[PerToken, Stats]:
    """−min(s·A, clip(s, 1 − clip_low, 1 + clip_high)·A) of each response, s = (π_θ(y)/π_old(y))^(1/|y|).

    Args:
        logprobs: log π_θ, with gradient.
        batch: `mask`, `old_logprobs`, `advantages` (one a sample) and, for a correction, `infer_logprobs` are used.

    Returns:
        Losses, and `clip_fraction`, the share of tokens in responses whose gradient the limit removes, also by
        sign of A.
    """
    mask = batch.mask
    logs = whole(log_ratio(logprobs, batch.old_logprobs, mask)) / lengths(mask)
    advantages = per_token(batch.advantages)
    losses, clipped = clipped_surrogate(logs, advantages, settings.clip_low, settings.clip_high)
    stats = Stats()
    add_clipped(stats, clipped, advantages, mask)
    return corrected(losses, batch, settings, stats), stats


OBJECTIVE = Objective(loss, config.Gspo, mean=lambda settings: "sample_mean", check=check_clipped)
