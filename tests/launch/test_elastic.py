"""A run on two machines of which one loses a rank, and which then lose each other while they save."""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import REINFORCE, STEPS, Run, launched, logs
from netnodes import Node

from megatron_bai.checkpoint import manifest

pytestmark = [pytest.mark.live, pytest.mark.distributed, pytest.mark.long]

SILENCE_S = 15
SILENT = f"error.*: another process of the run .* \\(it did not answer within {SILENCE_S} s, backend.timeout_s\\)"


def saved(run: Path) -> list[str]:
    """The checkpoints that would be gone on from, every byte of them what was written."""
    found = sorted((run / "checkpoints").glob("step-*"))
    assert all(manifest.verify_weights(path) for path in found)
    return [path.name for path in found]


@pytest.fixture(scope="module")
def broken(
    nodes: tuple[Node, Node], server: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[str], float]:
    """The run, the checkpoints there were while the network was cut, and the seconds from its healing to the end."""
    run = tmp_path_factory.mktemp("broken")
    words = ["--nodes", 2, "--head", nodes[0].address, "--processes", 1, "--restarts", 3, *REINFORCE]
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(launched, run, nodes, *words, *server, f"backend.timeout_s={SILENCE_S}")

        def until(pattern: str) -> None:
            """Some path below the run's directory is like this."""
            while not any(run.glob(pattern)):
                assert not going.done(), going.result()
                time.sleep(0.002)

        def until_said(stream: str, words: str, ranks: int) -> None:
            while sum(bool(re.search(words, text)) for text in logs(run, stream).values()) < ranks:
                assert not going.done(), going.result()
                time.sleep(0.1)

        try:
            until("checkpoints/step-00001")
            nodes[1].processes("-u -m megatron_bai")[0].kill()
            until_said("stdout", "going on from", 1)
            until("checkpoints/.step-*")
            nodes[1].link("down")
            until_said("stderr", SILENT, 2)
            whole = saved(run)
        finally:
            nodes[1].link("up")
        healed = time.monotonic()
        return going.result(), whole, time.monotonic() - healed


def test_after_a_kill_and_a_cut_it_is_the_run_that_was_not_broken(
    broken: tuple[Run, list[str], float], unbroken: Run
) -> None:
    run, whole, _ = broken
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["complete"] and len(summary["resumed"]) == 2 and summary["resumed"][1] == len(whole)
    assert run.shown[0].count("going on from") == 2 and f"step    {STEPS}/{STEPS}" in run.shown[0]
    assert run.steps == unbroken.steps and len(run.steps) == STEPS
    assert all(step["grad_norm"] > 0 for step in run.steps)
    assert saved(run.directory) == [f"step-{step:05}" for step in range(1, STEPS + 1)]


def test_what_is_shown_of_a_network_that_is_cut(
    broken: tuple[Run, list[str], float], fault: Callable[..., None]
) -> None:
    """One line on each machine, and no traceback through our code."""
    for node, said in enumerate(broken[0].said):
        assert len(re.findall(SILENT, said)) == 1 and not re.search("File .*/megatron_bai/", said), (node, said)
    line = re.search(f".*{SILENT}.*", broken[0].said[0])[0]
    lost = "nothing within `backend.timeout_s`; after it the steps since the last checkpoint, with `--restarts`"
    fault("the network between two nodes cut and healed", lost, line, broken[2])
