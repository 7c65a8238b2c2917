"""Two ranks with unequal shares of a mini-batch make the step that one process makes of all of it."""

import numpy as np
import pytest
import torch
from denominators_worker import RANKS, problem
from policies import SETTINGS, loss, name
from processes import TESTS, launch

from megatron_bai import config

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    file = tmp_path_factory.mktemp("ranks") / "found.pt"
    launch(TESTS / "rl" / "denominators_worker.py", file)
    return {name(settings): each for settings, each in zip(SETTINGS, torch.load(file), strict=True)}


@pytest.mark.parametrize("settings", SETTINGS, ids=name)
def test_the_step_of_two_ranks_is_that_of_one(settings: config.Objective, found: dict[str, dict]) -> None:
    value, gradient, _ = loss(settings, problem())
    each = found[name(settings)]
    assert each["loss"] == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(each["gradient"].numpy(), gradient, rtol=1e-9, atol=1e-15)


def test_the_shares_are_unequal_in_samples_tokens_and_prompts() -> None:
    case = problem()
    counts = [(case.mask[own].sum(), len(case.mask[own]), len(set(case.prompt_index[own].tolist()))) for own in RANKS]
    assert all(first != second and first and second for first, second in zip(*counts, strict=True))
