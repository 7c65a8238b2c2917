"""`python machines_worker.py DIRECTORY`, on the second node: leaves what it knows of the others in found.json."""

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_bai.distributed import hosts
from megatron_bai.errors import UserError
from megatron_bai.rl.session import _require_shared_dir

_CLONE_NEWNS = 0x00020000  # linux/sched.h


def said(function: Callable[..., object], *arguments: object) -> object:
    """What it returns, or complains of."""
    try:
        return function(*arguments)
    except UserError as error:
        return f"error: {error}"


def shared(rank: int, directory: Path) -> object:
    """One of two ranks; a part of the tree is the second one's own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    return [said(_require_shared_dir, directory / "both"), said(_require_shared_dir, directory / "own")]


def second(directory: Path) -> None:
    """The other rank, with mounts of its own."""
    ctypes.CDLL(None).unshare(_CLONE_NEWNS)
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "own", str(directory / "own")]):
        subprocess.run(["mount", *words], check=True)
    shared(1, directory)


def main(directory: Path) -> None:
    (directory / "own").mkdir()
    other = multiprocessing.get_context("fork").Process(target=second, args=(directory,))
    other.start()
    found = {"alone": hosts.host_address(), "shared": shared(0, directory)}
    other.join()
    assert other.exitcode == 0
    os.environ["GROUP_WORLD_SIZE"] = "2"
    del os.environ["GLOO_SOCKET_IFNAME"]
    os.environ.pop("NCCL_SOCKET_IFNAME", None)
    for name, head in {"address": "10.77.0.1", "name": "node1", "own name": "node2", "nowhere": "192.0.2.1"}.items():
        os.environ["MASTER_ADDR"] = head
        found[name] = said(hosts.host_address)
    os.environ["MASTER_ADDR"] = "node1"
    hosts.set_network_interface()
    found["interfaces"] = [os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]]
    found["own files"] = [path.name for path in (directory / "both").iterdir()]
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
