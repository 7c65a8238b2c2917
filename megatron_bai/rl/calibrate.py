"""Realign the routers of a merge, layer by layer, with `merge.harc`: what the verb `calibrate` does.

It is a step after the merge and no merge method: it needs the merged model's activations, so a model that runs in some
layout, and texts of each parent, which a merge does not; and it is the same after every method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bai import config
from megatron_bai.distributed.backend import Device
from megatron_bai.errors import UserError
from megatron_bai.merge.harc import Calibration, calibrate_router
from megatron_bai.model import build
from megatron_bai.model.build import MegatronModel
from megatron_bai.model.load_weights import load_weights
from megatron_bai.rl.route_probe import RouteProbe
from megatron_bai.routing.replay.routing_replay import RoutingReplay


@dataclass(frozen=True)
class CalibratedLayer:
    """What calibration did to a layer.

    Attributes:
        layer: decoder layer, counted from 0.
        calibration: its result.
        moved: ‖W − W₀‖ / ‖W₀‖, W₀ the merged router.
    """

    layer: int
    calibration: Calibration
    moved: float


def build_calibrated(
    settings: config.Config, device: Device, texts: Sequence[Sequence[Sequence[int]]]
) -> tuple[MegatronModel, list[CalibratedLayer]]:
    """Build the merge at `calibrate.path` with calibrated routers. *Collective*; process groups must be there.

    A layer's inputs are those of the merged model whose earlier layers are calibrated. Every layer takes one forward
    pass over the texts of each parent.

    Args:
        settings: `calibrate`, `parallel`, and the merge's `Architecture` for a model.
        device: what this process computes on.
        texts: of each parent, token ids of each of its texts, the same on every rank.

    Returns:
        The model; what was done to each layer, equal on every rank.

    Raises:
        UserError: routers or a layout that cannot be calibrated, or a checkpoint that cannot be loaded.
    """
    job = settings.calibrate
    actor = build.build_actor(settings, device, train=False)
    _require_softmax(actor)
    replay = RoutingReplay(actor.modules)
    targets = []
    for parent in job.parents:
        load_weights(actor, parent)
        targets.append({layer: router.weight.detach().clone() for layer, router in replay.routers.items()})
    load_weights(actor, job.path)
    probes = [RouteProbe(actor, replay, own) for own in texts]
    done = []
    for layer, router in replay.routers.items():
        start, inputs = router.weight.detach(), [probe.read_inputs(layer) for probe in probes]
        found = calibrate_router(
            start,
            [own[layer] for own in targets],
            inputs,
            job.gamma,
            job.max_iterations,
            job.tolerance,
            _sum_over_ranks,
        )
        moved = float((found.weight - start.double()).norm() / start.double().norm())
        with torch.no_grad():
            router.weight.copy_(found.weight)
        done.append(CalibratedLayer(layer, found, moved))
    return actor, done


def validate_calibrate(settings: config.Calibrate, parallel: config.Parallel) -> None:
    """Refuse settings that nothing can be calibrated with, before any work.

    Args:
        settings: the group `calibrate`.
        parallel: the layout.

    Raises:
        UserError: names the setting.
    """
    for name in ("path", "output", "parents", "prompts"):
        if not getattr(settings, name):
            raise UserError(f"calibrate.{name} is empty: the merge, its parents, rows of each parent and an output")
    if len(settings.parents) != len(settings.prompts):
        raise UserError(
            f"calibrate.prompts has {len(settings.prompts)} entries for {len(settings.parents)} parents: give each "
            "parent's own rows, in order"
        )
    if Path(settings.output).exists():
        raise UserError(f"{settings.output} exists: remove it or choose another calibrate.output")
    if parallel.pipeline > 1:
        raise UserError("calibrate takes no pipeline stages: leave parallel.pipeline at 1, split experts and tensors")


def _require_softmax(actor: MegatronModel) -> None:
    """Refuse routers whose choice is not the softmax of W x: the curvature would be another's."""
    configured = actor.transformer_config
    if configured.moe_router_score_function != "softmax" or configured.moe_router_enable_expert_bias:
        raise UserError("HARC calibrates routers of softmax without an expert bias: these score by something else")
    routers = [name for name, _ in actor.modules[0].named_parameters() if name.endswith("router.bias")]
    if routers:
        raise UserError("HARC calibrates routers without a bias: these have one")


def _sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over all ranks: each has other tokens, or none."""
    total = values.clone()
    dist.all_reduce(total)
    return total
