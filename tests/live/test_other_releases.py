"""The part of `make test-matrix` that runs every time: each other SGLang's live contract and diffs, and the newest of
all engines together.
"""

import pytest
import release_matrix
from release_matrix import Cell

ROWS = release_matrix.rows()
CELLS = [Cell(engines, "contract") for engines in ROWS if engines.others.keys() == {"sglang"} and ROWS[engines]]
CELLS += [Cell(next(iter(ROWS)), suite) for suite in ("routing", "rl")]

pytestmark = [pytest.mark.live, pytest.mark.long]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key.replace(" ", "-"))
def test_a_part_of_the_matrix(cell: Cell) -> None:
    found = release_matrix.run(cell, part=True)
    assert not found["failed"] and not found["skipped"] and found["passed"]


def test_the_newest_is_the_newest_of_all() -> None:
    assert next(iter(ROWS)).releases == {name: releases[-1] for name, releases in release_matrix.TABLE.items()}
