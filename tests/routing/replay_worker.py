"""Run as a script: replay in a live model of one process. Argument: a file to leave the facts in."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moe import MODEL, SIGNATURE, samples

from megatron_bai import backend, config

LENGTH = 24


class Bench:
    """A model with its replay, a batch of rollouts, and a fixed cotangent that makes a loss of its logits."""

    def __init__(self, device: backend.Device):
        from megatron_bai.model import build, checkpoint, shards
        from megatron_bai.rl.batch import from_samples
        from megatron_bai.rl.engine import Engine
        from megatron_bai.routing.replay import RoutingReplay

        trainer = config.Trainer(clip_grad=1e9)
        self.settings = config.Config(model=MODEL, trainer=trainer)
        self.actor = build.build_actor(self.settings, device)
        shards.init_random(self.actor.modules, MODEL, seed=0)
        checkpoint.finish_loading(self.actor)
        self.gpt = self.actor.modules[0]
        self.replay = RoutingReplay(self.actor.modules, SIGNATURE)
        self.engine = Engine(self.actor, self.replay, device.device, temperature=1.0)
        random = np.random.default_rng(11)
        self.batch = from_samples(samples(6, random), random.normal(size=6), LENGTH, 0, SIGNATURE)
        self.cotangent = torch.from_numpy(random.normal(size=(6, LENGTH, MODEL.vocab_size)).astype(np.float32))
        self.routes = self.engine.routes_of(self.batch)
        self.counted = self.batch.routed.T.flatten()
        self.handles = [layer.mlp.router.router_replay for layer in self.gpt.decoder.layers]
        self.maps: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.gpt.decoder.layers):
            layer.mlp.router.register_forward_hook(lambda m, i, out, number=number: self.maps.update({number: out[1]}))

    def forward(self) -> torch.Tensor:
        return self.gpt(self.batch.tokens, torch.arange(LENGTH).expand(6, -1), None)

    def backward(self, logits: torch.Tensor) -> dict[str, Any]:
        """The loss and every gradient by Hugging Face name."""
        chunk = self.actor.chunks[0]
        chunk.zero_grad_buffer()
        loss = (logits * self.cotangent).sum()
        loss.backward()
        gradients = {name: p.main_grad.clone() for name, p in self.gpt.named_parameters()}
        return {"logits": logits.detach(), "loss": loss.detach(), "gradients": self.named(gradients)}

    def named(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors shaped like the parameters, under Hugging Face's names: what the export does with weights."""
        from megatron_bai.model import mapping, shards

        kept = {name: p.detach().clone() for name, p in self.gpt.named_parameters()}
        found = {}
        with torch.no_grad():
            for name, parameter in self.gpt.named_parameters():
                parameter.copy_(values[name])
            for key, index, whole in shards.gather([self.gpt]):
                kind = mapping.kind_of(key)
                found |= {n: t.clone() for n, t in zip(kind.names(index), kind.split(whole, MODEL))}
            for name, parameter in self.gpt.named_parameters():
                parameter.copy_(kept[name])
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return self.named({name: p.detach().clone() for name, p in self.gpt.named_parameters()})

    def leftovers(self) -> list[str]:
        """What the handles still hold."""
        held = []
        for layer, handle in enumerate(self.handles):
            state = (handle.router_replay_action, handle.target_topk_idx, handle.recorded_topk_idx)
            if any(item is not None for item in state) or handle.replay_backward_list:
                held.append(f"layer {layer}: {state}, {len(handle.replay_backward_list)} for the backward pass")
        return held


def identity(bench: Bench) -> dict[str, Any]:
    """A live pass, and one that replays what it chose."""
    recorded: list = []
    with bench.replay.record(recorded):
        logits = bench.forward()
    live = bench.backward(logits)
    held = bench.leftovers()
    with bench.replay.replay(recorded[0], bench.counted):
        logits = bench.forward()
    return {
        "live": live,
        "replayed": bench.backward(logits),
        "recorded": recorded[0],
        "live_maps": dict(bench.maps),
        "held": held + bench.leftovers(),
    }


def forced(bench: Bench) -> dict[str, Any]:
    """Random routes."""
    before = bench.replay.rows
    with bench.replay.replay(bench.routes, bench.counted):
        logits = bench.forward()
    maps = dict(bench.maps)
    return bench.backward(logits) | {
        "maps": maps,
        "tokens": bench.batch.tokens,
        "routes": bench.batch.routes,
        "cotangent": bench.cotangent,
        "rows": bench.replay.rows - before,
        "counted": int(bench.counted.sum()),
        "held": bench.leftovers(),
        "weights": bench.weights(),
    }


