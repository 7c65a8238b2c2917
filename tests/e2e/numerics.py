"""Run by torchrun: compares the two engines on the same weights, before and after an update, and writes what it found.

`numerics.py RESULT OVERRIDE …`; every rank takes part, rank 0 writes. The settings are those of the verb train.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from megatron_bai import config
from megatron_bai.model import megatron_checkpoint, param_shards
from megatron_bai.monitor.metrics.discrepancy import add_discrepancy
from megatron_bai.monitor.metrics.router_metrics import add_weight_gap
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.batch import from_samples
from megatron_bai.rl.batches.stages import RolloutBatch, make_scored_batch, make_training_batch
from megatron_bai.rl.batches.token_batch import padded_length
from megatron_bai.rl.experience.inference_engine import InferenceEngine, start_inference
from megatron_bai.rl.session import Session, open_session
from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.quantize import FORMATS
from megatron_bai.routing.replay.replay_pass import MicroRoutes, sets_differ

_PROMPTS, _GROUP = 8, 4
TIE = 1e-4  # of two experts' scores, in nats: what log-probabilities of the engines are held to, too


def measure(session: Session, inference: InferenceEngine) -> dict[str, Any]:
    """Everything, in the order of a training step. Collective."""
    batch, fed = _rollout(session, inference)
    found: dict[str, Any] = {"version": control.weight_version(inference._servers.urls[0])}
    found["live"] = _live(session, batch, fed)
    before = _score(session, inference, batch)
    found["before"] = before["gap"]
    found["updates"] = [_update(session, batch) for _ in range(2)]  # the second: routes of older weights
    # The server still has the old weights: its log-probabilities must be far from the trainer's now.
    found["unsynced"] = _score(session, inference, batch)["gap"]
    inference.sync()
    after = _score(session, inference, batch)
    found |= {"after": after["gap"], "sync_gap": inference.sync_gap, "trainer_version": inference.version}
    found["moved"] = float(np.abs(after["theirs"] - before["theirs"]).max())
    found["server_version"] = control.weight_version(inference._servers.urls[0])
    found["fresh"] = _live(session, *_rollout(session, inference, seed=1))
    # Random weights: those of a tiny model that has learned route so surely that rounding changes one route in a
    # hundred.
    param_shards.init_random(session.actor.modules, replace(session.settings.model, init_std=0.1), seed=0)
    megatron_checkpoint.reload_master_weights(session.actor)
    found["quantized"] = {form: _quantized(session, inference, form) for form in FORMATS}
    return found


def _rollout(session: Session, inference: InferenceEngine, seed: int = 0) -> tuple[RolloutBatch, int]:
    """A batch, and the tokens in it that were fed to the rollout model: all but each sample's last."""
    prompts = session.task.prompts("train", seed, 0, _PROMPTS)
    samples = inference.sample(prompts, _GROUP, seed)
    length = padded_length(max(len(sample.tokens) for sample in samples), session.engine.place.multiple)
    advantages = np.resize([1.0, -1.0], len(samples))  # whatever was sampled: there must be a gradient
    pad = session.task.tokenizer.pad_token_id
    batch = from_samples(samples, advantages, length, pad, session.signature, weighted=True)
    return batch, sum(len(sample.tokens) - 1 for sample in samples)


def _live(session: Session, batch: RolloutBatch, fed: int) -> dict[str, Any]:
    """Megatron's own forward, and one with the server's routes, beside what SGLang said when it sampled."""
    scores = session.engine.score([batch], record=True)
    forced = session.engine.score([batch], [session.engine.local_routes(batch)])
    weighted, gap = session.engine.score_weights([batch])
    different, rows = _compare(session, batch, scores.routes[0])
    wrong, tied = _judged(session, batch)
    each_way = (scores.logprobs, forced.logprobs, weighted)
    live, replayed, with_weights = ((each - batch.infer_logprobs)[batch.usable_mask].abs() for each in each_way)
    return {
        "logprobs": float(live.max()),
        "logprobs_replayed": float(replayed.max()),
        "logprobs_weighted": float(with_weights.max()),
        "weight_gap": max(_gathered({"largest": float(gap.largest)}), key=lambda each: each["largest"])["largest"],
        "weights": _sum([gap.count])[0],
        "tokens": live.numel(),
        "routes_different": different,
        "routes_wrong": wrong,
        "routes_tied": tied,
        "routes": rows,
        "routes_expected": fed * session.signature.moe_layers,
    }


