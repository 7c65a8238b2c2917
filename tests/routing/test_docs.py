"""The example of docs/replay.md is a whole program: a plain Megatron-Core loop, of which few lines are replay."""

import ast
import re
from pathlib import Path

import pytest
from processes import TESTS, launch

PAGE = (TESTS.parent / "docs" / "replay.md").read_text()
CODE = PAGE.partition("```python\n")[2].partition("```")[0]
STEPS = 3
ROWS = 2 * (15 + 7) * 2  # of a step: micro-batches × the tokens of two samples with a route × layers


@pytest.mark.distributed
def test_the_example_runs_as_printed_and_every_row_is_proven(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(CODE)
    lines = [line.split() for line in launch(tmp_path / "example.py", fresh=True).splitlines()]
    losses, replayed = ([line for line in lines if (line[0] == "replayed") == named] for named in (False, True))
    assert [int(line[0]) for line in losses] == list(range(STEPS)) and all(3 < float(line[1]) < 6 for line in losses)
    for step, (_, rows, _, recomputed) in enumerate(replayed):
        assert int(rows) == int(recomputed) == (step + 1) * ROWS
    assert len(replayed) == STEPS


def without_replay() -> str:
    """The block without its marked lines; what a marked `with` holds is moved out of it."""
    kept, inside = [], None
    for line in CODE.splitlines():
        indent = len(line) - len(line.lstrip())
        if inside is not None and line.strip() and indent <= inside:
            inside = None
        if re.search(r"# replay\b", line):
            inside = indent if line.lstrip().startswith("with ") else inside
            continue
        kept.append(line[4:] if inside is not None else line)
    return "\n".join(kept)


@pytest.mark.distributed
def test_the_marked_lines_are_all_that_replay_adds(tmp_path: Path) -> None:
    """Without them the loop runs, and nothing in it knows of routing."""
    plain = without_replay()
    assert not re.search(r"routing|\breplay\b|micro_routes|Place|assemble|MicroRoutes|RoutingReplay", plain)
    (tmp_path / "plain.py").write_text(plain)
    lines = [line.split() for line in launch(tmp_path / "plain.py", fresh=True).splitlines()]
    assert [int(line[0]) for line in lines] == list(range(STEPS)) and all(3 < float(line[1]) < 6 for line in lines)


def test_replay_uses_routing_alone() -> None:
    """The other imports of this library are the backend's, for a CPU."""
    imports = [node for node in ast.walk(ast.parse(CODE)) if isinstance(node, ast.ImportFrom) and node.module]
    ours = {node.module for node in imports if node.module.startswith("megatron_bai")}
    backend = {"megatron_bai.config", "megatron_bai.distributed.backend"}
    assert ours - backend == {"megatron_bai.routing.layout", "megatron_bai.routing.replay"}
    assert len(re.findall(r"# replay\b", CODE)) == 11  # ten, and one that prints
