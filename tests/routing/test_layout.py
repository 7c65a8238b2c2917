"""Tokens, masks and routes are cut by one function, to exactly what a rank's routers see."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing.test_routes import draw, signatures

from megatron_bai.routing.layout import Packing, Place, assemble, filler_routes, stage_layers
from megatron_bai.routing.routes import RouteSignature, check_ids


@given(
    signatures, st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 2**31), st.data()
)
def test_stacked_routes_are_the_samples_and_everything_else_is_distinct_and_not_counted(
    signature: RouteSignature, rows: list[int], spare: int, seed: int, data: st.DataObject
) -> None:
    length = max(rows) + spare
    columns = sorted(data.draw(st.sets(st.integers(0, signature.moe_layers - 1), min_size=1)))
    routes = [draw(n, signature, seed + i)[:, columns].astype(signature.dtype) for i, n in enumerate(rows)]
    recorded = [data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)) for n in rows]
    known = [None if flags is None else np.array(flags, dtype=bool) for flags in recorded]
    ids, routed, missing = assemble(routes, length, signature, known, columns)
    assert ids.shape == (len(rows), length, len(columns), signature.topk) and ids.dtype == signature.dtype
    for i, n in enumerate(rows):
        there = np.ones(n, dtype=bool) if known[i] is None else known[i]
        assert np.array_equal(ids[i, :n][there], routes[i][there])
        assert routed[i].tolist() == there.tolist() + [False] * (length - n)
        assert missing[i].tolist() == (~there).tolist() + [False] * (length - n)
    part = RouteSignature(len(columns), signature.num_experts, signature.topk)
    check_ids(ids.reshape(-1, *ids.shape[2:]), part, "fillers are routes too")
    everywhere = filler_routes(len(rows) * length, signature).reshape(*ids.shape[:2], -1, signature.topk)
    assert np.array_equal(ids[~routed], everywhere[~routed][:, columns])  # the same, whoever holds the layer


@pytest.mark.parametrize("topk", [1, 2, 3, 8])
def test_fillers_are_spread_over_all_experts_and_differ_between_layers(topk: int) -> None:
    signature = RouteSignature(4, 8, topk)
    ids, routed, missing = assemble([np.zeros((0, 4, topk), dtype=np.uint8)] * 4, 16, signature)
    assert not routed.any() and not missing.any()
    used = np.bincount(ids.reshape(-1), minlength=8)
    assert used.max() - used.min() <= topk
    for layer in range(4):  # and in each layer by itself, though 4 layers × topk is a multiple of 8 experts
        used = np.bincount(ids[:, :, layer].reshape(-1), minlength=8)
        assert used.max() - used.min() <= topk
    first = ids[0, 0, :, 0]
    assert topk == 8 or len(set(first.tolist())) > 1


places = st.tuples(st.integers(1, 4), st.integers(1, 4))  # context- and sequence-parallel ranks


@given(places, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_ranks_rows_are_its_tokens_of_all_samples_token_by_token(
    ranks: tuple[int, int], samples: int, times: int, width: int
) -> None:
    """Against the definition, one token at a time."""
    contexts, tensors = ranks
    length = times * Place((0, contexts), (0, tensors)).multiple
    values = torch.arange(samples * length * width).reshape(samples, length, width)
    seen = []
    for context in range(contexts):
        size = length // (2 * contexts)
        both = (context, 2 * contexts - 1 - context)
        held = [t for t in range(length) if t // size in both] if contexts > 1 else list(range(length))
        for tensor in range(tensors):
            place = Place((context, contexts), (tensor, tensors))
            own = held[tensor * len(held) // tensors : (tensor + 1) * len(held) // tensors]
            wanted = [values[b, t].tolist() for t in own for b in range(samples)]
            assert place.rows(values).tolist() == wanted
            assert place.rows(values[..., 0]).tolist() == [row[0] for row in wanted]  # masks and routes alike
            assert place.inputs(values).tolist() == values[:, held].tolist()
            seen += wanted
    assert sorted(seen) == sorted(values.flatten(0, 1).tolist())  # together the ranks hold each token once


@given(places, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_packed_sequences_are_cut_one_by_one(ranks: tuple[int, int], lengths: list[int], seed: int) -> None:
    contexts, tensors = ranks
    multiple = Place((0, contexts), (0, tensors)).multiple
    packing = Packing.of(lengths, multiple)
    values = torch.arange(len(lengths) * max(packing.padded)).reshape(len(lengths), -1)
    packed = packing.pack(values)
    starts = packing.cu_seqlens_padded.tolist()
    assert packing.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist() and starts[-1] == packed.shape[1]
    for row, start, length, padded in zip(values, starts, lengths, packing.padded):
        assert packed[0, start : start + length].tolist() == row[:length].tolist()
        assert padded % multiple == 0 and 0 <= padded - length < multiple
    for context in range(contexts):
        whole = Place((context, contexts), (0, 1))
        alone = [whole.inputs(row[None, :padded]) for row, padded in zip(values, packing.padded)]
        assert torch.equal(whole.inputs(packed, packing.padded), torch.cat(alone, dim=1))
        parts = [Place((context, contexts), (rank, tensors)).rows(packed, packing.padded) for rank in range(tensors)]
        assert torch.equal(torch.cat(parts), torch.cat(alone, dim=1)[0])


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 5), st.integers(0, 4))
def test_a_packed_row_is_filled_up_and_taken_apart_again(lengths: list[int], multiple: int, spare: int) -> None:
    """Against the definition, one token at a time."""
    packing = Packing.of(lengths, multiple)
    row = sum(packing.padded) + spare + (not lengths)
    packing = Packing.of(lengths, multiple, row)
    longest = max(packing.padded, default=3) + 1
    values = torch.arange(1.0, len(lengths) * longest * 2 + 1).view(-1, longest, 2).requires_grad_()
    tail = -torch.arange(1.0, packing.tail * 2 + 1).view(-1, 2)
    packed = packing.pack(values, tail)
    assert packed.shape == (1, row, 2) and torch.equal(packed[0, row - packing.tail :], tail)
    assert packing.pack(values > 0).dtype is torch.bool and not packing.pack(values > 0)[0, row - packing.tail :].any()
    back = packing.unpack(packed, longest)
    assert back.shape == values.shape
    for sequence, length in enumerate(lengths):
        assert torch.equal(back[sequence, :length], values[sequence, :length]) and not back[sequence, length:].any()
    if lengths:
        back.sum().backward()
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]
        assert torch.equal(values.grad, real[..., None].expand_as(values).float())  # none reaches padding
    assert torch.equal(packing.unpack(packed > 0, longest), back > 0)

    of = [(number, place) for number, part in enumerate(packing.parts) for place in range(part)]
    assert packing.positions.tolist() == [place for _, place in of]


def test_sequences_that_do_not_fit_into_a_row_are_refused() -> None:
    with pytest.raises(AssertionError, match="sequences of 8 tokens in a row of 7"):
        Packing.of([3, 5], 1, row=7)
    with pytest.raises(AssertionError, match="longer than the 4 tokens given"):
        Packing.of([3, 5], 1).pack(torch.zeros(2, 4))


def test_the_zigzag_of_two_ranks() -> None:
    tokens = torch.arange(8)[None]
    assert Place(context=(0, 2)).inputs(tokens).tolist() == [[0, 1, 6, 7]]
    assert Place(context=(1, 2)).inputs(tokens).tolist() == [[2, 3, 4, 5]]
    assert Place(context=(1, 2)).inputs(tokens, [4, 4]).tolist() == [[1, 2, 5, 6]]
    assert Place((1, 2), (1, 2)).rows(tokens).tolist() == [4, 5]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (Place(tensor=(0, 2)), "length 5 is not a multiple of 2 ranks"),
        (Place(context=(0, 2)), "length 5 is not a multiple of 2 × 2 context-parallel ranks"),
    ],
)
def test_a_length_that_does_not_divide_is_refused(place: Place, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        place.rows(torch.zeros(1, 5))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_stages_and_chunks_share_all_layers_in_order(stages: int, chunks: int, size: int) -> None:
    layers = stages * chunks * size
    held = [stage_layers(layers, stage, stages, chunks) for stage in range(stages)]
    assert sorted(sum(held, [])) == list(range(layers))
    in_turn = [held[stage][chunk * size : (chunk + 1) * size] for chunk in range(chunks) for stage in range(stages)]
    assert sum(in_turn, []) == list(range(layers))  # a token meets chunk 0 of every stage, then chunk 1, …


def test_layers_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match="6 layers do not divide into 2 × 2 chunks"):
        stage_layers(6, 0, 2, 2)
