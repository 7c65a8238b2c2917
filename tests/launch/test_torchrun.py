"""launch/torchrun.sh: its options, and a run on two machines that is the run on one."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import REINFORCE, TORCHRUN, TRAIN, Run, launched, logs
from netnodes import Node

pytestmark = pytest.mark.distributed


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # for a checkout without .venv
    return subprocess.run([TORCHRUN, *words], capture_output=True, text=True, timeout=300, env=here)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "say which verb"),
        ("--nodes", "--nodes needs a value"),
        ("--nods 2 train", "there is no option --nods"),
        ("--nodes two train", "--nodes is 'two': give a whole number"),
        ("--processes 0 train", "--processes is 0: it must be at least 1"),
        ("--nodes 2 train", "give --head HOST"),
        ("--head somewhere train", "give --nodes, too"),
        ("--nodes 2 --head localhost train", "means this machine alone"),
        ("--nodes 2 --head no.such.invalid train", "no way from"),
        ("--nodes 2 --head 192.0.2.1:http train", "the port of --head is 'http'"),
        ("--nodes 2 --head 192.0.2.1 --node-rank 2 train", "--nodes 2 it is 0 to 1"),
        ("--nodes 2 --head 192.0.2.1 --node-rank 1 --restarts 3 train", "leave out --node-rank"),
    ],
)
def test_a_mistake_is_one_line(words: str, named: str) -> None:
    done = torchrun(*words.split())
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith("torchrun.sh: error: ") and named in done.stderr


def test_help_names_every_option() -> None:
    parsed = re.search(r"^ +(--processes \|.*)\)$", TORCHRUN.read_text(), re.M).group(1).split(" | ")
    described = re.findall(r"^  (--[\w-]+) ", torchrun("--help").stdout, re.M)
    assert sorted(parsed) == sorted(described)


def test_ranks_write_files_and_rank_0_is_shown(reference: Run) -> None:
    own = {Path(name).parent.name: text for name, text in reference.logs.items()}
    assert own.keys() == {"0", "1"} and all(name.startswith("node1/") for name in reference.logs)
    assert "step    4/4" in own["0"] and own["1"] == ""
    assert reference.shown == ["".join(f"[0] {line}\n" for line in own["0"].splitlines())]


@pytest.mark.distributed
def test_a_verb_that_does_not_train_is_given_no_setting_of_training() -> None:
    done = torchrun("--processes", "1", "doctor")
    assert done.returncode == 0 and "The main job can run here" in done.stdout, done.stderr


@pytest.mark.long
def test_two_machines_compute_what_one_does(reference: Run, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    found = launched(tmp_path, nodes, "--nodes", 2, "--head", "node1:29600", "--processes", 1, *TRAIN, ranked=True)
    assert len(found.steps) == 4 and found.steps == reference.steps  # every bit of every loss and gradient norm
    assert "step    4/4" in found.shown[0] and found.shown[1] == ""


@pytest.mark.live
@pytest.mark.long
def test_each_machine_has_a_server_and_restarts_it(
    nodes: tuple[Node, Node], key: str, unbroken: Run, tmp_path: Path
) -> None:
    """The second machine's is killed after a step. The samples are those of one server, whichever answered."""
    words = ["--nodes", 2, "--head", "node1:29610", "--processes", 1, *REINFORCE, key, "rollout.host=0.0.0.0"]
    words += ["rollout.servers=2", "rollout.servers_per_machine=1"]
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(launched, tmp_path, nodes, *words, ranked=True)
        record = tmp_path / "metrics.jsonl"
        while not (record.exists() and record.read_text()) and not run.done():
            time.sleep(0.1)
        assert run.running(), run.result()
        nodes[1].processes("rollout.servers.server_main")[0].kill()
        found = run.result()
    assert found.steps == unbroken.steps
    said = "".join(logs(tmp_path, "stderr").values()) + "".join(found.said)
    assert f"SGLang at http://{nodes[1].address}" in said and "it is started anew (1 of 2)" in said
    assert {path.name for path in tmp_path.glob("server*.log")} == {"server.log", "server-1.log"}
    assert not any(node.processes("rollout.servers.server_main") for node in nodes[1:])
