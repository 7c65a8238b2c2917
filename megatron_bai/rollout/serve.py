"""`python -m megatron_bai.rollout.serve [--parent PID] ARGS`: SGLang's own server, on a CPU too.

ARGS are SGLang's. With `--device cpu` the patches of scope `sglang-cpu` go in first; on a GPU nothing is changed.
On a CPU its scheduler and detokenizer are forked from this process (`patches/sglang_forked_workers.py`). On a GPU
SGLang starts them with multiprocessing's spawn method, which imports this module again in each of them as `__mp_main__`
with the same arguments: so what stands at the top level reaches every process of the server, and nobody else's.

Each process asks the kernel to kill it when its parent dies, the first of them when PID does: whatever ends the
trainer, no server is left behind. SGLang asks for its workers as well, but only once they have imported everything.
"""

import os
import signal
import sys
from multiprocessing import resource_tracker

from megatron_bai import patches
from megatron_bai.processes import die_with


def on_cpu(arguments: list[str]) -> bool:
    """Whether SGLang's arguments ask for the CPU."""
    return "--device=cpu" in arguments or ("--device", "cpu") in zip(arguments, arguments[1:])


def main(arguments: list[str]) -> None:
    """Serve until told to stop. `arguments` are SGLang's."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def enter() -> list[str]:
    """Tie this process to its parent, prepare it to run SGLang, and return SGLang's arguments.

    multiprocessing hands `sys.argv` on, so the `--parent` that a worker reads is written here by the process that
    starts it.
    """
    # A cluster's signals reach every process of a job; the trainer, which needs the server until its step has ended,
    # stops it. Blocked and not ignored, for SGLang sets handlers. Starting Python's resource tracker unblocks SIGTERM.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    arguments = sys.argv[1:]
    if arguments[:1] == ["--parent"]:
        die_with(int(arguments[1]))
        arguments = arguments[2:]
    sys.argv[1:] = ["--parent", str(os.getpid()), *arguments]
    if on_cpu(arguments):
        patches.apply("sglang-cpu")
    return arguments


if __name__ == "__mp_main__":  # a worker
    enter()
elif __name__ == "__main__":
    main(enter())
