"""A token without a route is counted and treated as the policy says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.errors import UserError
from megatron_bai.routing.missing import MissingCounts, apply_missing_policy, last_version_rows

ROUTED = torch.tensor([[True, False, True, False, False], [True, True, True, True, False]])
MISSING = torch.tensor([[False, True, False, False, False], [False, False, False, False, False]])
MASK = torch.tensor([[False, True, True, False, False], [False, False, True, True, False]])


def test_strict_stops_and_says_what_to_do() -> None:
    with pytest.raises(UserError) as error:
        apply_missing_policy("strict", MASK, ROUTED, MISSING)
    assert str(error.value).startswith("1 of 7 tokens of the rollouts have no route")
    assert "replay.missing=mask" in str(error.value) and "replay.missing=live" in str(error.value)


def test_mask_drops_the_token_that_the_row_predicts() -> None:
    kept, found = apply_missing_policy("mask", MASK, ROUTED, MISSING)
    assert found == MissingCounts(num_missing=1, num_fed=7, num_masked=1, num_loss_tokens=4)
    assert torch.equal(kept, MASK & ~MISSING) and int(kept.sum()) == 3


def test_live_keeps_it_and_counts_it() -> None:
    kept, found = apply_missing_policy("live", MASK, ROUTED, MISSING)
    assert found == MissingCounts(num_missing=1, num_fed=7, num_masked=0, num_loss_tokens=4) and torch.equal(kept, MASK)


@pytest.mark.parametrize("policy", ["strict", "mask", "live"])
def test_a_whole_batch_is_left_alone(policy: str) -> None:
    kept, found = apply_missing_policy(policy, MASK, ROUTED, torch.zeros_like(MISSING))
    assert torch.equal(kept, MASK) and found == MissingCounts(0, 6, 0, 4)


def test_another_policy_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="replay.missing is 'drop': choose strict, mask or live"):
        apply_missing_policy("drop", MASK, ROUTED, MISSING)


@given(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_after_a_change_of_weights_only_rows_of_the_last_span_are_believed(prompt: int, spans: list[int]) -> None:
    starts = np.cumsum([0, *spans[:-1]]).tolist()
    rows = prompt + sum(spans) - 1
    believed = last_version_rows(rows, prompt, starts)
    for row in range(rows):
        predicted = row + 1 - prompt  # response token, negative in the prompt
        assert believed[row] == (len(spans) == 1 or predicted >= starts[-1])
    assert int(believed.sum()) == (rows if len(spans) == 1 else spans[-1])
