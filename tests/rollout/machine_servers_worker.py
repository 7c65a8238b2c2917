"""`python machine_servers_worker.py DIRECTORY`: three ranks on two machines start servers, lose one and recover it.

The collectives are real, the servers stand-ins behind HTTP. Each rank's account goes to a file.
"""

import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from fake_sglang import serve
from processes import fork_ranks

from megatron_bai.compat.releases import SGLANG
from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import fleet
from megatron_bai.rollout.servers.machine_servers import open_servers, recover_servers

MACHINES = (0, 0, 1)  # of each rank
BROKEN: set[str] = set()  # logs of servers that do not start
STARTED: list["Server"] = []


class Server:
    """In place of SGLangServer; one that is not `alive` answers with 503."""

    def __init__(self, model_dir: Path, rollout: Rollout, log: Path, device: str, route_weights: bool = False):
        self.name, self.rollout, self.device, self.model_dir = log.name, rollout, device, model_dir
        self.alive, self.done, self.stack, self.url = False, [], ExitStack(), ""
        STARTED.append(self)

    def launch(self) -> None:
        if self.name in BROKEN:
            raise UserError(f"{self.name} does not start")
        self.url = self.url or self.stack.enter_context(serve(self.answer))
        self.alive = True
        self.done.append(f"launch {self.model_dir}")

    def answer(self, request: web.Request, body: dict[str, Any]) -> Any:
        if not self.alive:
            return web.Response(status=503)
        return {"version": SGLANG, "weight_version": "1"}

    def wait(self) -> None:
        self.done.append("wait")

    def check_alive(self) -> None:
        if not self.alive:
            raise UserError(f"{self.name} ended")

    def stop(self, graceful: bool = True) -> None:
        self.alive = False
        self.done.append("stop" if graceful else "kill")


def opened(**settings: Any) -> dict[str, Any]:
    """What one start gives on this rank, and the loss of the second machine's server."""
    STARTED.clear()
    rollout = Rollout(host="0.0.0.0", servers=3, servers_per_machine=2, **settings)
    device = "cuda" if "base_gpu_id" in settings else "cpu"
    account: dict[str, Any] = {}
    try:
        with open_servers(Path("v0"), rollout, Path("logs"), device) as (info, own):
            account |= {"urls": info.urls, "sizes": info.tp_sizes, "supervises": own.fleet.urls if own else None}
            account["nothing"] = recover_servers(own, Path("v1"), "1")
            if dist.get_rank() == 2:
                STARTED[0].alive = False
            dist.barrier()
            account["lost"] = recover_servers(own, Path("v1"), "1")
            dist.barrier()
    except UserError as error:
        account["error"] = str(error)
    return account | {"servers": [[each.name, each.rollout.base_gpu_id, each.done] for each in STARTED]}


def work(directory: Path, rank: int) -> None:
    os.environ |= {"GROUP_RANK": str(MACHINES[rank]), "GLOO_SOCKET_IFNAME": "lo"}
    fleet.SGLangServer = Server
    torch.cuda.device_count = lambda: 4
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=len(MACHINES))
    found = {"whole": opened(), "gpus": opened(tensor=1, base_gpu_id=2), "spent": opened(restarts=0)}
    BROKEN.add("server-2.log")
    found["broken"] = opened()
    (directory / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(directory: Path) -> None:
    fork_ranks(partial(work, directory), len(MACHINES))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
