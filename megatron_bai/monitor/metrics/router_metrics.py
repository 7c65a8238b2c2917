"""Metrics of routers: where the two engines choose different experts, and how evenly experts are used.

A rank sees its own tokens and MoE layers only (`routing.layout.Place`). Every rank adds what it sees, and statistics
filled here are gathered from every rank. Layers are MoE layers of the whole model, counted from 0.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_bai.monitor.stats import Stats, entropy
from megatron_bai.routing.replay.replay_pass import MicroRoutes, sets_differ
from megatron_bai.routing.replay.route_weights import WeightGap

_LOAD = "expert_load/"


def add_route_mismatch(
    stats: Stats,
    recorded: Sequence[MicroRoutes],
    live: Sequence[MicroRoutes],
    layers: Sequence[int],
    stages: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """Compare the inference engine's routes with those that the training engine's live router chose.

    *Collective* over `stages`.

    `route_mismatch`: the share of (token, layer) routes whose expert sets differ; `route_mismatch/LAYER` of one layer.
    `tokens_route_mismatch`: the share of tokens whose routes differ in one layer at least (arXiv 2510.11370, which
    finds about a tenth of routes and 94 % of tokens).

    Args:
        stats: to add to.
        recorded: routes of the inference engine, by micro-batch; rows that are not `checked` are left out.
        live: routes of the training engine's live router, by micro-batch.
        layers: indices of this rank's MoE layers in the whole model, in the order of the routes.
        stages: the pipeline's group, whose ranks see other layers of the same tokens; None for one stage.

    Returns:
        Of each micro-batch, `[rows]` int16: in how many of this rank's layers a row differs; 0 in rows left out.
    """
    differ = [sets_differ(b.ids, a.ids) for a, b in zip(recorded, live, strict=True)]
    for rows, routes in zip(differ, recorded, strict=True):
        if routes.checked is not None:
            rows &= routes.checked[:, None]
    rows = torch.cat([rows[_checked_rows(routes)] for rows, routes in zip(differ, recorded, strict=True)])
    stats.ratio("route_mismatch", int(rows.sum()), rows.numel())
    for layer, different in zip(layers, rows.sum(0).tolist(), strict=True):
        stats.ratio(f"route_mismatch/{layer}", different, len(rows))
    anywhere = rows.any(1).int()
    if stages is not None:
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=stages)
    stats.mean("tokens_route_mismatch", anywhere)  # every stage adds the same tokens: the mean is unchanged
    return [rows.sum(1, dtype=torch.int16) for rows in differ]


def add_weight_gap(stats: Stats, gap: WeightGap) -> None:
    """Add what the inference engine's weights of experts differ by from the training engine's.

    `route_weight_gap`: mean |difference| over (token, layer, expert); `route_weight_gap_max` the largest.

    Args:
        stats: to add to.
        gap: of this rank.
    """
    stats.ratio("route_weight_gap", float(gap.total), gap.count)
    stats.max("route_weight_gap_max", gap.largest[None])


def add_expert_load(stats: Stats, routes: Sequence[MicroRoutes], layers: Sequence[int]) -> None:
    """Count the experts of the checked rows, layer by layer.

    Args:
        stats: to add to.
        routes: by micro-batch.
        layers: indices of this rank's MoE layers in the whole model, in the order of the routes.
    """
    for micro in routes:
        ids = micro.ids[_checked_rows(micro)]
        for position, layer in enumerate(layers):
            stats.tally(f"{_LOAD}{layer}", ids[:, position])


def add_expert_counts(stats: Stats, counts: torch.Tensor, layer: int) -> None:
    """Add how many tokens chose each expert of a layer.

    Args:
        stats: to add to.
        counts: `[experts]` of any integer dtype.
        layer: index of the MoE layer in the whole model.
    """
    stats.tallies[f"{_LOAD}{layer}"].update({expert: n for expert, n in enumerate(counts.tolist()) if n})


def compute_load_metrics(stats: Stats, num_experts: int) -> dict[str, float]:
    """Compute how evenly the tokens of a step use the experts.

    With p the share of each of a layer's experts:
    `expert_entropy/LAYER`: −Σ p log p in nats; log(num_experts) when all are used alike. `expert_entropy` is the mean
    over layers, and `experts_effective` the mean of its exponential, the number of experts that would be used if those
    used were used alike. `expert_load_max`: the largest p · num_experts of any layer, 1 when all are used alike.
    `experts_unused`: the share of (layer, expert) pairs that no token used.

    Args:
        stats: of the whole step.
        num_experts: of a layer.
    """
    loads = {int(name.removeprefix(_LOAD)): c for name, c in stats.tallies.items() if name.startswith(_LOAD)}
    loads = {layer: counts for layer, counts in sorted(loads.items()) if counts.total()}
    if not loads:
        return {}
    assert all(0 <= expert < num_experts for counts in loads.values() for expert in counts), "an expert id out of range"
    entropies = {layer: entropy(counts) for layer, counts in loads.items()}
    return {f"expert_entropy/{layer}": value for layer, value in entropies.items()} | {
        "expert_entropy": sum(entropies.values()) / len(entropies),
        "experts_effective": sum(map(math.exp, entropies.values())) / len(entropies),
        "expert_load_max": max(max(counts.values()) / counts.total() for counts in loads.values()) * num_experts,
        "experts_unused": 1 - sum(map(len, loads.values())) / (len(loads) * num_experts),
    }


def _checked_rows(routes: MicroRoutes) -> torch.Tensor | slice:
    return slice(None) if routes.checked is None else routes.checked
