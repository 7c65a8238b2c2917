"""A Slurm of two nodes: munged, slurmctld and a slurmd each, all in one directory and all ended with the nodes."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from netnodes import Node

_TIMEOUT_S = 600  # of a job, on a machine that does something else as well
_ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
_MUNGE = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
_CONF = """
ClusterName=test
SlurmctldHost=node1({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
{nodes}
{extra}
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 MaxTime=60
PartitionName=high Nodes=node[1-2] PriorityTier=2 MaxTime=60
"""

# A site that hands out GPUs, and binds a task to the CPUs that it asked for.
_BINDING = "TaskPlugin=task/affinity\nTaskPluginParam=autobind=threads\nGresTypes=gpu"


def missing() -> str:
    """What keeps this machine from having a Slurm; empty if nothing does."""
    lacking = [name for name in _DAEMONS if not shutil.which(name)]
    return f"no {', '.join(lacking)} here: apt-get install slurm-wlm munge" if lacking else ""


@dataclass(frozen=True)
class Slurm:
    """The cluster, seen from its first node, by somebody in the checkout at `root`."""

    directory: Path
    head: Node
    root: Path

    def run(self, *words: object) -> str:
        return self.head.run("env", f"SLURM_CONF={self.directory}/slurm.conf", *words)

    def submit(self, options: list[str], script: str, *words: object) -> str:
        """The number of a new job that runs a script of launch/slurm."""
        return self.sbatch(f"--chdir={self.root}", *options, self.root / "launch" / "slurm" / script, *words)

    def sbatch(self, *words: object) -> str:
        """The number of a new job."""
        return self.run("sbatch", "--parsable", *words).strip()

    def shown(self, job: str) -> str:
        """All that Slurm knows of a job."""
        return self.run("scontrol", "show", "job", job)

    def state(self, job: str) -> str:
        """As Slurm calls it: PENDING, RUNNING, COMPLETED, …"""
        return re.search(r"JobState=(\w+)", self.shown(job)).group(1)

    def until(self, happened: Callable[[], bool], job: str) -> None:
        """Wait for something that a job brings about; fail when it ends without, or takes too long."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not happened():
            assert self.state(job) not in _ENDS and time.monotonic() < deadline, self.shown(job) + self.logs()
            time.sleep(0.3)

    def ended(self, job: str) -> str:
        """The state in which a job ends."""
        deadline = time.monotonic() + _TIMEOUT_S
        while (state := self.state(job)) not in _ENDS:
            assert time.monotonic() < deadline, self.shown(job) + self.logs()
            time.sleep(0.3)
        return state

    def logs(self) -> str:
        """The end of what each daemon said."""
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.log"))


@contextmanager
def slurm(directory: Path, nodes: tuple[Node, Node], root: Path, gpus: int = 0) -> Iterator[Slurm]:
    """Started, with both nodes idle. `gpus` of each are files that no driver stands behind, by which Slurm counts."""
    for name in ("state", "spool-node1", "spool-node2"):
        (directory / name).mkdir()
    cpus = max(os.cpu_count() or 1, 2) if gpus else 4  # tasks are bound to none but real ones
    has = f"CPUs={cpus} RealMemory=1000 State=UNKNOWN" + (f" Gres=gpu:{gpus}" if gpus else "")
    lines = "\n".join(f"NodeName={node.name} NodeAddr={node.address} {has}" for node in nodes)
    for index in range(gpus):
        (directory / f"gpu{index}").symlink_to("/dev/null")
    (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-{gpus - 1}]\n" if gpus else "")
    extra = _BINDING if gpus else "TaskPlugin=task/none"
    conf = _CONF.format(directory=directory, address=nodes[0].address, nodes=lines, extra=extra)
    (directory / "slurm.conf").write_text(conf)
    (directory / "munge.key").write_bytes(os.urandom(128))
    (directory / "munge.key").chmod(0o600)
    own = [f"--{name}={directory}/munge.{end}" for name, end in _MUNGE.items()]
    nodes[0].run("munged", "--force", *own)
    cluster = Slurm(directory, nodes[0], root)
    cluster.run("slurmctld")
    for node in nodes:
        node.run("env", f"SLURM_CONF={directory}/slurm.conf", "slurmd", "-N", node.name)
    deadline = time.monotonic() + 30
    while set(cluster.run("sinfo", "--Node", "--noheader", "--format=%T").split()) != {"idle"}:
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.2)
    yield cluster