def _quantized(session: Session, inference: InferenceEngine, form: str) -> dict[str, float]:
    """The discrepancy from a server of rounded weights: without replay (`_live`) and with the server's routes."""
    session.settings.rollout.quantize, session.settings.rollout.sync_tolerance = form, 1.0
    inference.sync()
    batch, _ = _rollout(session, inference, seed=2)
    live = session.engine.score([batch], record=True)
    replayed = session.engine.score([batch], [session.engine.local_routes(batch)])
    weighted, gap = session.engine.score_weights([batch])
    different, rows = _compare(session, batch, live.routes[0])
    stats = Stats()
    for suffix, logprobs in (("_live", live.logprobs), ("", replayed.logprobs), ("_weights", weighted)):
        add_discrepancy(stats, suffix, logprobs, batch.infer_logprobs, batch.usable_mask)
    add_weight_gap(stats, gap)
    return {**stats.values(), "route_mismatch": different / rows, "sync_gap": inference.sync_gap}


def _compare(session: Session, batch: RolloutBatch, ours: MicroRoutes) -> tuple[int, int]:
    """Of the (token, layer) routes the server recorded: how many differ from `ours`, and how many there are."""
    theirs = session.engine.local_routes(batch)
    different = sets_differ(ours.ids, theirs.ids)[theirs.checked]
    return _sum([int(different.sum()), different.numel()])


def _judged(session: Session, batch: RolloutBatch) -> tuple[int, int]:
    """Of the routes the server recorded: how many our routers contradict, and how many rounding may have decided.

    The server's routes are forced, so that each router sees what the server's saw, to rounding, whatever was chosen
    before. Then the experts that it scores best must be the server's, unless the last one that is and the first one
    that is not are tied.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    routes = session.engine.local_routes(batch)
    theirs, checked = dict(zip(session.engine.replay.layers, routes.ids.long().unbind(dim=1))), routes.checked
    margins: list[torch.Tensor] = []

    def watch(router: Any, original: Any) -> Any:
        def gate(hidden: torch.Tensor) -> torch.Tensor:
            scores = original(hidden)
            flat, chosen = scores.detach().flatten(0, -2).float(), theirs[router.layer_number - 1]
            is_chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True)
            worst, best = (
                flat.masked_fill(~is_chosen, torch.inf).amin(1),
                flat.masked_fill(is_chosen, -torch.inf).amax(1),
            )
            margins.append((worst - best)[checked])
            return scores

        return gate

    routers = [m for module in session.actor.modules for m in module.modules() if isinstance(m, TopKRouter)]
    originals = [router.gating for router in routers]
    for router, original in zip(routers, originals):
        router.gating = watch(router, original)
    session.engine.score([batch], [routes])
    for router, original in zip(routers, originals):
        router.gating = original
    margin = torch.cat(margins)
    wrong, tied, rows = _sum([int((margin < -TIE).sum()), int((margin.abs() <= TIE).sum()), len(margin)])
    assert rows == _compare(session, batch, routes)[1], "a router was not seen"
    return wrong, tied


def _score(session: Session, inference: InferenceEngine, batch: RolloutBatch) -> dict[str, Any]:
    """What the log-probabilities of nine in ten of the batch's tokens differ by at most, at temperature 1.

    Not all of them: where two experts are almost tied, rounding may choose another, and the tokens after it see that.
    """
    ours = session.engine.score_probe(batch.tokens)
    assert ours is not None
    if not session.is_rank_0:
        return {"gap": None, "theirs": np.zeros(1)}
    lengths = batch.routed.sum(dim=1).tolist()  # of a sequence less its last token
    theirs = inference._client.score([row[: n + 1].tolist() for row, n in zip(batch.tokens, lengths)])
    mine = [row[:n].numpy() for row, n in zip(ours, lengths)]
    gaps = np.abs(np.concatenate(mine) - np.concatenate(theirs))
    return {"gap": float(np.quantile(gaps, 0.9)), "theirs": np.concatenate(theirs)}


def _update(session: Session, batch: RolloutBatch) -> dict[str, Any]:
    """One optimizer step with the server's routes: which experts ran, and what reached the routers."""
    engine = session.engine
    live_wrong, _ = _judged(session, batch)
    scored = make_scored_batch(batch, engine.score([batch], [engine.local_routes(batch)]).logprobs)
    training = make_training_batch(scored)
    replayed = engine.replay.rows
    with _experts_used(session, batch) as used:
        objective = objectives.get(session.settings.objective.name)
        _, norm = engine.update([training], [engine.local_routes(batch)], objective, session.settings.objective)
    rows, same = _sum([engine.replay.rows - replayed, sum(used)])
    routers = [
        (name, parameter.main_grad.abs().max().item())
        for module in session.actor.modules
        for name, parameter in module.named_parameters()
        if name.endswith("router.weight")
    ]
    return {
        "grad_norm": norm,
        "live_wrong": live_wrong,
        "rows_replayed": rows,
        "rows_used": same,
        "rows_expected": int(batch.routed.sum()) * session.signature.moe_layers,
        "router_gradients": _gathered(dict(routers)),
    }


