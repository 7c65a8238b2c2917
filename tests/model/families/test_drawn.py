"""Random configurations of each family: the same function as the reference's, or refused by the name of a key."""

import json
from pathlib import Path
from typing import Any

import pytest
from model.families import published
from processes import TESTS, launch

pytestmark = [pytest.mark.distributed, pytest.mark.long]
WORKER = TESTS / "model" / "families" / "drawn_worker.py"
TOLERANCE, SEED = 5e-6, 1
# One configuration of each class of models
NAMES = sorted({str(published.read(name)["architectures"]): name for name in reversed(published.NAMES)}.values())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drawn")
    launch(WORKER, directory, SEED, *NAMES)
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_computed_as_the_reference_does_or_refused_by_name(name: str, drawn: Path) -> None:
    found: list[dict[str, Any]] = json.loads((drawn / f"{name}.json").read_text())
    keys = {*published.read(name), *(key for case in found for key in case["changes"])}
    wrong = [
        case
        for case in found
        if not any(key in case.get("refused", "") for key in keys) and not case.get("difference", 1) <= TOLERANCE
    ]
    assert not wrong
    assert sum("difference" in case for case in found) >= len(found) / 4
