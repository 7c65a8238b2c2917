"""How much of its sources' routing a merge keeps: what `init=merge` says before RL begins, and `inspect`.

Merged routers may send tokens elsewhere than either parent's: "routing breakdown" (arXiv 2606.03391).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model.build import MegatronModel
from megatron_bai.model.load_weights import load_weights
from megatron_bai.rl.init_weights import list_merge_sources, load_initial_weights
from megatron_bai.rl.route_probe import LayerRouting, RouteProbe, average_layers
from megatron_bai.rl.session import Session
from megatron_bai.routing.replay.routing_replay import RoutingReplay

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParentRouting:
    """A model's own routing, and that of the merge beside it.

    Attributes:
        path: of the parent's checkpoint.
        layers: of the parent, with what the merge keeps of its routes.
    """

    path: str
    layers: list[LayerRouting]


def compare_routing(
    actor: MegatronModel, replay: RoutingReplay, parents: Sequence[str], sequences: Sequence[Sequence[int]]
) -> tuple[list[LayerRouting], list[ParentRouting]]:
    """Record the routes of the actor's weights on texts, then of each parent's. *Collective*.

    Args:
        actor: with the weights of the merge; has those of the last parent afterwards.
        replay: of its routers.
        parents: directories of checkpoints of the same architecture.
        sequences: token ids of each text, the same on every rank.

    Returns:
        The merge's routing; each parent's, with the shares that the merge keeps.

    Raises:
        UserError: a parent cannot be loaded.
    """
    probe = RouteProbe(actor, replay, sequences)
    merged = probe.record()
    found = []
    for parent in parents:
        load_weights(actor, parent)
        found.append(ParentRouting(str(parent), probe.describe(probe.record(), merged)))
    return probe.describe(merged), found


def measure_merge_routing(session: Session) -> dict[str, float]:
    """Compare the routes of the merge that a run starts from with its sources', and log a line each. *Collective*.

    The actor has the merge's weights before and after; each source is loaded once in between.

    Returns:
        Metrics of the first step, means over layers: `merge_experts_effective`, `merge_route_margin`, and with the
        number i of each source, the pretrained checkpoint first, `merge_routes_kept/i`, `merge_routes_overlap/i`.
        Empty where there is no merge, or a source has another architecture, which is logged.
    """
    settings, init = session.settings, session.settings.init
    if not isinstance(init, config.MergeInit) or not init.routing_prompts:
        return {}
    prompts = session.task.prompts("train", settings.run.seed, 0, init.routing_prompts)
    sequences = [prompt.ids for prompt in prompts]
    parents = list_merge_sources(settings.merge)
    try:
        merged, found = compare_routing(session.actor, session.engine.replay, parents, sequences)
    except UserError as error:  # such as a member that merge.allow_different admitted
        if dist.get_rank() == 0:
            _log.warning("the routes of the merge are not compared with its sources': %s", error)
        return {}
    finally:
        load_initial_weights(session.actor, settings)
    means = average_layers(merged)
    metrics = {"merge_experts_effective": means["experts"], "merge_route_margin": means["margin"]}
    for i, parent in enumerate(found):
        kept = average_layers(parent.layers)
        metrics |= {f"merge_routes_kept/{i}": kept["kept"], f"merge_routes_overlap/{i}": kept["overlap"]}
    if dist.get_rank() == 0:
        _log.info(describe_kept(found, len(sequences)))
    return metrics


def describe_kept(parents: Sequence[ParentRouting], num_prompts: int) -> str:
    """Format what a merge keeps of its parents' routes as a line.

    Args:
        parents: at least one.
        num_prompts: texts on which the routes were recorded.
    """
    shares = []
    for parent in parents:
        means = average_layers(parent.layers)
        least = min(parent.layers, key=lambda layer: layer.kept)
        shares.append(
            f"{Path(parent.path).name} {means['kept']:.1%} (overlap {means['overlap']:.2f}; layer {least.layer} the "
            f"least, {least.kept:.1%})"
        )
    return f"the merge keeps of its sources' routes on {num_prompts} prompts: {'; '.join(shares)}"
