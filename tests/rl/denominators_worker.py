"""`python denominators_worker.py FILE`: what two data-parallel ranks make of a mini-batch that they share unevenly.

The engine's own update in two processes with real collectives. In place of a model there is a table of
log-probabilities; a schedule that divides by the micro-batches and an average over ranks are Megatron's part.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from policies import SETTINGS, Case, drawn

from megatron_bai import config
from megatron_bai.rl import objectives
from megatron_bai.rl.policy import training_engine
from megatron_bai.rl.policy.forward_backward import ForwardBackward
from megatron_bai.rl.policy.training_engine import TrainingEngine

RANKS = (slice(0, 6), slice(6, 9))  # two groups of three samples, and one


def problem() -> Case:
    return drawn(9, 6, 5, 0.3)


class Table:
    """Log-probabilities of every token, with what an optimizer makes of their gradient: nothing but its sum."""

    def __init__(self, values: torch.Tensor):
        self.values = values.requires_grad_()
        self.chunks, self.optimizer = [SimpleNamespace(zero_grad_buffer=lambda: None)], self

    def zero_grad(self) -> None:
        self.values.grad = None

    def step(self) -> tuple[bool, float, None]:
        gradient = self.values.grad / dist.get_world_size()
        dist.all_reduce(gradient)
        self.gradient = gradient
        return True, float(gradient.norm()), None


def updated(rank: int, settings: config.Objective) -> dict[str, Any]:
    case = problem()
    table = Table(torch.from_numpy(case.new.copy()))
    passes = ForwardBackward.__new__(ForwardBackward)
    passes.model, passes.device, passes.stages = table, torch.device("cpu"), 1
    passes._dp_size, passes._data_group = len(RANKS), dist.group.WORLD
    own = table.values[RANKS[rank]]
    batch = case.batch().split([6, 3])[rank]
    micros = batch.split(2 - rank)

    def schedule(micro_batches: list, collect: Any, forward_only: bool, mask_padding: bool) -> None:
        for output, micro in zip(own.split(2 - rank), micro_batches, strict=True):
            (collect(output, micro_batch=micro)[0] / len(micro_batches)).backward(retain_graph=True)

    passes._run_schedule = schedule
    engine = TrainingEngine.__new__(TrainingEngine)
    engine.forward_backward, engine.temperature, engine.last_stage = passes, 1.0, True
    engine.exact, engine.held_back = False, None
    engine.replay = SimpleNamespace(moves_bias=False, force=lambda routes: nullcontext())
    training_engine._logprobs_and_entropy = lambda logits, *rest: (logits, torch.ones_like(logits))
    stats, _ = engine.update(micros, None, objectives.get(settings.name), settings)
    return {"loss": stats.gather_sum(True).values()["loss"], "gradient": table.gradient}


def work(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=len(RANKS))
    found = [updated(rank, settings) for settings in SETTINGS]
    if rank == 0:
        torch.save(found, Path(file))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (sys.argv[1],), len(RANKS), start_method="fork")
