"""Makes of `python -m megatron_bai.rollout.servers.server_main …`, with this directory on PYTHONPATH, a fork.

Python imports this file at its start. Where a fork server listens at FORKED_SERVERS, a process that would become
SGLang on a CPU asks it for a fork that has imported SGLang already, and stands for it: it has the process id that the
package knows, passes SIGINT on, ends as the fork ends, and when it is killed the fork is killed, too.
"""

import os
import sys

MODULE = "megatron_bai.rollout.servers.server_main"


def _stand_for_fork(address: str, arguments: list[str]) -> None:
    import json
    import signal
    import socket

    from megatron_bai.utils.child_processes import die_with_parent

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})  # as server_main
    if arguments[:1] == ["--parent"]:
        die_with_parent(int(arguments[1]))
        del arguments[:2]
    with socket.socket(socket.AF_UNIX) as fork:
        fork.connect(address)
        request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()})
        signal.signal(signal.SIGINT, lambda *_: fork.send(b"interrupt\n"))
        socket.send_fds(fork, [b"\n"], [1, 2])
        fork.sendall(request.encode() + b"\n")
        code = fork.makefile().readline().strip()
    if not code:
        os.write(2, b"RuntimeError: the fork server ended\n")
    os._exit(int(code or 1) % 256)


if os.environ.get("ENGINE_IMPORTS"):  # Python imports one sitecustomize: this one stands before that of import_log
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "..", "import_log", "sitecustomize.py"))

if os.environ.get("FORKED_SERVERS") and sys.orig_argv[1:3] == ["-m", MODULE]:
    words = sys.orig_argv[3:]
    if ("--device", "cpu") in zip(words, words[1:], strict=False):
        _stand_for_fork(os.environ["FORKED_SERVERS"], words)
