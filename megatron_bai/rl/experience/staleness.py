"""Staleness of the weights that sampled a token, and what the trainer still has of them.

A token's version age is the number of weight syncs between the version that sampled it and the step's: 0 unless
rollouts are partial or overlapping. With v the version that sampled it, μ_v the inference engine's policy then and π_v
the training engine's with the same weights, the two factors of objectives.md are, for any age,

    π_θ/μ_v  =  π_v/μ_v                               ×  π_θ/π_v
                discrepancy, between the engines         staleness: of the version, and of the step's updates

μ_v is what the rollout recorded, so that every weight π/μ_v is exact. π_v is π_old at age 0. At age 1 the trainer can
score with the previous weights, if it has a copy (`rollout.measure_sampled`). Older ones are gone: such tokens are in
no mean of the two factors, but in those of the product (`is_weight_mean`, `ess`) and in metrics that end in `_stale`.
"""

import torch

from megatron_bai.monitor.metrics.discrepancy import add_discrepancy
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.stages import RolloutBatch, ScoredBatch
from megatron_bai.rl.policy.training_engine import TrainingEngine
from megatron_bai.rl.policy.weight_copy import WeightCopy
from megatron_bai.routing.replay.replay_pass import MicroRoutes


def find_fresh_tokens(batch: RolloutBatch, limit: int | None, stats: Stats) -> torch.Tensor:
    """Return the tokens that are not older than `limit`, `[B, T]` bool.

    Adds `stale_fraction`, the share of response tokens of an age over 0; `version_age_mean` and `version_age_max`, over
    response tokens; with a limit `stale_masked`, the share removed.

    Args:
        batch: with ages.
        limit: the highest age in the loss (`rollout.max_staleness`); None: no limit.
        stats: gets the metrics.
    """
    ages = batch.version_age[batch.response_mask]
    stats.mean("stale_fraction", ages > 0)
    stats.mean("version_age_mean", ages)
    stats.max("version_age_max", ages)
    if limit is None:
        return torch.ones_like(batch.response_mask)
    stats.mean("stale_masked", ages > limit)
    return batch.version_age <= limit


class PreviousWeights:
    """A copy of the weights of the step before, which sampled an overlapping rollout: one more model on each rank."""

    def __init__(self, engine: TrainingEngine):
        self._engine = engine
        self._copy: WeightCopy | None = None

    @property
    def available(self) -> bool:
        """Whether there is a copy: not in the first step after a start."""
        return self._copy is not None

    def capture(self) -> None:
        """Copy the actor's current weights, in place of the earlier copy."""
        if self._copy is None:
            self._copy = WeightCopy(self._engine.actor)
        else:
            self._copy.refresh()

    def score(self, micro_batches: list[RolloutBatch], routes: list[MicroRoutes] | None) -> torch.Tensor | None:
        """Compute log-probabilities under the previous weights. Collective.

        Args:
            micro_batches: as in `TrainingEngine.score`.
            routes: likewise.

        Returns:
            `[B, T]` float32; None on ranks without the last stage, and if there is no copy.
        """
        if self._copy is None:
            return None
        with self._copy.swapped_in():
            return self._engine.score(micro_batches, routes).logprobs


def add_discrepancies(
    stats: Stats, batch: ScoredBatch, live: torch.Tensor | None, weighted: torch.Tensor | None = None
) -> None:
    """Add the discrepancy between the engines over usable tokens for which `sampled_logprobs` are known.

    Metrics of π_old against what sampled older tokens end in `_stale`: they contain the change of weights, too. Those
    of the live router, `_live`, and of the server's experts with its weights, `_weights`, are of tokens of age 0.

    Args:
        stats: gets the metrics.
        batch: of this replica.
        live: `[B, T]` log-probabilities under the step's weights without replay; None: not measured.
        weighted: likewise with the server's experts and its weights of them.
    """
    old, age = batch.old_logprobs, batch.version_age
    known = batch.usable_mask & ~batch.sampled_logprobs.isnan()
    add_discrepancy(stats, "", batch.sampled_logprobs, batch.infer_logprobs, known)
    add_discrepancy(stats, "_stale", old, batch.infer_logprobs, batch.usable_mask & (age > 0))
    for suffix, logprobs in (("_live", live), ("_weights", weighted)):
        if logprobs is not None:
            add_discrepancy(stats, suffix, logprobs.cpu(), batch.infer_logprobs, batch.usable_mask & (age == 0))
