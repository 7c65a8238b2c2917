"""`python -m megatron_bai.rollout.servers.server_main [OWN…] ARGS`: SGLang's own server, on a CPU too.

ARGS are SGLang's. OWN, which come first, are ours:

    --parent PID      the process to end with
    --instance NAME   what `/megatron_bai/instance` answers, by which whoever started this server knows it
    --key-file FILE   holds the key that requests must carry
    --take-tensors    keep the path that unpickles weights out of a request
    --exact           with `rollout.exact`: the compatibility fix of scope `sglang-exact` is applied, too
    --untested        SGLang is of a release that no compatibility fix names: none is applied
    --route-weights   return the weights of a token's experts beside their ids (scope `sglang-weights`)

The compatibility fixes of scope `sglang-models` are applied first, for models that SGLang would serve as others or not
at all. With `--device cpu` those of `sglang-cpu` are, too, and SGLang looks for models in `served_models` before it
imports all of its own; on a GPU it computes as it is. On a CPU its scheduler and detokenizer are forked from this
process (`compat/sglang_forked_workers.py`). On a GPU SGLang starts them with multiprocessing's spawn method, which
imports this module again in each of them as `__mp_main__` with the same arguments: so what stands at the top level
reaches every process of the server, and no other process.

Each process asks the kernel to kill it when its parent dies, the first of them when PID does: whatever ends the
trainer, no server is left behind. SGLang asks for its workers as well, but only once they have imported everything.

The key is put into SGLang's settings after they were parsed, so that no command line has it; SGLang logs its settings,
so every process leaves it out of what it logs. Paths that read pickles are taken away, and the store in which the ranks
of one machine meet, which torch opens to every network, listens where it was told to.
"""

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from multiprocessing import resource_tracker
from typing import Any

from megatron_bai import compat
from megatron_bai.rollout import served_models
from megatron_bai.rollout.served_models import config_types
from megatron_bai.rollout.servers.auth import read_key
from megatron_bai.rollout.servers.control import INSTANCE_PATH
from megatron_bai.rollout.servers.socket_dir import INSTANCE_ID_LENGTH
from megatron_bai.utils.child_processes import die_with_parent
from megatron_bai.utils.imports import gc_disabled_for_imports

# The arguments of this module
_OWN = ("--parent", "--instance", "--key-file", "--take-tensors", "--untested", "--exact", "--route-weights")
_TENSORS = "/update_weights_from_tensor"
# SGLang 0.5.21, http_server.py
_PICKLE_PATHS = {_TENSORS, "/update_weights_from_ipc", "/load_lora_adapter_from_tensors"}


@dataclass
class ServerArgs:
    """The arguments of this module, and SGLang's."""

    parent: int | None = None
    instance: str = ""
    key: str = ""
    take_tensors: bool = False
    untested: bool = False
    exact: bool = False
    route_weights: bool = False
    words: tuple[str, ...] = ()  # ours as they were given, without the parent
    rest: tuple[str, ...] = ()


def parse_args(arguments: list[str]) -> ServerArgs:
    """Split the command line into this module's arguments and SGLang's.

    Raises:
        UserError: the key cannot be read.
    """
    found, rest = ServerArgs(), list(arguments)
    while rest[:1] and rest[0] in _OWN:
        name = rest.pop(0)
        if name == "--parent":
            found.parent = int(rest.pop(0))
        elif name == "--instance":
            found.words += (name, rest[0])
            found.instance = rest.pop(0)
        elif name == "--key-file":
            found.words += (name, rest[0])
            found.key = read_key(rest.pop(0))
        else:
            found.words += (name,)
            found.take_tensors |= name == "--take-tensors"
            found.untested |= name == "--untested"
            found.exact |= name == "--exact"
            found.route_weights |= name == "--route-weights"
    found.rest = tuple(rest)
    return found


def uses_cpu(arguments: list[str]) -> bool:
    """Return whether SGLang's arguments choose the CPU."""
    return "--device=cpu" in arguments or ("--device", "cpu") in pairwise(arguments)


