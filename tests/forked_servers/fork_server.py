"""`python fork_server.py KIND PARENT FD`: forks a process for everyone who connects to the socket FD.

KIND `server`: a server; SGLang is imported once, when it is first asked. KIND `script`: a script, or `-m MODULE`, that
trains a model; Megatron-Core and this package are.

Nothing of them is imported before: every run of tests starts both kinds. One thread: a fork would lose the others, with
what they hold. So all is done in one loop, and the threads are counted before each fork.
"""

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from megatron_bai import compat
from megatron_bai.utils.child_processes import die_with_parent
from megatron_bai.utils.imports import gc_disabled_for_imports

IMPORTED = ["entrypoints.http_server", "model_executor.model_runner", "models.registry", "managers.scheduler"]
TRAINING = [
    "megatron.core.models.gpt", "megatron.core.distributed", "megatron.core.dist_checkpointing",
    "megatron_bai.rl.trainer", "megatron_bai.merge.pipeline",
]  # fmt: skip


def main(kind: str, listener: socket.socket) -> None:
    prepare, run = KINDS[kind]
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.select()  # until the first asks: most runs of tests need none of this
        prepare()
        serve(listener, selector, run)


def prepare_server() -> None:
    """Import all that a server does."""
    with gc_disabled_for_imports():
        from megatron_bai.rollout import served_models
        from megatron_bai.rollout.servers import server_main  # noqa: F401, of which forks run a function

        os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = served_models.__name__
        compat.apply("sglang-cpu")
        compat.apply("sglang-models")
        import_module("sglang.launch_server")
        for name in IMPORTED:
            import_module(f"sglang.srt.{name}")
    save_weights_where_asked()


def prepare_script() -> None:
    """Import what scripts do that train a model. Their collector does not look at it again."""
    with gc_disabled_for_imports():
        compat.apply("megatron-cpu")
        for name in TRAINING:
            import_module(name)
    gc.freeze()


def save_weights_where_asked() -> None:
    """Let `/weights_checker` do the action `save FILE`: SGLang gives away no weights, on a CPU no checksums either."""
    checker = import_module("sglang.srt.utils.weight_checker").WeightChecker
    upstream = checker.handle

    def handle(self: Any, action: str, *args: Any, **named: Any) -> Any:
        if not action.startswith("save "):
            return upstream(self, action, *args, **named)
        weights = {name: tensor.detach().clone() for name, tensor in self._model_state()}
        import_module("torch").save(weights, action.removeprefix("save "))

    checker.handle = handle


def serve(listener: socket.socket, selector: selectors.BaseSelector, run: Callable[[list[str]], None]) -> None:
    """Fork for those who connect; interrupt or kill a fork when whoever asked for it does so or is no more."""
    forks: dict[socket.socket, int] = {}
    while True:
        for key, _ in selector.select(0.05):
            if key.fileobj is listener:
                asked, _ = listener.accept()
                forks[asked] = fork(asked, [listener, *forks], run)
                selector.register(asked, selectors.EVENT_READ)
            elif b"interrupt" in (said := key.fileobj.recv(100)):
                os.kill(forks[key.fileobj], signal.SIGINT)
            elif not said:
                end(forks[key.fileobj])
        for asked, pid in list(forks.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                end(pid)  # what it started
                with suppress(OSError):
                    asked.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                selector.unregister(asked)
                asked.close()
                del forks[asked]


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def fork(asked: socket.socket, others: list[socket.socket], run: Callable[[list[str]], None]) -> int:
    """The process id of a fork that runs what `asked` says."""
    _, (out, err), _, _ = socket.recv_fds(asked, 1, 2)
    request = json.loads(asked.makefile().readline())
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork of a process with {threads} threads would lose all but one"
    pid = os.fork()
    if pid == 0:
        become(request, out, err, [asked, *others], run)
    os.close(out)
    os.close(err)
    with suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # at once, as `end` needs it
    return pid


def become(
    request: dict, out: int, err: int, inherited: list[socket.socket], run: Callable[[list[str]], None]
) -> NoReturn:
    """What was asked for, as if this process had been started as that."""
    code = 1
    try:
        for each in inherited:
            each.close()
        os.setpgid(0, 0)
        for stream, number in ((out, 1), (err, 2)):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["directory"])
        tempfile.tempdir = None  # TMPDIR is read anew
        run(request["arguments"])
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_server(arguments: list[str]) -> None:
    from megatron_bai.rollout.servers import server_main

    serve_family()
    sys.argv = [server_main.__file__, "--parent", str(os.getppid()), *arguments]
    server_main.run_server(server_main.init_process())


def run_script(arguments: list[str]) -> None:
    """As `python ARGUMENTS` does: with the script's directory and those of PYTHONPATH before all others."""
    where = str(Path(arguments[0]).parent) if arguments[0] != "-m" else os.getcwd()
    sys.path[:0] = [where, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def serve_family() -> None:
    """Let SGLang find the family that this fork serves, which a server of its own does as it imports its registry."""
    from megatron_bai.rollout import served_models

    if module := os.environ.get(served_models.SERVED_MODULE):
        entry = import_module(module).EntryClass
        models = import_module("sglang.srt.models.registry").ModelRegistry.models
        models.update({each.__name__: each for each in (entry if isinstance(entry, list) else [entry])})


KINDS = {"server": (prepare_server, run_server), "script": (prepare_script, run_script)}

if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[3])))
