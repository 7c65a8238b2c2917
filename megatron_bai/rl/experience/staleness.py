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
from megatron_bai.rl.batches.batch import Batch
from megatron_bai.rl.policy.training_engine import TrainingEngine
from megatron_bai.rl.policy.weight_copy import WeightCopy
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.replay.replay_pass import MicroRoutes


def apply_max_staleness(batch: Batch, samples: list[Sample], version: int, limit: int | None, stats: Stats) -> None:
    """Fill `batch.version_age`, and remove tokens older than `limit` from the mask, in place.

    Adds `stale_fraction`, the share of response tokens of an age over 0; `version_age_mean` and `version_age_max`, over
    response tokens; with a limit `stale_masked`, the share removed.

    Args:
        batch: of the samples.
        samples: of the batch, in its order.
        version: of the step's weights.
        limit: the highest age in the loss (`rollout.max_staleness`); None: no limit.
        stats: gets the metrics.
    """
    for row, sample in enumerate(samples):
        for span in sample.spans:
            age, shift = version - int(span.version), sample.prompt_length - 1
            assert age >= 0, f"a token of version {span.version} in the step of version {version}"
            batch.version_age[row, span.start + shift : span.end + shift] = age
    ages = batch.version_age[batch.mask]
    stats.mean("stale_fraction", ages > 0)
    stats.mean("version_age_mean", ages)
    stats.max("version_age_max", ages)
    if limit is not None:
        batch.mask &= batch.version_age <= limit
        stats.mean("stale_masked", ages > limit)


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

    def score(self, micro_batches: list[Batch], routes: list[MicroRoutes] | None) -> torch.Tensor | None:
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
    stats: Stats,
    batch: Batch,
    previous: torch.Tensor | None,
    live: torch.Tensor | None,
    weighted: torch.Tensor | None = None,
) -> None:
    """Fill `batch.sampled_logprobs`, and add the discrepancy between the engines over tokens for which they are known.

    Metrics of π_old against what sampled older tokens end in `_stale`: they contain the change of weights, too. Those
    of the live router, `_live`, and of the server's experts with its weights, `_weights`, are of tokens of age 0.

    Args:
        stats: gets the metrics.
        batch: with `old_logprobs`.
        previous: `[B, T]` log-probabilities under the previous weights; None: no copy of them.
        live: `[B, T]` log-probabilities under the step's weights without replay; None: not measured.
        weighted: likewise with the server's experts and its weights of them.
    """
    old, age = batch.old_logprobs, batch.version_age
    unknown = torch.full_like(old, float("nan"))
    at_age_1 = unknown if previous is None else previous.cpu()
    batch.sampled_logprobs.copy_(torch.where(age == 0, old, torch.where(age == 1, at_age_1, unknown)))
    known = batch.mask & ~batch.sampled_logprobs.isnan()
    add_discrepancy(stats, "", batch.sampled_logprobs, batch.infer_logprobs, known)
    add_discrepancy(stats, "_stale", old, batch.infer_logprobs, batch.mask & (age > 0))
    for suffix, logprobs in (("_live", live), ("_weights", weighted)):
        if logprobs is not None:
            add_discrepancy(stats, suffix, logprobs.cpu(), batch.infer_logprobs, batch.mask & (age == 0))
