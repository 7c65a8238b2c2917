"""The example of docs/replay.md adds R3 to a plain Megatron-Core loop: few lines, and nothing else of this library."""

import re

import pytest
from processes import TESTS, launch
from routing.docs_worker import MICROS, STEPS

PAGE = (TESTS.parent / "docs" / "replay.md").read_text()


@pytest.mark.distributed
def test_the_example_runs_and_every_row_is_proven() -> None:
    lines = [line.split() for line in launch(TESTS / "routing" / "docs_worker.py").splitlines() if line[:1].isdigit()]
    assert len(lines) == STEPS
    for step, (number, loss, rows, recomputed) in enumerate(lines):
        assert int(number) == step and 3 < float(loss) < 6
        assert int(rows) == int(recomputed) == (step + 1) * MICROS * (15 + 7) * 2


def test_the_example_uses_routing_alone() -> None:
    code = PAGE.partition("```python\n")[2].partition("```")[0]
    assert {line for line in code.splitlines() if "megatron_bai" in line} == set(
        re.findall(r"from megatron_bai\.routing.*", code)
    )
    assert code.count("# replay") == 5
