"""Run as a script: one model with and without exact layers, in several arrangements of a batch. Argument: a file.

It gets, by name, log-probabilities and entropy of the whole batch, the gradient, and its norm.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distributed.worker import TEMPERATURE, Case, Run, join, measured
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend

_ONE = config.Parallel()
CASES = {
    "whole": Case(1, _ONE, micro=8),
    "alone": Case(1, _ONE, micro=1),
    "row24": Case(1, _ONE, row=24),
    "row128": Case(1, _ONE, row=128),
    "full": Case(1, replace(_ONE, recompute="full"), micro=4),
    "moe": Case(1, replace(_ONE, recompute="moe"), micro=4),
    "selective": Case(1, replace(_ONE, recompute="selective"), micro=4),
}


def measure(case: Case, device: backend.Device, exact: bool) -> dict[str, Any]:
    from megatron_bai.model.exact_layers import make_exact
    from megatron_bai.routing.replay.router_scores import record_scores

    run = Run(case, device, TEMPERATURE)
    if exact:
        make_exact(run.actor.modules, run.actor.architecture)
        run.engine.exact = True
    with record_scores(run.replay, len(run.micros)):  # which wraps the routers for the length of a pass
        run.score("none")
    found: dict[str, Any] = {"live": run.score("none")["logprobs"], **run.score("r3")}
    values, found["gradient"] = measured(run.actor, lambda: run.update("r3"))
    return found | {"grad_norm": values["grad_norm"], "routed": run.replay.rows, "recomputed": run.replay.recomputed}


def main() -> None:
    prepare("megatron.core.models.gpt", "megatron_bai.rl.policy.training_engine", "megatron_bai.model.exact_layers")
    join(0, 1, free_port())
    device = backend.init_backend(config.Backend(kind="cpu", dtype="float32"))
    from megatron_bai.model import build

    build.init_parallel(_ONE, seed=0)
    found = {name: measure(case, device, exact=True) for name, case in CASES.items()}
    found["ordinary"] = measure(CASES["whole"], device, exact=False)
    torch.save(found, Path(sys.argv[1]))
    backend.shutdown_backend()


if __name__ == "__main__":
    main()
