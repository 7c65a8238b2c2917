"""A step of samples packed into rows is the step of the same samples padded, in every layout and mode of replay.

Tolerances as in `test_layouts`, with the largest difference seen in brackets: loss and statistics 3e-6, relative or
absolute [2.1e-6], norm 3e-6 relative [1.9e-7]; log-probabilities and entropy 1e-5 nats [1.4e-6]; every gradient tensor
2e-5 of its largest element [2.8e-6].
"""

from typing import Any

import pytest
import torch
from distributed.test_layouts import relative
from distributed.worker import LENGTH, PACKED, QUICK, SAMPLES, problem
from moe import MODEL
from processes import Layouts
from tiers import tiered

pytestmark = pytest.mark.distributed
MODES = ("none", "r2", "r3")
LENGTHS = [len(sample.tokens) for sample in problem()[0]]
each_mode = pytest.mark.parametrize("mode", MODES)
each_case = pytest.mark.parametrize("case", tiered(PACKED, QUICK))


@pytest.fixture
def one(layouts: Layouts) -> dict[str, Any]:
    """The padded step of one process, which other tests hold to plain torch."""
    return layouts["one"]["packed"]


@each_mode
@each_case
def test_loss_norm_and_statistics_are_those_of_the_padded_step(
    case: str, mode: str, layouts: Layouts, one: dict[str, Any]
) -> None:
    ours, theirs = layouts[case][mode]["first"], one[mode]["first"]
    assert ours == pytest.approx(theirs, rel=3e-6, abs=3e-6) and 0 < theirs["clip_fraction"] < 0.5


@each_mode
@each_case
def test_log_probabilities_and_entropy_are_those_of_the_padded_step(
    case: str, mode: str, layouts: Layouts, one: dict[str, Any]
) -> None:
    for name in ("logprobs", "entropy"):
        ours, theirs = layouts[case][mode]["scores"][name], one[mode]["scores"][name]
        assert ours.shape == theirs.shape == (SAMPLES, LENGTH)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        beyond = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None] - 1
        assert not ours[beyond].any() and ours[~beyond].all()


@each_mode
@each_case
def test_every_gradient_is_that_of_the_padded_step(case: str, mode: str, layouts: Layouts, one: dict[str, Any]) -> None:
    gap, name = relative(layouts[case][mode]["gradient"], one[mode]["gradient"])
    assert gap <= 2e-5, name


@each_case
def test_how_far_routers_moved_is_that_of_the_padded_step(case: str, layouts: Layouts, one: dict[str, Any]) -> None:
    """With the routes that the old pass recorded."""
    ours, theirs = layouts[case]["shifted"], one["shifted"]
    beyond = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None] - 1
    torch.testing.assert_close(ours["shift"][~beyond], theirs["shift"][~beyond], rtol=0, atol=1e-5)
    assert ours["first"] == pytest.approx(theirs["first"], rel=3e-6, abs=3e-6)
    gap, name = relative(ours["gradient"], theirs["gradient"])
    assert gap <= 2e-5, name


@each_case
def test_scores_with_the_rollouts_weights_of_experts_are_those_of_the_padded_step(case: str, layouts: Layouts) -> None:
    ours, theirs = layouts[case]["weighted"], layouts["one"]["weighted"]
    beyond = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None] - 1
    torch.testing.assert_close(ours["logprobs"][~beyond], theirs["logprobs"][~beyond], rtol=0, atol=1e-5)
    assert ours["count"] == theirs["count"] and ours["mean"] == pytest.approx(theirs["mean"], rel=1e-5)


@each_case
def test_every_row_that_should_be_replayed_is_counted_once(case: str, layouts: Layouts) -> None:
    rows = sum(length - 1 for length in LENGTHS) * MODEL.num_layers
    assert [layouts[case][mode]["rows"] for mode in MODES] == [0, rows, 2 * rows]


@pytest.mark.long
def test_rows_are_full_uneven_and_empty(layouts: Layouts) -> None:
    held = {case: layouts[case]["held"] for case in PACKED}
    assert held["one_row128"] == [[8]] and held["one_row24"] == [[1, 2, 1, 2, 2]]  # the first is exactly full
    assert held["dp2_row24"] == [[2, 2, 0], [1, 1, 2]] and held["ep2_row40"] == [[4, 0], [2, 2]]
    assert held["pp2_vpp2_row24"] == [[1, 2, 1, 2, 2, 0]] * 2
    for case, found in held.items():
        assert len({len(micros) for micros in found}) == 1, "as many micro-batches on every rank"
        assert layouts[case]["fed"] == [{(1, PACKED[case].row)}] * PACKED[case].processes
    assert layouts["one"]["packed"]["fed"] == [{(SAMPLES, LENGTH)}]


@pytest.mark.long
def test_what_is_another_samples_changes_no_bit(layouts: Layouts) -> None:
    """With the experts forced. Where the router decides, as many tokens may no longer go to an expert, whose matrices'
    products then round otherwise."""
    found = layouts["one_row128"]["others"]
    assert len(found["r3"]) == SAMPLES and all(each["own"] > 0.1 for mode in found for each in found[mode])
    assert all(each["others"] == 0 for each in found["r3"])
    assert all(each["others"] <= 1e-5 for each in found["none"])


@pytest.mark.parametrize("case", tiered(["one", *PACKED], QUICK))
def test_positions_begin_with_each_sample(case: str, layouts: Layouts) -> None:
    found = layouts[case]["packed"] if case == "one" else layouts[case]
    assert all(found["turned"])


@each_case
def test_scoring_holds_the_logits_of_no_more_than_two_micro_batches(case: str, layouts: Layouts) -> None:
    """Megatron's schedules keep the last output until they have the next."""
    alive = [counts for counts in layouts[case]["logits"] if counts]  # ranks of the last stage
    assert alive and all(max(counts) <= 2 for counts in alive)
    assert all(len(counts) == len(held) for counts, held in zip(alive, layouts[case]["held"]))
