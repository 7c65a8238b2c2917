"""Routes are checked before they are believed, and compared as sets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.routing.layout import assemble
from megatron_bai.routing.replay.replay_pass import sets_differ
from megatron_bai.routing.routes import RouteSignature, check_ids

SMALL = RouteSignature(moe_layers=3, num_experts=8, topk=2)
signatures = st.builds(
    lambda layers, topk, more: RouteSignature(layers, topk + more, topk),
    st.integers(1, 5), st.integers(1, 8), st.integers(0, 300),
)  # fmt: skip


def draw(rows: int, signature: RouteSignature, seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).random((rows, signature.moe_layers, signature.num_experts))
    return scores.argsort(axis=-1)[..., : signature.topk]


@given(signatures, st.integers(0, 6), st.integers(0, 2**31))
def test_true_routes_are_returned_as_they_are_in_the_smallest_dtype(
    signature: RouteSignature, rows: int, seed: int
) -> None:
    ids = draw(rows, signature, seed)
    found = check_ids(ids, signature, "x")
    assert np.array_equal(found, ids)
    assert found.dtype == (np.uint8 if signature.num_experts <= 256 else np.int16)


@given(signatures, st.integers(1, 6), st.integers(0, 2**31), st.data())
def test_one_wrong_id_anywhere_is_found(signature: RouteSignature, rows: int, seed: int, data: st.DataObject) -> None:
    ids = draw(rows, signature, seed)
    place = tuple(data.draw(st.integers(0, size - 1)) for size in ids.shape)
    wrong = [-1, signature.num_experts, 2**20]
    if signature.topk > 1:
        wrong.append(int(ids[(*place[:2], place[2] - 1)]))
    ids[place] = data.draw(st.sampled_from(wrong))
    with pytest.raises(ValueError, match="^rollout 3: "):
        check_ids(ids, signature, "rollout 3")


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2), (4, 3, 3), (4, 3, 2, 1)])
def test_another_shape_is_refused_and_both_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: routes have shape \(4, .*, the model needs \[rows, 3, 2\]"):
        check_ids(np.zeros(shape, dtype=np.int64), SMALL, "x")


@pytest.mark.parametrize(("experts", "dtype"), [(256, np.uint8), (257, np.int16), (32767, np.int16)])
def test_no_id_overflows_its_dtype(experts: int, dtype: type) -> None:
    signature = RouteSignature(1, experts, 1)
    found = check_ids(np.array([[[experts - 1]]]), signature, "x")
    assert found.dtype == dtype and found.item() == experts - 1
    ids, *_ = assemble([found], 2 * experts, signature)
    assert ids.max() == experts - 1 and ids.min() == 0


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_rows_differ_when_their_sets_do_whatever_the_order(topk: int, rows: int, seed: int) -> None:
    signature = RouteSignature(1, topk + 2, topk)
    ours, theirs = (torch.from_numpy(draw(rows, signature, seed + i)[:, 0]) for i in (0, 1))
    wanted = [set(a) != set(b) for a, b in zip(ours.tolist(), theirs.tolist())]
    assert sets_differ(ours, theirs).tolist() == wanted
    shuffled = ours[:, torch.randperm(topk, generator=torch.Generator().manual_seed(seed))]
    assert not sets_differ(ours, shuffled).any()
