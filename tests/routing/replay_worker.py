"""Run as a script: replay in live models of one process. Argument: a file to leave the facts in."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from moe import ARCHITECTURE, MODEL, samples
from routing import router_cases
from routing.layouts_worker import leftovers

from megatron_bai import config
from megatron_bai.distributed import backend

LENGTH = 24


class Bench:
    """A model with its replay, a batch of rollouts, and a fixed cotangent that makes a loss of its logits."""

    def __init__(self, device: backend.Device, recompute: str = "none"):
        from megatron_bai.model import build, megatron_checkpoint, param_shards
        from megatron_bai.rl.batches.batch import from_samples
        from megatron_bai.rl.policy.training_engine import TrainingEngine
        from megatron_bai.routing.replay.routing_replay import RoutingReplay

        trainer = config.Trainer(clip_grad=1e9)
        self.settings = config.Config(model=MODEL, trainer=trainer, parallel=config.Parallel(recompute=recompute))
        self.actor = build.build_actor(self.settings, device)
        param_shards.init_random(self.actor.modules, MODEL, seed=0)
        megatron_checkpoint.reload_master_weights(self.actor)
        self.gpt = self.actor.modules[0]
        self.replay = RoutingReplay(self.actor.chunks)
        self.engine = TrainingEngine(self.actor, self.replay, device.device, temperature=1.0)
        random = np.random.default_rng(11)
        self.batch = from_samples(samples(6, random), random.normal(size=6), LENGTH, 0, self.replay.signature)
        self.cotangent = torch.from_numpy(random.normal(size=(6, LENGTH, MODEL.vocab_size)).astype(np.float32))
        self.routes = self.engine.local_routes(self.batch)
        self.routers = [layer.mlp.router for layer in self.gpt.decoder.layers]
        self.handles = [router.router_replay for router in self.routers]
        self.maps: dict[int, torch.Tensor] = {}

    def watch(self) -> None:
        """Keep what each router chose last, apart from `RoutingReplay`: from what the dispatcher is given."""
        for number, layer in enumerate(self.gpt.decoder.layers):
            inner = layer.mlp.token_dispatcher.dispatch_preprocess

            def dispatch(hidden: Any, chosen: Any, probs: Any, number: int = number, inner: Any = inner) -> Any:
                self.maps[number] = chosen
                return inner(hidden, chosen, probs)

            layer.mlp.token_dispatcher.dispatch_preprocess = dispatch

    def forward(self, rows: slice = slice(None)) -> torch.Tensor:
        tokens = self.batch.tokens[rows]
        return self.gpt(tokens, torch.arange(LENGTH).expand(len(tokens), -1), None)

    def loss(self, rows: slice = slice(None)) -> torch.Tensor:
        return (self.forward(rows) * self.cotangent[rows]).sum()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every gradient by Hugging Face name; cleared for the next."""
        found = self.named({name: p.main_grad.clone() for name, p in self.gpt.named_parameters()})
        self.actor.chunks[0].zero_grad_buffer()
        return found

    def backward(self, logits: torch.Tensor) -> dict[str, Any]:
        loss = (logits * self.cotangent).sum()
        loss.backward()
        return {"logits": logits.detach(), "loss": loss.detach(), "gradients": self.gradients()}

    def named(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors shaped like the parameters, under Hugging Face's names: what the export does with weights."""
        from megatron_bai.model import gather, hf_mapping

        kept = {name: p.detach().clone() for name, p in self.gpt.named_parameters()}
        found = {}
        with torch.no_grad():
            for name, parameter in self.gpt.named_parameters():
                parameter.copy_(values[name])
            for key, index, whole in gather.gather_slices([self.gpt]):
                kind = hf_mapping.mapping_of(key, ARCHITECTURE)
                found |= {n: t.clone() for n, t in zip(kind.names(index), kind.split(whole, ARCHITECTURE))}
            for name, parameter in self.gpt.named_parameters():
                parameter.copy_(kept[name])
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return self.named({name: p.detach().clone() for name, p in self.gpt.named_parameters()})

    def held(self) -> list[str]:
        return leftovers([self.gpt])


def identity(bench: Bench) -> dict[str, Any]:
    """A live pass, and one that replays what it chose."""
    with bench.replay.record() as recorded:
        logits = bench.forward()
        live = bench.backward(logits)
    held, maps = bench.held(), dict(bench.maps)
    with bench.replay.force(recorded):
        replayed = bench.backward(bench.forward())
    return {
        "live": live, "replayed": replayed, "recorded": recorded[0].ids, "live_maps": maps, "held": held + bench.held()
    }  # fmt: skip


def forced(bench: Bench) -> dict[str, Any]:
    """Random routes."""
    before = bench.replay.rows
    with bench.replay.force([bench.routes]):
        logits = bench.forward()
        maps = dict(bench.maps)
        found = bench.backward(logits)
    return found | {
        "maps": maps,
        "tokens": bench.batch.tokens,
        "routes": bench.batch.routes,
        "cotangent": bench.cotangent,
        "rows": bench.replay.rows - before,
        "counted": int(bench.routes.checked.sum()),
        "held": bench.held(),
        "weights": bench.weights(),
    }


def weights(bench: Bench) -> dict[str, Any]:
    """The router's own weights of forced experts given back to it; others in some rows, in the first layer by hand."""
    from megatron_bai.routing.replay.route_weights import force_weights

    ids, checked, own = bench.routes.ids.long(), bench.routes.checked, []
    watches = [
        router.register_forward_hook(lambda router, inputs, output, i=i: own.append(output[0].gather(1, ids[:, i])))
        for i, router in enumerate(bench.routers)
    ]

    def forward(*given: torch.Tensor, grad: bool = False, passes: int = 1) -> torch.Tensor:
        routes = [bench.routes] * len(given)
        with torch.set_grad_enabled(grad), bench.replay.force([bench.routes] * passes):
            if not given:
                return bench.forward()
            with force_weights(bench.replay, routes, given) as gap:
                found = [bench.forward() for _ in range(passes)][-1]
        gaps.append((float(gap.total), gap.count, float(gap.largest)))
        return found

    gaps: list[tuple[float, int, float]] = []
    plain = forward()
    for watch in watches:
        watch.remove()
    given = torch.stack(own, dim=1)
    elsewhere = given.clone()
    elsewhere[~checked] = 100.0  # in rows that are not the rollout's
    found: dict[str, Any] = {"plain": plain, "own": forward(given), "elsewhere": forward(elsewhere)}
    outputs: list[torch.Tensor] = []
    watch = bench.gpt.decoder.layers[0].mlp.register_forward_hook(lambda *a: outputs.append(a[2][0].flatten(0, 1)))
    mixed = torch.rand(given.shape, generator=torch.Generator().manual_seed(2))
    slots = [torch.zeros_like(given).index_fill_(2, torch.tensor([slot]), 1.0) for slot in range(MODEL.moe_topk)]
    for each in (mixed, *slots):
        forward(each)
    watch.remove()
    found |= {"outputs": outputs, "mixed": mixed[:, 0], "checked": checked, "gaps": gaps}
    said = {}
    for name, call in {
        "gradient": lambda: forward(given, grad=True),
        "other rows": lambda: forward(given[1:]),
        "a layer less": lambda: forward(given[:, 1:]),
        "not floats": lambda: forward(given.long()),
        "too seldom": lambda: forward(given, given),
        "too often": lambda: forward(given, passes=2),
    }.items():
        try:
            call()
            said[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return found | {"said": said, "held": bench.held(), "after": forward()}


def partial(bench: Bench, again: Bench) -> dict[str, Any]:
    """Every third row has no recording: there the router chooses. `again` recomputes the same model."""
    from megatron_bai.routing.replay.replay_pass import MicroRoutes

    missing = bench.batch.routed & (torch.arange(LENGTH) % 3 == 1)
    live, counted = missing.T.flatten(), (bench.batch.routed & ~missing).T.flatten()
    routes = MicroRoutes(bench.routes.ids, counted, live)
    found: dict[str, Any] = {"live": live, "wanted": bench.routes.ids}
    for name, own in (("plain", bench), ("recomputed", again)):
        before = own.replay.rows, own.replay.recomputed
        with own.replay.force([routes]):
            logits = own.forward()
            found[name] = own.backward(logits) | {"maps": dict(own.maps)}
        counts = own.replay.rows - before[0], own.replay.recomputed - before[1]
        found[name] |= {"counts": counts, "held": own.held()}
    found["counted"] = int(counted.sum())
    # The routers' own choice given everything before them: live rows are what a live router would do there.
    all_live = MicroRoutes(bench.routes.ids, torch.zeros_like(live), torch.ones_like(live))
    with bench.replay.force([all_live]), torch.no_grad():
        found["all_live"] = bench.forward()
    with torch.no_grad():
        found["free"] = bench.forward()
    return found


def orders(plain: Bench, again: Bench) -> dict[str, Any]:
    """Two micro-batches whose passes overlap, with every layer recomputed."""
    first, second = slice(0, 2), slice(2, 6)
    routes = [plain.engine.local_routes(micro) for micro in (plain.batch.split(2)[0], plain.batch.split(2)[1])]
    routes[1] = plain.engine.local_routes(plain.batch.reorder(second))
    found: dict[str, Any] = {}
    for name, own in (("plain", plain), ("recomputed", again)):
        with own.replay.force(routes):
            losses = [own.loss(first), own.loss(second)]
            for loss in losses:
                loss.backward()
        found[name] = own.gradients()
    with again.replay.record() as recorded:
        losses = [again.loss(first), again.loss(second)]
        for loss in losses:
            loss.backward()
    again.gradients()
    found["recorded"] = [len(micro.ids) for micro in recorded]
    try:
        with again.replay.force([routes[0], routes[0]]):
            losses = [again.loss(slice(0, 2)), again.loss(slice(2, 4))]
            for loss in reversed(losses):
                loss.backward()
        found["reversed"] = "nothing"
    except RuntimeError as error:
        found["reversed"] = str(error)
    again.gradients()
    try:
        with again.replay.force(routes):
            again.loss(first).backward()
            again.loss(second)
        found["half"] = "nothing"
    except RuntimeError as error:
        found["half"] = str(error)
    again.gradients()
    return found


def failures(bench: Bench) -> dict[str, str]:
    """What is said when replay does not happen as it should, and whether a live pass works afterwards."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    from megatron_bai.routing.replay.replay_pass import MicroRoutes
    from megatron_bai.routing.replay.router_binding import bind_routers

    layers = list(bench.gpt.decoder.layers)
    force, record, ids = bench.replay.force, bench.replay.record, bench.routes.ids
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
        if held := bench.held():
            found[name] += f" LEFT {held}"
        try:
            with torch.no_grad():
                same = torch.equal(bench.forward(), calm)
                with force([bench.routes]):
                    bench.forward()
        except Exception as error:
            same = error
        if same is not True:
            found[name] += f" AFTERWARDS a live pass is another: {same}"

    def forcing(*micros: MicroRoutes, passes: int = 1) -> None:
        with force(micros):
            for _ in range(passes):
                bench.forward()

    def changed(edit: Callable[[torch.Tensor], object]) -> MicroRoutes:
        own = ids.long().clone()
        edit(own)
        return MicroRoutes(own)

    def briefly(target: Any, name: str, value: Any, work: Callable[[], object]) -> None:
        kept = getattr(target, name)
        setattr(target, name, value)
        try:
            work()
        finally:
            setattr(target, name, kept)

    def fused(logits: torch.Tensor, padding_mask: Any = None) -> Any:
        return topk_routing_with_score_function(logits.view(-1, MODEL.num_experts), MODEL.moe_topk)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("in the middle of the model")

    def one_twice() -> None:
        with record():
            bench.forward()
            bench.routers[1](torch.zeros(2, 1, MODEL.hidden_size))

    def nothing_recorded() -> None:
        with record():
            pass

    def nested() -> None:
        with force([bench.routes]), record():
            bench.forward()

    def interrupted() -> None:
        with force([bench.routes]):
            bench.forward()
            raise ZeroDivisionError("in the body of force")

    def interrupted_recording() -> None:
        with record() as into:
            bench.forward()
            raise ZeroDivisionError("in the body of record")
        assert not into

    skip = lambda hidden, *args, **kwargs: (hidden, None)  # noqa: E731
    said("a layer is missing", lambda: bind_routers(layers[:2] + layers[3:], range(4)))
    said("a layer too few", lambda: bind_routers([bench.gpt], range(5)))
    said(
        "two of one layer",
        lambda: briefly(bench.routers[2], "layer_number", 2, lambda: bind_routers([bench.gpt], range(4))),
    )
    said(
        "no handle",
        lambda: briefly(bench.routers[1], "router_replay", None, lambda: bind_routers([bench.gpt], range(4))),
    )
    said("bypass", lambda: briefly(bench.routers[2], "routing", fused, lambda: forcing(bench.routes)))
    said("nothing runs", lambda: forcing(bench.routes, passes=0))
    said("nothing is recorded", nothing_recorded)
    said("one is skipped", lambda: briefly(layers[1].mlp, "forward", skip, lambda: forcing(bench.routes)))
    said("too often", lambda: forcing(bench.routes, passes=2))
    said("too seldom", lambda: forcing(bench.routes, bench.routes))
    said("unevenly recorded", one_twice)
    said("nested", nested)
    said("duplicates", lambda: forcing(changed(lambda own: own[5, 3].fill_(1))))
    said("out of range", lambda: forcing(changed(lambda own: own[5, 3].copy_(torch.tensor([1, 8])))))
    said("negative", lambda: forcing(changed(lambda own: own[5, 3].copy_(torch.tensor([-1, 1])))))
    said("not ids", lambda: forcing(MicroRoutes(ids.float())))
    said("a layer less", lambda: forcing(MicroRoutes(ids[:, 1:])))
    said("other rows", lambda: forcing(MicroRoutes(ids[1:])))
    said("another mask", lambda: forcing(MicroRoutes(ids, bench.routes.checked[1:])))
    said("interrupted", interrupted)
    said("interrupted recording", interrupted_recording)
    said("failing layer", lambda: briefly(layers[2].mlp.experts, "forward", fails, lambda: forcing(bench.routes)))
    said("failing router", lambda: briefly(bench.routers[2], "routing", fails, lambda: forcing(bench.routes)))
    return found


def first_update(device: backend.Device, mode: str) -> dict[str, Any]:
    """One MiniRL update on fresh weights, with live routes or with those recorded in the old-policy pass (R2)."""
    from megatron_bai.rl import objectives
    from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch

    bench = Bench(device)
    micros = bench.batch.split(3)
    scores = bench.engine.score(micros, record=True)
    training = make_training_batch(make_scored_batch(bench.batch, scores.logprobs))
    routes = scores.routes if mode == "r2" else None
    stats, norm = bench.engine.update(training.split(3), routes, objectives.get("minirl"), bench.settings.objective)
    state = b"".join(p.detach().numpy().tobytes() for p in bench.gpt.parameters())
    return {"stats": stats.values(), "norm": norm, "weights": hashlib.sha256(state).hexdigest()}


def training_steps(device: backend.Device) -> dict[str, Any]:
    """A step of the trainer on rollouts of which some rows have no route, by policy: its metrics, or what it says."""
    from megatron_bai.errors import UserError
    from megatron_bai.rl.trainer import TrainingLoop

    rollouts = samples(8, np.random.default_rng(5))
    holes = [np.arange(len(sample.routes)) % 4 != 2 for sample in rollouts]
    rewards = [float(len(sample.response) % 2) for sample in rollouts]
    rollouts = [
        replace(sample, route_mask=known, reward=reward) for sample, known, reward in zip(rollouts, holes, rewards)
    ]
    targets = sum(int((~known[sample.prompt_length - 1 :]).sum()) for sample, known in zip(rollouts, holes))
    counts = {
        "missing": sum(int((~known).sum()) for known in holes),
        "fed": sum(len(known) for known in holes),
        "masked": targets,
        "tokens": sum(len(sample.response) for sample in rollouts),
    }
    servers = {"version": 0, "sync_gap": 0.0}
    inference = SimpleNamespace(**servers, sync=lambda: None, sample=lambda *args, **kwargs: rollouts)
    prompts = [SimpleNamespace(ids=[1, 2])] * 2
    task = SimpleNamespace(
        prompts=lambda *args: prompts,
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    found: dict[str, Any] = {"counts": counts}
    for mode, policy in (("r3", "strict"), ("r3", "mask"), ("r3", "live"), ("r2", "strict"), ("none", "strict")):
        bench = Bench(device)
        settings = bench.settings
        settings.replay = config.Replay(mode=mode, missing=policy)
        settings.trainer = config.Trainer(prompts_per_step=2, group_size=4, mini_batches=2, micro_batch_size=2)
        settings.monitor = config.Monitor(samples=0)  # these prompts have no text to keep
        session = SimpleNamespace(
            settings=settings, device=device, actor=bench.actor, engine=bench.engine, task=task, dp_rank=0,
            dp_size=1, reports_stats=True, is_rank_0=True, is_replica_leader=True, signature=bench.replay.signature,
            critic=None,
        )  # fmt: skip
        try:
            found[f"{mode} {policy}"] = TrainingLoop(session, inference).step(0)
        except UserError as error:
            found[f"{mode} {policy}"] = str(error)
    return found


def main() -> None:
    device = backend.init_backend(config.Backend(kind="cpu"))
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from megatron_bai.model import build

    build.init_parallel(config.Parallel(), seed=0)
    abandoned = Bench(device)  # its handles stay in Megatron-Core's global list, ahead of the next model's
    bench, again = Bench(device), Bench(device, recompute="full")
    everyone = RouterReplay.global_router_replay_instances
    for own in (bench, again):
        own.watch()
    facts: dict[str, Any] = {"identity": identity(bench), "forced": forced(bench), "partial": partial(bench, again)}
    facts["weights"] = weights(bench)
    facts["orders"], facts["failures"] = orders(bench, again), failures(bench)
    facts["orphans"] = {
        "handles": len(everyone),
        "first are": all(a is b for a, b in zip(everyone, abandoned.handles)),
        "touched": abandoned.held(),
        "rows": abandoned.replay.rows,
    }
    facts["training"] = training_steps(device)
    facts["updates"] = {mode: first_update(device, mode) for mode in ("none", "r2")}
    facts["routers"] = router_cases.gather(device)
    torch.save(facts, Path(sys.argv[1]))
    backend.shutdown_backend()


if __name__ == "__main__":
    main()
