"""A source that is replaced while `convert` or `train` reads it gives no result."""

import json
from pathlib import Path

import pytest
from processes import launch
from replaced_worker import CASES

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `replaced_worker.py` leaves."""
    directory = tmp_path_factory.mktemp("replaced")
    launch(Path(__file__).with_name("replaced_worker.py"), directory)
    return directory


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_source_that_is_replaced_while_it_is_read_gives_no_result(case: tuple[str, str, str], replaced: Path) -> None:
    verb, _, what = case
    found = json.loads((replaced / f"{'-'.join(case)}.json").read_text())
    if what in ("nothing", "log"):
        assert found == {"said": "", "replaced": "", "target": verb == "convert"}
    else:
        assert bool(found["replaced"]) == (what != "directory") and found["replaced"] in found["said"]
        assert "was replaced or changed while it was read: run again" in found["said"]
        assert not found["target"] and not list(replaced.glob(f".{'-'.join(case)}-target.unfinished"))
