"""Run as a script: the same work in several parallel layouts. Argument: a directory.

Importing Megatron-Core takes seconds, so the ranks are forked from one process that has imported it, and each world of
ranks goes through all cases of its size. Rank 0 leaves what it found in `NAME.pt`, weights in `NAME/hf`, and for
some cases a Megatron checkpoint in `NAME/megatron`. A case with `loads` fills itself from the checkpoints that another
case saved, and exports what it then holds as `NAME/loaded` and `NAME/imported`. Cases of `PACKED` are asked for one
step in each mode of replay.
"""

import hashlib
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from moe import ARCHITECTURE, MODEL, SIGNATURE, samples
from processes import free_port, prepare
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bai import config
from megatron_bai.distributed import backend
from megatron_bai.rl.policy import lr_schedule
from megatron_bai.rollout.kept_ids import NO_ID

SAMPLES, LENGTH = 8, 24
LEARNING_RATE = 1e-3
# Adam's first step is −rate · g / (|g| + epsilon): with an epsilon far above any gradient it is −SCALE · g. The scale
# makes it large beside the parameters, whose rounding is then of no account.
EPSILON, SCALE = 1e6, 1e3
UPDATES = 3
# Objectives whose denominators span ranks and micro-batches, with all that can be added to a token's loss.
_ADDED = {"entropy_bonus": 0.5, "kl_penalty": 0.5}
OBJECTIVES = {
    "sample_mean": config.Grpo(correction="token_truncate", **_ADDED),
    "prompt_mean": config.Dapo(token_mean="prompt", **_ADDED),
}
# The routers' factor in a ratio that is a product over a response's tokens, so that all of them reach every loss.
SHIFTED = config.Gspo(router_shift=True, router_shift_min=0.95, clip_low=0.9, clip_high=2.0)
MOVED = 0.03  # of the way to other weights
LEFT_OUT = (3, 6)  # samples that do not count
TEMPERATURE = 0.7  # of sampling, in one comparison of all layouts
KEPT, HELD, ENDS = 6, 3, (1, 40)  # ids of a truncated draw; tokens that are no end, and the ends
COOLED = config.Dapo(entropy_bonus=0.5)
# Advantages and targets of which every part counts; the critic's rate is what `gradient` needs.
PPO = config.Ppo(gamma=0.97, lam=0.9, whiten=True, critic_learning_rate=EPSILON * SCALE)
REWARDS = np.linspace(-1, 2, SAMPLES)


@dataclass(frozen=True)
class Case:
    processes: int
    parallel: config.Parallel
    micro: int = 4  # samples in a micro-batch
    row: int = 0  # or its tokens, packed
    loads: str = ""
    saves: bool = False


def _layout(**sizes: Any) -> config.Parallel:
    return config.Parallel(sequence=sizes.get("tensor", 1) > 1, **sizes)


CASES = {
    "one": Case(1, _layout(), micro=8, saves=True),
    "one_micro1": Case(1, _layout(), micro=1),
    "one_micro4": Case(1, _layout()),
    "tp2_ep2": Case(2, _layout(tensor=2, expert=2), loads="one", saves=True),
    "tp2_ep2_allgather": Case(2, _layout(tensor=2, expert=2, dispatcher="allgather")),
    "tp2": Case(2, _layout(tensor=2), micro=2),
    "dp2": Case(2, _layout()),
    "ep2": Case(2, _layout(expert=2), micro=2),
    "pp2": Case(2, _layout(pipeline=2), micro=2),
    "ep2_pp2": Case(4, _layout(expert=2, pipeline=2), micro=2, loads="tp2_ep2", saves=True),
    "tp2_ep2_pp2": Case(4, _layout(tensor=2, expert=2, pipeline=2), micro=2),
}
# Samples are of 7, 4, 18, 10, 7, 24, 16 and 18 tokens. Of two replicas the first fills two rows of 24 and has an empty
# one; the second needs three, of which one is exactly full. Five rows of 24 hold all: the interleaved schedule gets
# six.
PACKED = {
    "one_row128": Case(1, _layout(), row=128),
    "one_row24": Case(1, _layout(), row=24),
    "tp2_row24": Case(2, _layout(tensor=2), row=24),
    "dp2_row24": Case(2, _layout(), row=24),
    "ep2_row40": Case(2, _layout(expert=2), row=40),
    "tp2_ep2_row42": Case(2, _layout(tensor=2, expert=2), row=42),
    "pp2_row31": Case(2, _layout(pipeline=2), row=31),
    "pp2_vpp2_row24": Case(2, _layout(pipeline=2, virtual_pipeline=2), row=24),
    "ep2_pp2_row24": Case(4, _layout(expert=2, pipeline=2), row=24),
}

