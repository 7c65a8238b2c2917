"""Machines of their own, as far as a network can tell: host name, address, processes; one file system for all.

Each is a set of Linux namespaces that live as long as one process does. When that ends, whatever way, the kernel kills
every process inside and takes the network away, so nothing can be left behind.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_REAPER = Path(__file__).parents[1] / "e2e" / "reaper.py"
_KINDS = ["--net", "--uts", "--mount", "--pid"]
# bash and not sleep is the first process of a node: it reaps what others leave.
_BOOT = 'hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && echo up && sleep infinity & wait'


def missing() -> str:
    """What keeps this machine from having nodes; empty if nothing does."""
    if not shutil.which("ip"):
        return "no `ip` here: install iproute2"
    tried = subprocess.run(["unshare", *_KINDS, "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not permitted here: be root ({tried.stderr.strip()})" if tried.returncode else ""


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    pid: int  # of its first process

    def finish(self, *words: object, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command on this node, in the current directory, to its end."""
        return subprocess.run(self._here(words), capture_output=True, text=True, timeout=seconds)

    def start(self, log: Path, *words: object) -> None:
        """Run a command that ends with the node; its output goes to `log`."""
        with open(log, "wb") as out:
            subprocess.Popen(self._here(words), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

    def processes(self, part: str) -> list[psutil.Process]:
        """Those on this node whose command line has `part`, the first ones first."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # it has ended
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == os.readlink(f"/proc/{self.pid}/ns/pid")
                if here and part in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def run(self, *words: object) -> str:
        """What a command that succeeds says."""
        done = self.finish(*words)
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def link(self, state: str) -> None:
        """Cut its cable (`down`) or heal it (`up`)."""
        self.run("ip", "link", "set", "eth0", state)

    def _here(self, words: tuple[object, ...]) -> list[str]:
        enter = ["nsenter", "--target", self.pid, *_KINDS, "env", f"--chdir={os.getcwd()}", *words]
        return [str(word) for word in enter]


@contextmanager
def two_nodes(directory: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes with a cable between them. Each knows the other's name, and its own as Debian does: as loopback."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(_node(directory, number)) for number in (1, 2)]
        ends = [["name", "eth0", "netns", str(node.pid)] for node in nodes]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for node in nodes:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
            node.link("up")
        yield nodes[0], nodes[1]


@contextmanager
def _node(directory: Path, number: int) -> Iterator[Node]:
    name, hosts = f"node{number}", directory / f"hosts{number}"
    other = 3 - number
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{other} node{other}\n")
    boot = ["unshare", *_KINDS, "--mount-proc", "--fork", "--kill-child", "bash", "-c", _BOOT, name, str(hosts)]
    reaper = [sys.executable, str(_REAPER), str(directory / f"{name}-orphans"), *boot]
    with subprocess.Popen(reaper, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "up\n", f"{name} did not start"
            first = psutil.Process(process.pid).children()[0].children()[0]
            yield Node(name, f"10.77.0.{number}", first.pid)
        finally:
            process.terminate()
