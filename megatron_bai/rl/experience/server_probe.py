"""Comparison of the two engines where a release of one is not in the table, before a run trains on what they compute.

At each start, before the first step, the servers sample as many responses as a step has, of `_TOKENS` tokens at most,
and nothing of them is kept. A step's own samples would not do: those that a resumed run begins with may come from
servers and weights before it.
"""

import logging
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from megatron_bai.compat import releases
from megatron_bai.config import Config
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.monitor.metrics.discrepancy import add_discrepancy
from megatron_bai.monitor.metrics.router_metrics import add_route_mismatch
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl.batches.micro_batches import make_mini_batches
from megatron_bai.rl.batches.stages import RolloutBatch
from megatron_bai.rl.experience.collector import Collector
from megatron_bai.rollout.client import SampleRequest, sampling_seed
from megatron_bai.rollout.sample import Sample

_log = logging.getLogger(__name__)
_TOKENS = 32  # the most of a response
# Share of routes that may differ between two engines: float32 breaks ties another way; bfloat16 changes a tenth of the
# routes of a large model (arXiv 2510.11370). Rows of another token or layer would nearly all differ.
_ROUTES_FLOAT32, _ROUTES_BFLOAT16 = 0.01, 0.25


def verify_engines(collector: Collector, stages: dist.ProcessGroup) -> None:
    """Refuse engines of releases that are not in the table, unless both compute the same. Collective.

    Args:
        collector: of the run, before its first step; its position in the stream of prompts stays.
        stages: the pipeline's group.

    Raises:
        UserError: as `verify_rows`, or a request failed. Nothing was trained.
    """
    session = collector.session
    untested = {"SGLang": collector.inference.untested, "megatron-core": releases.admitted_megatron()}
    if not any(untested.values()):
        return
    values = _compare_engines(collector, _sample_batch(collector), stages)
    verified = verify_rows(untested, values, session.settings)
    if session.is_rank_0:
        _log.warning(verified)


def _sample_batch(collector: Collector) -> RolloutBatch:
    """Sample the batch of a step, of short responses without rewards. Collective."""
    session, inference, settings = collector.session, collector.inference, collector.settings
    count = collector.prompts_per_replica
    first = session.dp_rank * count
    requests = [
        SampleRequest(i, list(prompt.ids), sampling_seed(f"verify/{settings.run.seed}", first + i, member))
        for i, prompt in enumerate(session.task.prompts("train", settings.run.seed, first, count))
        for member in range(settings.trainer.group_size)
    ]
    samples: list[Sample] = []

    def sample() -> None:
        for result in inference.sample_partial(requests, 0, tokens=_TOKENS) if session.is_replica_leader else ():
            if isinstance(result, UserError):
                raise result
            samples.append(result)

    current_ranks().run_on_all(sample)
    return collector.make_batch(session.send_to_replica(samples if session.is_replica_leader else None))


def _compare_engines(collector: Collector, batch: RolloutBatch, stages: dist.ProcessGroup) -> dict[str, float]:
    """Return `kl_k3_live` and `route_mismatch` of a batch over all ranks, as a step has them. Collective."""
    session, stats, router_stats = collector.session, Stats(), Stats()
    engine = session.engine
    batch, mini_batches = make_mini_batches(batch, collector.settings, Stats(), session.device.device)
    micro_batches = sum(mini_batches, [])
    sampled, live = map(engine.local_routes, micro_batches), engine.score(micro_batches, record=True)
    add_route_mismatch(router_stats, list(sampled), live.routes, engine.replay.columns, stages)
    if live.logprobs is not None:
        add_discrepancy(stats, "_live", live.logprobs.cpu(), batch.infer_logprobs, batch.usable_mask)
    return stats.gather_sum(session.reports_stats).values() | router_stats.gather_sum(True).values()


def verify_rows(untested: Mapping[str, Sequence[str]], values: Mapping[str, float], settings: Config) -> str:
    """Refuse engines of which one's log-probabilities and routes are not the other's with its live router.

    Args:
        untested: releases that are not in the table, by engine.
        values: metrics of what the servers sampled, `kl_k3_live` and `route_mismatch` among them.
        settings: whose `rollout.sync_tolerance` bounds the difference, in nats.

    Returns:
        What was verified, in one line.

    Raises:
        UserError: they differ by more, or there is nothing to compare.
    """
    rounded = "bfloat16" in (settings.rollout.dtype, settings.backend.dtype) or bool(settings.rollout.quantize)
    tolerance, routes = settings.rollout.sync_tolerance, _ROUTES_BFLOAT16 if rounded else _ROUTES_FLOAT32
    gap = abs(2 * values.get("kl_k3_live", float("nan"))) ** 0.5  # r − 1 − log r is half the square of a small log r
    differ = values.get("route_mismatch", float("nan"))
    found = (
        f"of a first rollout, the server's log-probabilities are {gap:.2g} nats (root mean square) from the training "
        f"engine's, and {differ:.2%} of its routes differ"
    )
    known = {"SGLang": ", ".join(releases.SERVERS), "megatron-core": releases.list_megatron()}
    named = [engine for engine, its_releases in untested.items() if its_releases]
    name = " and ".join(f"{engine} {', '.join(untested[engine])}" for engine in named)
    name += ", which no one has tried,"
    if not (gap <= tolerance and differ <= routes):
        remedy = " and ".join(f"one of {engine} {known[engine]}" for engine in named)
        raise UserError(
            f"{name} is refused: {found}; allowed are rollout.sync_tolerance={tolerance:g} nats and {routes:.0%}. Use "
            f"{remedy}"
        )
    return f"{name} is verified: {found}"