# Those of `make test`; all of them are `make test-long`'s.
QUICK = ("one", "tp2", "tp2_ep2", "one_row24", "tp2_ep2_row42")


def problem() -> tuple[list, np.ndarray, np.ndarray]:
    """Rollouts, their advantages, and how far `old_logprobs` lie from the current policy's: enough to be clipped."""
    random, others = np.random.default_rng(7), np.random.default_rng(8)
    rollouts = []
    for each, reward in zip(samples(SAMPLES, random), REWARDS, strict=True):
        weights = 1.5 * others.dirichlet(np.ones(MODEL.moe_topk), each.routes.shape[:2]).astype("f4")
        rollouts.append(replace(each, reward=float(reward), route_weights=weights))
    return rollouts, random.normal(size=SAMPLES), random.normal(0, 0.2, (SAMPLES, LENGTH))


def drawn_rollouts(rollouts: list, draws: str) -> list:
    """The rollouts as if each token had been drawn from six ids of anywhere in the vocabulary, or from three; or, with
    draws of `held` ids, without ends. No draws: as they are."""
    random, drawn = np.random.default_rng(9), []
    for sample in rollouts if draws else ():
        if draws == "held":
            drawn.append(replace(sample, tokens=np.where(np.isin(sample.tokens, ENDS), 2, sample.tokens)))
            continue
        order = random.random((len(sample.response), MODEL.vocab_size))
        np.put_along_axis(order, sample.response[:, None], 2.0, axis=1)  # the token itself is the last one
        kept = order.argsort(axis=1)[:, -KEPT:].astype(np.int32)
        kept[::3, : KEPT // 2] = NO_ID
        drawn.append(replace(sample, kept_ids=kept[:, ::-1]))
    return drawn or rollouts


class Run:
    """A fresh actor in a layout, with this rank's part of the batch."""

    def __init__(
        self,
        case: Case,
        device: backend.Device,
        temperature: float = 1.0,
        leaves_out: bool = False,
        has_critic: bool = False,
        draws: str = "",
        **changes: Any,
    ):
        """Some samples are left out of the loss; the rollouts give samples no advantage if there is a critic.

        With draws of `kept` ids each token is of some ids alone; with `held` ones the first tokens are none of `ENDS`.
        """
        from megatron.core import parallel_state

        from megatron_bai.model import build, megatron_checkpoint, param_shards
        from megatron_bai.monitor.stats import Stats
        from megatron_bai.rl.batches.batch import from_samples
        from megatron_bai.rl.batches.micro_batches import make_mini_batches
        from megatron_bai.rl.batches.stages import make_scored_batch, make_training_batch
        from megatron_bai.rl.policy.held_back import HeldBack
        from megatron_bai.rl.policy.training_engine import TrainingEngine
        from megatron_bai.routing.replay.routing_replay import RoutingReplay

        trainer = config.Trainer(
            learning_rate=LEARNING_RATE,
            clip_grad=1e9,
            mini_batches=1,
            micro_batch_size=case.micro,
            tokens_per_micro_batch=case.row,
            **changes,
        )
        self.settings = config.Config(model=MODEL, parallel=case.parallel, trainer=trainer)
        self.actor = build.build_actor(self.settings, device)
        param_shards.init_random(self.actor.modules, MODEL, seed=0)
        megatron_checkpoint.reload_master_weights(self.actor)
        self.replay = RoutingReplay(self.actor.chunks)
        assert self.replay.signature == SIGNATURE
        held = HeldBack(HELD, ENDS) if draws == "held" else None
        self.engine = TrainingEngine(self.actor, self.replay, device.device, temperature, held_back=held)
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        self.own = own = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
        rollouts, advantages, noise = problem()
        rollouts = drawn_rollouts(rollouts, draws)
        mine = [sample.select_layers(self.replay.columns) for sample in rollouts[own]]
        in_loss = np.array([not (leaves_out and sample in LEFT_OUT) for sample in range(SAMPLES)])[own]
        of_samples = None if has_critic else advantages[own]
        rollouts = from_samples(mine, of_samples, LENGTH, 0, SIGNATURE, in_loss, weighted=True)
        self.batch, (self.micros,) = make_mini_batches(
            make_training_batch(make_scored_batch(rollouts)), self.settings, Stats()
        )
        self.noise = torch.from_numpy(noise[own])[self.batch.sample_index]
        self.recorded: list = []
        self.dp_rank = rank
        self.reports_stats = self.engine.last_stage and self.engine.tensor_rank == 0

    def become(self, **changes: torch.Tensor) -> None:
        """Another batch takes this one's place, and its parts that of the micro-batches."""
        from megatron_bai.rl.batches.micro_batches import split_alike

        self.batch = replace(self.batch, **changes)
        (self.micros,) = split_alike(self.batch, [self.micros])

    def routes(self, mode: str) -> list | None:
        if mode == "r2":
            return self.recorded
        return [self.engine.local_routes(micro) for micro in self.micros] if mode == "r3" else None

    def score(self, mode: str) -> dict[str, torch.Tensor]:
        """Log-probabilities and entropy of the whole batch, in the order of the problem; fills `old_logprobs`."""
        record = mode == "r2"
        found = self.engine.score(self.micros, None if record else self.routes(mode), record)
        self.recorded = found.routes
        if found.logprobs is not None:
            self.become(old_logprobs=(found.logprobs + self.noise).float())
        return {"logprobs": self.whole(found.logprobs), "entropy": self.whole(found.entropy)}

    def score_weights(self) -> dict[str, Any]:
        """Log-probabilities with the rollouts' weights of experts, and what these differ by from the routers'."""
        logprobs, gap = self.engine.score_weights(self.micros)
        totals, counts, largest = zip(*gathered((float(gap.total), gap.count, float(gap.largest))))
        return {"logprobs": self.whole(logprobs), "mean": sum(totals) / sum(counts), "count": sum(counts)} | {
            "largest": max(largest)
        }

    def whole(self, mine: torch.Tensor | None) -> torch.Tensor:
        """What ranks of the last stage have of each sample, of all samples in the order of the problem."""
        back = self.batch.sample_index.argsort()
        parts = gathered((self.dp_rank, mine[back]) if mine is not None and self.reports_stats else None)
        return torch.cat([part[1] for part in sorted((part for part in parts if part), key=lambda part: part[0])])

    def update(self, mode: str, settings: config.Objective | None = None) -> dict[str, float]:
        from megatron_bai.rl import objectives

        settings = settings or self.settings.objective
        stats, norm = self.engine.update(self.micros, self.routes(mode), objectives.get(settings.name), settings)
        return stats.gather_sum(self.reports_stats).values() | {"grad_norm": norm}

    def export(self, target: Path) -> None:
        from megatron_bai.model import hf_checkpoint

        hf_checkpoint.save_hf(self.actor.modules, MODEL, target, Path("none"), {})


def state(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a model by its Hugging Face name, on rank 0."""
    from megatron_bai.model import gather, hf_mapping

    found = {}
    for key, index, whole in gather.gather_slices(model.modules):
        if dist.get_rank() == 0:
            kind = hf_mapping.mapping_of(key, ARCHITECTURE)
            found |= {name: t.clone() for name, t in zip(kind.names(index), kind.split(whole, ARCHITECTURE))}
    return found


def diverged(model: Any) -> list[str]:
    """Keys of pieces of a model that two ranks hold with different content."""
    from megatron_bai.model import param_shards

    mine = {}
    for shard in param_shards.local_shards(model.modules):
        digest = hashlib.sha256(shard.data.detach().contiguous().numpy().tobytes()).hexdigest()
        mine[shard.key, shard.index, shard.offset] = digest
    first: dict[tuple, str] = {}
    different = set()
    for other in gathered(mine):
        for place, digest in other.items():
            if first.setdefault(place, digest) != digest:
                different.add(place[0])
    return sorted(different)


def gathered(mine: Any) -> list:
    """What every rank has."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def gradient(
    case: Case, device: backend.Device, mode: str, objective: str = ""
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The gradient the optimizer applied, reduced over all ranks and gathered, and the update's statistics.

    With one of `OBJECTIVES` the reference policy is at twice the old one's distance, and some samples are left out.
    """
    run = Run(case, device, leaves_out=bool(objective))
    run.score(mode)
    if objective:
        run.become(reference_logprobs=(run.batch.old_logprobs + run.noise).float())
    return measured(run.actor, lambda: run.update(mode, OBJECTIVES.get(objective)))


def cooled(case: Case, device: backend.Device) -> dict[str, Any]:
    """Scores and one measured gradient at another temperature than 1, and the probe, which is always scored at 1."""
    run = Run(case, device, TEMPERATURE)
    found: dict[str, Any] = {"scores": run.score("r3")}
    tokens = from_rollouts().tokens
    probe = run.engine.score_probe(tokens)
    found["probe"] = next(each for each in gathered(probe) if each is not None)
    found["first"], found["gradient"] = measured(run.actor, lambda: run.update("r3", COOLED))
    return found


def drawn(case: Case, device: backend.Device) -> dict[str, Any]:
    """Scores and one measured gradient of draws that were not from the whole vocabulary."""
    found = {}
    for draws in ("kept", "held"):
        run = Run(case, device, TEMPERATURE, draws=draws)
        scores, (first, whole) = run.score("r3"), measured(run.actor, lambda run=run: run.update("r3", COOLED))
        found[draws] = {"scores": scores, "first": first, "gradient": whole}
    return found


def overflowing(case: Case, device: backend.Device) -> dict[str, list[str]]:
    """What each rank says of updates: the first replica's ratios are e²⁰⁰, where it counts and not; its A is 10³⁸."""
    from megatron_bai.errors import UserError

    found = {}
    for name, sign in (("counts", -1), ("flat", 1), ("huge", -1)):
        run = Run(case, device)
        run.score("none")
        run.become(advantages=sign * run.batch.advantages.abs())
        if run.dp_rank == 0:
            run.become(old_logprobs=run.batch.old_logprobs - 200)
        if run.dp_rank == 0 and name == "huge":
            run.become(advantages=torch.full_like(run.batch.advantages, -3e38))
        try:
            run.update("none", config.Grpo())
            said = "nothing"
        except UserError as error:
            said = str(error)
        found[name] = gathered(said)
    return found


def shifted(case: Case, device: backend.Device, mode: str, hf: Path | None = None) -> dict[str, Any]:
    """How far the routers have moved, by token, after all weights did; and one measured gradient with that.

    Args:
        hf: where to leave the moved weights.
    """
    from megatron_bai.model import megatron_checkpoint, param_shards
    from megatron_bai.rl.policy.router_shift import RouterShift

    run = Run(case, device)
    shift = RouterShift(run.engine, SHIFTED)
    with shift.record(len(run.micros)):
        run.score(mode)
        run.engine.score(run.micros, run.routes("r3"))  # another pass is not recorded
    still = max(
        float(micro.router_shift.abs().amax()) for micro in shift.measure(run.micros, run.routes(mode), 0) if len(micro)
    )
    before = [parameter.detach().clone() for module in run.actor.modules for parameter in module.parameters()]
    param_shards.init_random(run.actor.modules, MODEL, seed=1)
    with torch.no_grad():
        for parameter, old in zip(
            (p for module in run.actor.modules for p in module.parameters()), before, strict=True
        ):
            parameter.copy_(old.lerp(parameter, MOVED))
    megatron_checkpoint.reload_master_weights(run.actor)
    if hf:
        run.export(hf)
    run.micros = shift.measure(run.micros, run.routes(mode), 0)
    whole = run.whole(torch.cat([micro.router_shift for micro in run.micros]))
    first, gradients = measured(run.actor, lambda: run.update(mode, SHIFTED))
    return {"still": max(gathered(still)), "shift": whole, "first": first, "gradient": gradients}


def frozen(case: Case, device: backend.Device) -> dict[str, Any]:
    """One measured gradient and one update with weight decay, while routers are frozen."""
    run = Run(case, device, freeze=["router"], weight_decay=0.1)
    run.score("none")
    before, groups = state(run.actor), run.actor.optimizer.param_groups
    for group in groups:
        group["weight_decay"] = 0.0
    first, gradients = measured(run.actor, lambda: run.update("none"))
    for group in groups:
        group["weight_decay"], group["lr"] = 0.1, LEARNING_RATE
    run.update("none")
    after = state(run.actor)
    return {
        "same": sorted(name for name in before if torch.equal(before[name], after[name])),
        "first": first,
        "gradient": gradients,
        "optimized": sum(gathered(sum(value.numel() for group in groups for value in group["params"]))),
    }


def from_rollouts() -> Any:
    """The whole batch, as one process has it."""
    from megatron_bai.rl.batches.batch import from_samples

    rollouts, advantages, _ = problem()
    return from_samples(rollouts, advantages, LENGTH, 0, SIGNATURE, weighted=True)


def measured(model: Any, update: Callable[[], Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """What an update returns, and the gradient it applied."""
    for group in model.optimizer.param_groups:
        group["eps"], group["lr"] = EPSILON, EPSILON * SCALE
    before = state(model)
    found = update()
    after = state(model)
    return found, {name: (before[name].double() - after[name].double()) / SCALE for name in after}


def step(case: Case, device: backend.Device, mode: str) -> dict[str, Any]:
    """Scores, one measured gradient, and `UPDATES` ordinary updates."""
    run = Run(case, device)
    found: dict[str, Any] = {"scores": run.score(mode)}
    found["updates"] = [run.update(mode)]
    found["updated"] = state(run.actor)
    found["updates"] += [run.update(mode) for _ in range(UPDATES - 1)]
    found["trained"] = state(run.actor)
    found["diverged"] = diverged(run.actor)
    found["layers"] = gathered(run.replay.layers)
    found["rows"] = sum(gathered(run.replay.rows))
    found["routed"] = sum(int(part) for part in gathered(run.batch.routed.sum() if run.reports_stats else 0))
    found["first"], found["gradient"] = gradient(case, device, mode)
    return found


def ppo(case: Case, device: backend.Device, loads: str = "", saves: str = "") -> dict[str, Any]:
    """A critic's values, what comes of them, and one measured gradient of the critic and of the actor.

    Args:
        loads, saves: where a critic's checkpoint is, and where to leave one.
    """
    from megatron_bai.model import megatron_checkpoint, param_shards
    from megatron_bai.monitor.stats import Stats
    from megatron_bai.rl.policy.critic import Critic

    run = Run(case, device, leaves_out=True, has_critic=True)
    run.settings.objective = replace(PPO, critic_checkpoint=loads)
    critic = Critic(run.actor, run.settings, device)
    found: dict[str, Any] = {"start": state(critic.model)}
    param_shards.init_random(critic.model.modules, MODEL, seed=1)
    megatron_checkpoint.reload_master_weights(critic.model)
    found["weights"] = state(critic.model)
    if saves:
        megatron_checkpoint.save(critic.model, saves, Path("none"), {})
    run.score("none")
    stats = Stats()
    run.batch = critic.estimate_advantages(run.batch, run.micros, stats)
    found["statistics"] = stats.gather_sum(run.reports_stats).values()
    names = ("values", "returns", "advantages")
    mine = (run.dp_rank, [getattr(run.batch, name).clone() for name in names]) if run.reports_stats else None
    parts = sorted((part for part in gathered(mine) if part), key=lambda part: part[0])
    found |= {name: torch.cat(tensors) for name, tensors in zip(names, zip(*(part[1] for part in parts)))}
    # some values have left the old ones by more than the limit
    run.become(values=(run.batch.values + run.noise).float())
    (stats, norms, _), found["gradient"] = measured(critic.model, lambda: critic.update([run.micros], 0))
    found["update"] = stats.gather_sum(run.reports_stats).values() | {"grad_norm": norms[0]}
    found["diverged"] = diverged(critic.model)
    found["actor"] = measured(run.actor, lambda: run.update("none", PPO))
    return found


def packed(case: Case, device: backend.Device) -> dict[str, Any]:
    """One step of packed samples in each mode of replay."""
    found: dict[str, Any] = {}
    for mode in ("none", "r2", "r3"):
        run = Run(case, device)
        scores, (first, whole) = run.score(mode), measured(run.actor, partial(run.update, mode))
        found[mode] = {"scores": scores, "first": first, "gradient": whole, "rows": sum(gathered(run.replay.rows))}
    found["shifted"] = shifted(case, device, "r2")
    found["drawn"] = drawn(case, device)
    found["weighted"] = Run(case, device).score_weights()
    found["held"] = gathered([len(micro) for micro in run.micros])
    found["fed"] = gathered({tuple(micro.pack(micro.tokens).shape) for micro in run.micros})
    found["logits"] = gathered(logits_alive(run))
    found["turned"] = gathered(turned(run))
    if case == PACKED["one_row128"]:
        found["others"] = {mode: others(Run(case, device), mode) for mode in ("none", "r3")}
    return found


def logits_alive(run: Run) -> list[int]:
    """How many micro-batches' logits there are each time that one has been scored."""
    forward, seen, alive = run.engine.forward_backward.forward, [], []

    def watched(micros: list, collect: Callable) -> list:
        def noted(logits: torch.Tensor, micro: Any) -> Any:
            seen.append(weakref.ref(logits))
            alive.append(sum(each() is not None for each in seen))
            return collect(logits, micro)

        return forward(micros, noted)

    run.engine.forward_backward.forward = watched
    run.engine.score(run.micros)
    run.engine.forward_backward.forward = forward
    return alive


def turned(run: Run) -> bool:
    """Whether every layer rotates each token by its place in its own sample: the first pair by that many radians."""
    from megatron.core.transformer import attention

    rotate, seen = attention.apply_rotary_pos_emb, set()

    def watched(values: torch.Tensor, angles: torch.Tensor, **rest: Any) -> torch.Tensor:
        probe = torch.zeros_like(values)
        probe[..., 0] = 1
        rotated = rotate(probe, angles, **rest).flatten(1, -2)[:, 0].double()
        known = torch.arange(len(values), dtype=torch.float64)  # no two of some hundred are equal modulo 2π
        cosine, sine = rotated[:, :1], rotated[:, angles.shape[-1] // 2, None]
        seen.add(tuple((cosine * known.cos() + sine * known.sin()).argmax(dim=1).tolist()))
        return rotate(values, angles, **rest)

    attention.apply_rotary_pos_emb = watched
    run.engine.score(run.micros)
    attention.apply_rotary_pos_emb = rotate
    return seen == {tuple(m.packing.positions.tolist() if m.packing else range(LENGTH)) for m in run.micros}


def others(run: Run, mode: str) -> list[dict[str, Any]]:
    """What becomes of log-probabilities when all tokens of one sample of a row are others."""
    before, found = run.engine.score(run.micros, run.routes(mode)).logprobs, []
    for sample in range(SAMPLES):
        tokens = run.batch.tokens[sample].clone()
        run.batch.tokens[sample] = (tokens + 1) % MODEL.vocab_size
        gap = (run.engine.score(run.micros, run.routes(mode)).logprobs - before).abs().amax(dim=1).tolist()
        found.append({"own": gap.pop(sample), "others": max(gap)})
        run.batch.tokens[sample] = tokens
    return found


class Allocations(TorchDispatchMode):
    """The tensors of more than `least` elements that are made within the block: their sizes, and the most at once."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.elements, self.most = least, [], 0
        self._live: dict[int, int] = {}  # storage → elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        storage = out.untyped_storage()._cdata if isinstance(out, torch.Tensor) else None
        if storage is not None and storage not in given and out.numel() > self.least:  # neither a view nor in place
            self.elements.append(out.numel())
            self._live[storage] = out.numel()
            weakref.finalize(out, self._live.pop, storage, None)
            self.most = max(self.most, sum(self._live.values()))
        return out


def vocabulary(precision: torch.dtype) -> dict[str, Any]:
    """Log-probabilities, entropy and their gradients in logits that are split over the tensor ranks."""
    from megatron.core import parallel_state

    from megatron_bai.rl.policy.logprobs import logprobs_and_entropy

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 9, 56, generator=generator) * torch.tensor([0.0, 1, 5, 30, 30])[:, None, None]
    logits[4] += 1000
    logits = logits.to(precision)
    targets = torch.randint(0, 56, (5, 9), generator=generator)
    targets[:, -1] = -1
    slopes = torch.randn(2, 5, 9, generator=generator)
    part = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()

    def gradient(*slopes: torch.Tensor | None) -> torch.Tensor:
        found = logprobs_and_entropy(
            part, targets, 0.7, work_elements=8 * part.shape[-1]
        )  # 45 tokens: the last of the parts is short
        used = [(each, slope) for each, slope in zip(found, slopes) if slope is not None]
        (own,) = torch.autograd.grad(sum((each * slope).sum() for each, slope in used), part)
        return torch.cat(gathered(own), dim=-1)

    found = logprobs_and_entropy(part, targets, 0.7, work_elements=8 * part.shape[-1])
    whole = logprobs_and_entropy(part, targets, 0.7)
    tokens = 3 * targets.numel()  # sums of three kinds are kept of each
    with Allocations(tokens) as forward:
        again = logprobs_and_entropy(part, targets, 0.7, work_elements=8 * part.shape[-1])
    with Allocations(tokens) as backward:
        torch.autograd.grad((again[0] * slopes[0] + again[1] * slopes[1]).sum(), part)
    return {
        "logits": logits,
        "targets": targets,
        "slopes": slopes,
        "found": [each.detach() for each in found],
        "same": all(map(torch.equal, found, whole)),
        "gradients": {
            "logprobs": gradient(slopes[0], None),
            "entropy": gradient(None, slopes[1]),
            "both": gradient(*slopes),
        },
        "width": part.shape[-1],
        "forward": (forward.elements, forward.most),
        "backward": (backward.elements, backward.most),
    }


def statistics() -> dict[str, Any]:
    """Statistics over ranks of which all, or only rank 1, contribute."""
    from megatron_bai.monitor.stats import Stats

    rank = dist.get_rank()
    stats = Stats()
    stats.mean("mean", torch.arange(rank + 1.0))  # [0] and [0, 1]
    stats.max("top", torch.tensor([float(rank)]))
    if rank:
        stats.mean("only", torch.tensor([5.0]))
    stats.sample_size("ess", torch.arange(rank + 1.0))
    stats.tally("seen", torch.arange(rank + 1))
    both, second = stats.gather_sum(True), stats.gather_sum(rank == 1)
    return {
        "all": gathered(both.values()), "one": gathered(second.values()), "own": stats.values(),
        "tallies": gathered([dict(each.tallies["seen"]) for each in (both, second)]),
    }  # fmt: skip


def work(name: str, directory: Path, device: backend.Device) -> dict[str, Any]:
    """Everything asked of one case."""
    from megatron_bai.model import hf_checkpoint, megatron_checkpoint, param_shards

    case = CASES[name]
    own = directory / name
    run = Run(case, device)
    run.export(own / "hf")
    found: dict[str, Any] = {}
    if case.saves:
        megatron_checkpoint.save(run.actor, own / "megatron", Path("none"), {"by": name})
    if case.loads:
        param_shards.init_random(run.actor.modules, MODEL, seed=1)
        found["info"] = megatron_checkpoint.load(run.actor, directory / case.loads / "megatron")
        found["optimizer_follows"] = follows(run)
        found["rates"], found["decays"] = scheduled(run)
        run.export(own / "loaded")
    if case.saves:
        param_shards.init_random(run.actor.modules, MODEL, seed=1)
        hf_checkpoint.load_hf(run.actor.modules, MODEL, directory / (case.loads or name) / "hf")
        run.export(own / "imported")
    for mode in ("none", "r3"):
        found[mode] = step(case, device, mode)
    found["cooled"] = cooled(case, device)
    found["drawn"] = drawn(case, device)
    found["overflowing"] = overflowing(case, device)
    found["objectives"] = {objective: gradient(case, device, "none", objective) for objective in OBJECTIVES}
    loads = str(directory / case.loads / "critic") if case.loads else ""
    found["ppo"] = ppo(case, device, loads, str(own / "critic") if case.saves else "")
    found["shifted"] = shifted(case, device, "r3")
    found["weighted"] = Run(case, device).score_weights()
    found["frozen"] = frozen(case, device)
    found["dispatcher"] = type(run.actor.modules[0].decoder.layers[0].mlp.token_dispatcher).__name__
    if name == "one":
        found["packed"] = packed(case, device)
        found["shifted_live"] = shifted(case, device, "none", own / "moved")
    if name in ("one", "tp2"):
        found["vocabulary"] = {precision: vocabulary(precision) for precision in (torch.float32, torch.float64)}
    if name == "one":
        found["logits"], found["faults"] = logits(run), faults(run, directory / "faults", own)
    if name == "tp2":
        found["statistics"] = statistics()
    return found


def logits(run: Run) -> dict[str, torch.Tensor]:
    """The bare model's logits, of sequences at half and at full length."""
    tokens = torch.randint(0, MODEL.vocab_size, (3, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        full = run.actor.modules[0](tokens, torch.arange(64).expand(3, -1), None)
        half = run.actor.modules[0](tokens[:, :32], torch.arange(32).expand(3, -1), None)
    return {"tokens": tokens, "full": full, "half": half}


def faults(run: Run, directory: Path, good: Path) -> dict[str, str]:
    """What is said about each way in which a checkpoint can be unfit; runs in a single process."""
    from megatron_bai.checkpoint import atomic_dir, manifest
    from megatron_bai.errors import UserError
    from megatron_bai.model import hf_checkpoint, megatron_checkpoint

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(good / ("hf" if name.startswith("hf") else "megatron"), directory / name))

    def reshaped(name: str, shape: tuple[int, ...]) -> Path:
        path = damaged(f"hf-{name}")
        tensors = load_file(path / "model.safetensors")
        save_file(tensors | {f"model.layers.1.{name}.weight": torch.zeros(shape)}, path / "model.safetensors")
        return sealed(path)

    def sealed(path: Path) -> Path:
        """As whoever wrote such a thing on purpose would leave it."""
        return manifest.finalize(path.rename(atomic_dir.staging_path(path)), path, {})

    def said(load: Callable[[], object]) -> str:
        try:
            load()
        except UserError as error:
            return str(error)
        return "nothing"

    found = {}
    shapes = {"mlp.gate": (8, 47), "mlp.experts.5.up_proj": (39, 48), "self_attn.k_proj": (33, 48)}
    for name, shape in shapes.items():
        path = reshaped(name, shape)
        found[name] = said(partial(hf_checkpoint.load_hf, run.actor.modules, MODEL, path))
    cut, unfinished, other = damaged("cut"), damaged("unfinished"), damaged("other")
    largest = max(cut.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    (unfinished / "manifest.json").unlink()
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"num_experts": 8', '"num_experts": 4'))
    sealed(other)
    places = {"cut": cut, "unfinished": unfinished, "other": other, "hf": good / "hf", "nowhere": directory / "nowhere"}
    for name, path in places.items():
        found[name] = said(partial(megatron_checkpoint.load, run.actor, path))
    found["good"] = said(lambda: megatron_checkpoint.load(run.actor, good / "megatron"))
    return found


def follows(run: Run) -> bool:
    """Whether an optimizer step that changes nothing leaves the loaded weights, on every rank."""
    before = [parameter.detach().clone() for parameter in run.actor.modules[0].parameters()]
    for group in run.actor.optimizer.param_groups:
        group["lr"] = 0.0
    for chunk in run.actor.chunks:
        chunk.zero_grad_buffer()
    run.actor.optimizer.step()
    return all(gathered(all(map(torch.equal, before, run.actor.modules[0].parameters()))))


def scheduled(run: Run) -> tuple[dict[str, list[float]], dict[int, set[float]]]:
    """Rates of six updates in each group, by the decay; and the weight decays of vectors (1), and of the others."""
    rates: dict[str, list[float]] = {}
    for decay in ("constant", "linear", "cosine"):
        trainer = config.Trainer(learning_rate=LEARNING_RATE, warmup_updates=2, decay=decay, weight_decay=0.1)
        for update in range(6):
            rate = lr_schedule.set_learning_rate(run.actor.optimizer, trainer, update, 6)
            assert {group["lr"] for group in run.actor.optimizer.param_groups} == {rate}
            rates.setdefault(decay, []).append(rate)
    decays: dict[int, set[float]] = {}
    for group in run.actor.optimizer.param_groups:
        decays.setdefault(1 if group["wd_mult"] == 0 else 2, set()).add(group["weight_decay"])
    return rates, decays


def join(rank: int, world: int, port: int) -> None:
    """What torchrun says in the environment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def rank_main(rank: int, world: int, port: int, directory: Path, chosen: dict[str, Case]) -> None:
    """One rank of one world: every chosen case of this size."""
    join(rank, world, port)
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=300))
    from megatron.core import parallel_state

    from megatron_bai.model import build

    for name, case in chosen.items():
        if case.processes != world:
            continue
        build.validate_layout(MODEL, case.parallel, world)
        build.init_parallel(case.parallel, seed=0)
        found = packed(case, device) if case.row else work(name, directory, device)
        if rank == 0:
            torch.save(found, directory / f"{name}.pt")
        parallel_state.destroy_model_parallel()
    backend.shutdown_backend()


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.policy.training_engine")
    names = sys.argv[2:]
    chosen = {name: case for name, case in (CASES | PACKED).items() if not names or name in names}
    for world in sorted({case.processes for case in chosen.values()}):  # a case loads what smaller worlds saved
        arguments = (world, free_port(), Path(sys.argv[1]), chosen)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":  # dist_checkpointing spawns helpers that import this module again
    main()