@contextmanager
def _experts_used(session: Session, batch: RolloutBatch) -> Iterator[list[int]]:
    """Count the recorded rows whose tokens each MoE layer sent to the server's experts, as its dispatcher sees them.

    Measured behind the router and apart from `RoutingReplay`, from the probabilities that weight the experts' outputs:
    the experts with a positive one are those that the token used.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    routes = session.engine.local_routes(batch)
    theirs, routed = dict(zip(session.engine.replay.layers, routes.ids.long().unbind(dim=1))), routes.checked
    counts: list[int] = []

    def watch(layer: int, original: Any) -> Any:
        def dispatch(hidden: torch.Tensor, routing_map: torch.Tensor, probabilities: torch.Tensor) -> Any:
            wanted = torch.zeros_like(routing_map).scatter_(1, theirs[layer], True)
            sent = (routing_map == wanted).all(dim=1) & ((probabilities > 0) == wanted).all(dim=1)
            counts.append(int((sent & routed).sum()))
            return original(hidden, routing_map, probabilities)

        return dispatch

    layers = [m for module in session.actor.modules for m in module.modules() if isinstance(m, MoELayer)]
    originals = [layer.token_dispatcher.dispatch_preprocess for layer in layers]
    for layer, original in zip(layers, originals):
        layer.token_dispatcher.dispatch_preprocess = watch(layer.layer_number - 1, original)
    yield counts
    for layer, original in zip(layers, originals):
        layer.token_dispatcher.dispatch_preprocess = original


def _gathered(value: dict[str, float]) -> list[dict[str, float]]:
    """Every rank's."""
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _sum(values: list[int]) -> list[int]:
    """Over the ranks. Collective."""
    tensor = torch.tensor(values)
    dist.all_reduce(tensor)
    return tensor.tolist()


def main(result: Path, overrides: list[str]) -> None:
    config.register_schema()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())):
        settings: Any = OmegaConf.to_object(hydra.compose("config", overrides=overrides))
    with open_session(settings) as session, start_inference(session) as inference:
        found = measure(session, inference)
        if session.is_rank_0:
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
