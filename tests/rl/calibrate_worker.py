"""Run as a script: `rl.calibrate` on `route_probe_worker`'s checkpoints. Arguments: a directory, and its cases.

Rank 0 leaves `CASE-calibrated.pt`: the routers, and what was done to each layer.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.multiprocessing
from processes import free_port, prepare
from route_probe_worker import LAYOUTS
from route_texts import SEQUENCES

from megatron_bai import config

TEXTS = SEQUENCES[:3], SEQUENCES[2:]


def rank_main(rank: int, world: int, case: int, port: int, directory: Path) -> None:
    from megatron_bai.distributed import backend
    from megatron_bai.model import build
    from megatron_bai.model.architecture import read_architecture
    from megatron_bai.rl.calibrate import build_calibrated

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=120))
    parents = [str(directory / "parent"), str(directory / "other")]
    job = config.Calibrate(path=str(directory / "model"), parents=parents, tolerance=1e-10)
    settings = config.Config(parallel=LAYOUTS[case], model=read_architecture(directory / "model"), calibrate=job)
    build.init_parallel(settings.parallel, seed=0)
    actor, layers = build_calibrated(settings, device, TEXTS)
    if rank == 0:
        routers = [value.clone() for name, value in actor.modules[0].named_parameters() if "router.weight" in name]
        facts = [asdict(each) | {"weight": each.calibration.weight} for each in layers]
        torch.save({"routers": routers, "layers": facts}, directory / f"{case}-calibrated.pt")
    backend.shutdown_backend()


def main(directory: Path, cases: list[int]) -> None:
    prepare("megatron.core.models.gpt", "megatron.core.dist_checkpointing", "megatron_bai.rl.calibrate")
    for case in cases:
        arguments = (min(case, 2), case, free_port(), directory)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=min(case, 2), start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(case) for case in sys.argv[2:]])