def failures(bench: Bench) -> dict[str, str]:
    """What is said when replay does not happen as it should, and whether a live pass works afterwards."""
    from megatron_bai.routing.replay import RoutingReplay
    from megatron_bai.routing.routes import RouteSignature

    layers = list(bench.gpt.decoder.layers)
    found: dict[str, str] = {}
    with torch.no_grad():
        calm = bench.forward()

    def said(name: str, work: Callable[[], object]) -> None:
        try:
            with torch.no_grad():
                work()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        if held := bench.leftovers():
            found[name] += f" LEFT {held}"
        try:
            with torch.no_grad():
                same = torch.equal(bench.forward(), calm)
        except Exception as error:
            same = error
        if same is not True:
            found[name] += f" AFTERWARDS a live pass is another: {same}"

    @contextmanager
    def replaying(routes: dict[int, torch.Tensor]) -> Iterator[None]:
        with bench.replay.replay(routes, bench.counted):
            yield

    def bypass() -> None:
        with replaying(bench.routes):
            bench.handles[2].clear_router_replay_action()
            bench.forward()

    def nothing_runs() -> None:
        with replaying(bench.routes):
            pass

    def one_is_skipped() -> None:
        inner, layers[1].mlp.forward = layers[1].mlp.forward, lambda hidden, *args, **kwargs: (hidden, None)
        try:
            with replaying(bench.routes):
                bench.forward()
        finally:
            layers[1].mlp.forward = inner

    def twice() -> None:
        with replaying(bench.routes):
            bench.forward()
            bench.forward()

    def recorded_twice() -> None:
        with bench.replay.record([]):
            bench.forward()
            bench.forward()

    def duplicates() -> None:
        with replaying(bench.routes | {3: torch.zeros_like(bench.routes[3])}):
            bench.forward()

    def incomplete() -> None:
        with replaying({layer: rows for layer, rows in bench.routes.items() if layer != 3}):
            bench.forward()

    def interrupted() -> None:
        with replaying(bench.routes):
            raise ZeroDivisionError("in the body of replay")

    def interrupted_recording() -> None:
        with bench.replay.record([]):
            raise ZeroDivisionError("in the body of record")

    unbound = RouteSignature(MODEL.num_layers + 1, MODEL.num_experts, MODEL.moe_topk)
    said("a layer is missing", lambda: RoutingReplay(layers[:2] + layers[3:], SIGNATURE))
    said("a layer too few in the signature", lambda: RoutingReplay([bench.gpt], unbound))
    for work in (bypass, nothing_runs, one_is_skipped, twice, recorded_twice, duplicates, incomplete, interrupted,
                 interrupted_recording):
        said(work.__name__.replace("_", " "), work)
    return found


def first_update(device: backend.Device, mode: str) -> dict[str, Any]:
    """One MiniRL update on fresh weights, with live routes or with those recorded in the old-policy pass (R2)."""
    from megatron_bai.rl import objectives

    bench = Bench(device)
    micros = bench.batch.split(3)
    scores = bench.engine.score(micros, record=True)
    bench.batch.old_logprobs.copy_(scores.logprobs)
    routes = scores.recorded if mode == "r2" else None
    stats, norm = bench.engine.update(micros, routes, objectives.get("minirl"), bench.settings.objective)
    state = b"".join(p.detach().numpy().tobytes() for p in bench.gpt.parameters())
    return {"stats": stats.values(), "norm": norm, "weights": hashlib.sha256(state).hexdigest()}


def main() -> None:
    device = backend.start(config.Backend(kind="cpu"))
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from megatron_bai.model import build

    build.init_parallel(config.Parallel(), seed=0)
    abandoned = Bench(device)  # its handles stay in Megatron-Core's global list, ahead of the next model's
    bench = Bench(device)
    everyone = RouterReplay.global_router_replay_instances
    facts: dict[str, Any] = {"identity": identity(bench), "forced": forced(bench), "failures": failures(bench)}
    facts["orphans"] = {
        "handles": len(everyone),
        "first are": all(a is b for a, b in zip(everyone, abandoned.handles)),
        "touched": abandoned.leftovers(),
        "rows": abandoned.replay.rows,
    }
    facts["updates"] = {mode: first_update(device, mode) for mode in ("none", "r2")}
    torch.save(facts, Path(sys.argv[1]))
    backend.stop()


if __name__ == "__main__":
    main()
