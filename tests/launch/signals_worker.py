"""`python signals_worker.py DIRECTORY`: ranks of gloo that are signalled, and ranks that lose each other.

What they agreed on, and what they are told, goes to found.json.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bai.errors import from_peer_error
from megatron_bai.rl.signals import handle_signals

CPU = torch.device("cpu")


def rank(number: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=number, world_size=2)
    found = []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under `nohup`
    with handle_signals(grace_s=60) as requests:
        for step, sign in enumerate([None, signal.SIGUSR1, None, signal.SIGHUP, None]):
            if sign and number == step // 2:  # rank 0 is asked in step 1, rank 1 in step 3
                os.kill(os.getpid(), sign)
                os.kill(os.getpid(), sign)  # Slurm and torchrun both send it
            asked = requests.agree(CPU)
            found.append([asked.save, asked.stop])
    (directory / f"{number}.json").write_text(json.dumps(found))


def late(number: int, directory: Path) -> None:
    """A step that goes on for longer than the grace period."""
    try:
        with handle_signals(grace_s=0.2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    finally:
        (directory / f"{number}.json").write_text('"unwound"')


def lost(number: int, directory: Path) -> None:
    """Of each two of these the second goes away, at once or only after the first has given up."""
    pair, second = divmod(number - len(SIGNALLED), 2)
    limit = timedelta(seconds=(60, 0.5)[pair])
    store = dist.FileStore(f"{directory}/store-{pair}", 2)
    dist.init_process_group("gloo", store=store, rank=second, world_size=2)
    group = dist.new_group(timeout=limit)
    said = ""
    if second:
        store.wait(["given up" if pair else "connected"], timedelta(seconds=60))
    else:
        store.set("connected", "")  # the other's end within `new_group` would be another error
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            said = str(from_peer_error(error))
        store.set("given up", "")
    (directory / f"{number}.json").write_text(json.dumps(said))


SIGNALLED = [rank, rank, late]


def main(directory: Path) -> None:
    children = {}
    for number, function in enumerate([*SIGNALLED, lost, lost, lost, lost]):
        if not (child := os.fork()):
            code = 1
            try:
                function(number, directory)
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                os._exit(code)
        children[number] = child
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children.values()]
    found = [json.loads((directory / f"{number}.json").read_text()) for number in children]
    (directory / "found.json").write_text(json.dumps({"codes": codes, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
