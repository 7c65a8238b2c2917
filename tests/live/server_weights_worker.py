"""Run as a script: what a real SGLang has after weight syncs. Arguments: a directory, a dtype, and names of families.

`NAME/published` is the checkpoint of a family. Its server is started as a run starts one. Before each sync SGLang
overwrites all of its weights, so that none is there which the sync does not bring; after it they are in
`NAME/DTYPE/WAY.pt`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed.worker import join
from model.families.family_sync import in_buckets, session_of
from model.families.family_worker import Bench
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend
from megatron_bai.rollout.servers import control

WAYS = ("disk", "tensors", "group")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.0}  # nats
ROLLOUT = config.Rollout(max_total_tokens=1024, max_running_requests=8, sync="tensors")
BUCKET_BYTES = 1 << 14


def sync_by_each_way(name: str, directory: Path, device: backend.Device, rollout: config.Rollout) -> None:
    """Leave a family's weights as its server has them."""
    from megatron_bai.rl.experience import inference_engine

    own = directory / rollout.dtype
    bench = Bench(name, directory, config.Parallel(), device)
    session: Any = session_of(bench, bench.actor, device, own, rollout)
    with inference_engine.start_inference(session) as inference, in_buckets(BUCKET_BYTES):
        (url,) = inference._servers.urls
        for way in WAYS:
            inference.close()  # the next sync makes its own transport
            session.settings.rollout.sync = way
            control.post(url, "/weights_checker", {"action": "reset_tensors"})
            inference.sync()
            control.post(url, "/weights_checker", {"action": f"save {(own / way).absolute()}.pt"})


def main() -> None:
    directory, dtype, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    prepare("megatron.core.models.gpt", "megatron_bai.rl.experience.inference_engine")
    join(0, 1, free_port())
    device = backend.init_backend(config.Backend(kind="cpu", dtype=dtype))
    from megatron_bai.model import build

    build.init_parallel(config.Parallel(), seed=0)
    for name in names:
        rollout = replace(ROLLOUT, dtype=dtype, sync_tolerance=TOLERANCE[dtype])
        sync_by_each_way(name, directory / name, device, rollout)
    backend.shutdown_backend()


if __name__ == "__main__":
    main()
