"""Two nodes, a Slurm of them, a server on the first, and short unbroken runs that others are compared with."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import netnodes
import pytest
import slurmd
from launching import REINFORCE, TORCHRUN, TRAIN, Run, launched
from netnodes import Node
from processes import free_port
from slurmd import Slurm


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    if why := netnodes.missing():
        pytest.skip(why)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch, netnodes.two_nodes(tmp_path_factory.mktemp("nodes")) as both:
        patch.setenv("PATH", path)  # where a checkout without .venv finds torchrun
        yield both


@pytest.fixture(scope="session")
def cluster(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if why := slurmd.missing():
        pytest.skip(why)
    with slurmd.slurm(tmp_path_factory.mktemp("slurm"), nodes, TORCHRUN.parents[1]) as started:
        yield started


@pytest.fixture(scope="session")
def reference(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes on one node."""
    return launched(tmp_path_factory.mktemp("reference"), nodes[:1], "--processes", 2, *TRAIN)


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting of a key, without which no server may be where the other node reaches it."""
    path = tmp_path_factory.mktemp("key") / "key"
    path.touch(mode=0o600)
    path.write_text("sesame-0123456789")
    return f"rollout.api_key_file={path}"


@pytest.fixture(scope="session")
def server(
    nodes: tuple[Node, Node],
    reference: Run,
    key: str,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> list[str]:
    """What names an SGLang on the first node: a job of serve.sbatch, or where there is no Slurm the verb itself."""
    directory, port = tmp_path_factory.mktemp("server"), free_port()
    words = ["experiment=demo", f"serve.checkpoint={reference.directory}/pretrained", f"run.dir={directory}"]
    words += ["rollout.host=0.0.0.0", key, f"rollout.port={port}"]
    log = directory / "out"
    if slurmd.missing():
        nodes[0].start(log, sys.executable, "-m", "megatron_bai", "serve", *words)
    else:
        cluster = request.getfixturevalue("cluster")
        cluster.submit(["--nodelist=node1", f"--output={log}"], "serve.sbatch", *words)
    deadline = time.monotonic() + 600
    while "serving" not in (shown := log.read_text() if log.exists() else ""):
        assert "error" not in shown and time.monotonic() < deadline, shown
        time.sleep(0.3)
    return [f"rollout.urls=[http://{nodes[0].address}:{port}]", key]


@pytest.fixture(scope="session")
def unbroken(nodes: tuple[Node, Node], server: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Reinforcement learning in two processes on one node, to its end."""
    directory = tmp_path_factory.mktemp("unbroken")
    return launched(directory, nodes[:1], "--processes", 2, *REINFORCE, *server)