def run_server(given: ServerArgs) -> None:
    """Serve until a signal stops the process."""
    with gc_disabled_for_imports():
        prepare_for(given)
        from sglang.launch_server import run_server
        from sglang.srt.entrypoints import http_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils import kill_process_tree

    load_plugins()
    shut = _PICKLE_PATHS - ({_TENSORS} if given.take_tensors else set())
    routes = http_server.app.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", "") not in shut]
    http_server.app.add_api_route(INSTANCE_PATH, lambda: {"instance": given.instance})
    server_args = prepare_server_args(list(given.rest))
    if given.instance:
        _name_shared_memory(given.instance)
    if given.key:
        server_args.api_key = given.key
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _name_shared_memory(instance: str) -> None:
    """Put the server's name into that of SGLang's shared memory, by which it is removed with a killed server."""
    from sglang.srt.server_args import PortArgs

    init_new = PortArgs.init_new

    def init_named(*args: Any, **named: Any) -> Any:
        ports = init_new(*args, **named)
        ports.instance_id = instance[:INSTANCE_ID_LENGTH]
        return ports

    PortArgs.init_new = staticmethod(init_named)


def init_process() -> ServerArgs:
    """Tie this process to its parent and return its arguments.

    multiprocessing hands `sys.argv` on, so the `--parent` that a worker reads is written here by the process that
    starts it.
    """
    # A cluster's signals reach every process of a job; the trainer, which needs the server until its step has ended,
    # stops it. Blocked and not ignored, for SGLang sets handlers. Starting Python's resource tracker unblocks SIGTERM.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    given = parse_args(sys.argv[1:])
    if given.parent is not None:
        die_with_parent(given.parent)
    sys.argv[1:] = ["--parent", str(os.getpid()), *given.words, *given.rest]
    if given.key:
        keep_out_of_logs(given.key)
    return given


def prepare_for(given: ServerArgs) -> None:
    """Call `prepare` as a server's arguments want it: in the server, and in a worker that is not forked from it."""
    prepare(uses_cpu(list(given.rest)), given.untested, given.exact, given.route_weights)


def prepare(cpu: bool, untested: bool = False, exact: bool = False, route_weights: bool = False) -> None:
    """Import what SGLang needs first, as changed for a CPU or as it is, and name the models that transformers lacks.

    Args:
        cpu: whether SGLang computes on a CPU.
        untested: its release is one that no compatibility fix names; a CPU needs them.
        exact: compute each token as if it were alone (`rollout.exact`), on a CPU.
        route_weights: return the weights of a token's experts, too.
    """
    if cpu:
        os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", served_models.__name__)  # unless the user has models
        compat.apply("sglang-cpu")
    if not untested:
        compat.apply("sglang-models")
    if exact:
        compat.apply("sglang-exact")
    if route_weights:
        compat.apply("sglang-weights")
    _restrict_tcp_store()
    config_types.register()


def keep_out_of_logs(secret: str) -> None:
    """Replace a secret by stars in every log record of this process."""
    make = logging.getLogRecordFactory()

    def starred(*args: Any, **named: Any) -> logging.LogRecord:
        record = make(*args, **named)
        with suppress(Exception):  # a record that cannot be formatted is handled by logging
            if secret in (text := record.getMessage()):
                record.msg, record.args = text.replace(secret, "***"), ()
        return record

    logging.setLogRecordFactory(starred)


def _restrict_tcp_store() -> None:
    """Make torch's TCPStore, which listens on all networks, listen at its own address.

    Where that address is all networks, it listens on loopback: the ranks of a server are on one machine.
    """
    rendezvous: Any = import_module("torch.distributed.rendezvous")  # the package has a function of that name
    store = rendezvous.TCPStore

    def listening(host_name: str, port: int, *args: Any, is_master: bool = False, **named: Any) -> Any:
        if is_master:
            address = "127.0.0.1" if host_name == "0.0.0.0" else host_name
            with suppress(OSError), socket.create_server((address, port)) as listener:
                named["master_listen_fd"] = listener.detach()
        return store(host_name, port, *args, is_master=is_master, **named)

    rendezvous.TCPStore = listening


if __name__ == "__mp_main__":  # a worker
    prepare_for(init_process())
elif __name__ == "__main__":
    run_server(init_process())
