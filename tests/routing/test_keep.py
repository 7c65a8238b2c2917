"""What the trainer keeps in a store is what its routers did in the updates."""

from pathlib import Path

import numpy as np
import pytest
import torch
from moe import MODEL, SIGNATURE
from processes import TESTS, launch
from routing.keep_worker import LAYOUTS, PACKED, STEPS

from megatron_bai.routing.routes import VersionSpan
from megatron_bai.routing.store.codec import token_hash
from megatron_bai.routing.store.route_store import RouteStore

pytestmark = pytest.mark.distributed
SAMPLES, MICRO = 16, 2
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_mode = pytest.mark.parametrize("mode", ["r2", "r3"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keep")
    launch(TESTS / "routing" / "keep_worker.py", path)
    return path


def facts(directory: Path, layout: str, mode: str) -> list[dict]:
    return [torch.load(directory / f"{layout}-{mode}-{rank}.pt") for rank in range(2)]


@each_layout
@each_mode
def test_every_kept_route_is_what_the_router_did(directory: Path, layout: str, mode: str) -> None:
    """Walks over the routing maps of all ranks: row s · B + b of a micro-batch is token s of its sample b."""
    replicas = 2 if layout == "dp2" else 1
    with RouteStore(directory / f"{layout}-{mode}") as store:
        kept = {(entry.step, entry.sample): recording for entry, recording in store.iter_records()}
    assert sorted(kept) == [(step, sample) for step in range(STEPS) for sample in range(SAMPLES)]
    seen = {key: np.zeros((len(r.ids), MODEL.num_layers), dtype=bool) for key, r in kept.items()}
    for rank in facts(directory, layout, mode):
        own = SAMPLES // replicas
        for layer, maps in rank["maps"].items():
            assert len(maps) == STEPS * own // MICRO
            for number, chosen in enumerate(maps):
                step, micro = divmod(number, own // MICRO)
                per_sample = len(chosen) // MICRO  # tokens of a sample on this rank
                first = rank["tensor_rank"] * per_sample
                for row, experts in enumerate(chosen):
                    s, b = divmod(row, MICRO)
                    key = step, rank["dp_rank"] * own + micro * MICRO + b
                    if first + s < len(kept[key].ids):
                        assert experts.nonzero()[:, 0].tolist() == kept[key].ids[first + s, layer].tolist()
                        seen[key][first + s, layer] = True
    assert all(rows.all() for rows in seen.values())


@each_layout
@each_mode
def test_a_recording_says_what_it_belongs_to(directory: Path, layout: str, mode: str) -> None:
    with RouteStore(directory / f"{layout}-{mode}") as store:
        assert store.damage == [] and {entry.source for entry in store.entries} == {mode}
        assert len({entry.file for entry in store.entries}) == (2 if layout == "dp2" else 1)
        kept = {(entry.step, entry.sample): recording for entry, recording in store.iter_records()}
    different = 0
    for rank in facts(directory, layout, mode):
        assert rank["coverage"] == [1.0] * STEPS
        for step, sampled in enumerate(rank["sampled"]):
            for number, (tokens, routes) in enumerate(sampled, start=rank["dp_rank"] * len(sampled)):
                recording = kept[step, number]
                assert recording.signature == SIGNATURE and recording.token_hash == token_hash(tokens.numpy())
                assert recording.valid.all() and len(recording.ids) == len(tokens) - 1
                assert recording.spans == (VersionSpan(str(step), 0, len(tokens) - 1),)
                different += int((recording.ids != np.sort(routes.numpy(), axis=-1)).any(axis=-1).sum())
    assert (different == 0) == (mode == "r3")  # R2's are the router's own, not the rollout's


@each_layout
@each_mode
def test_the_monitor_counts_the_routes_of_all_ranks_once(directory: Path, layout: str, mode: str) -> None:
    """Against the store, which has what the training engine's routers did, and the rollouts, in plain numpy."""
    ranks = facts(directory, layout, mode)
    with RouteStore(directory / f"{layout}-{mode}") as store:
        kept = {(entry.step, entry.sample): recording.ids for entry, recording in store.iter_records()}
    for step in range(STEPS):
        found = ranks[0]["values"][step]
        timed = ("seconds", "tokens_per_second")
        mine, theirs = ({n: v for n, v in r["values"][step].items() if not n.startswith(timed)} for r in ranks)
        assert mine == theirs
        used = np.concatenate([kept[step, sample] for sample in range(SAMPLES)])
        loads = [np.bincount(used[:, layer].ravel(), minlength=MODEL.num_experts) for layer in range(MODEL.num_layers)]
        shares = np.array(loads) / (len(used) * MODEL.moe_topk)
        nats = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1)
        for layer in range(MODEL.num_layers):
            assert found[f"expert_entropy/{layer}"] == pytest.approx(nats[layer], rel=1e-12)
        assert found["experts_effective"] == pytest.approx(np.exp(nats).mean(), rel=1e-12)
        assert found["expert_load_max"] == pytest.approx(shares.max() * MODEL.num_experts, rel=1e-12)
        if mode == "r3":  # nothing is measured without replay: measure_live is off
            assert "route_mismatch" not in found
            continue
        sampled = {}
        for rank in ranks:
            for number, (_, routes) in enumerate(rank["sampled"][step]):
                sampled[rank["dp_rank"] * len(rank["sampled"][step]) + number] = np.sort(routes.numpy(), axis=-1)
        given = np.concatenate([sampled[sample] for sample in range(SAMPLES)])
        differ = (given != used).any(axis=-1)
        assert found["route_mismatch"] == pytest.approx(differ.mean(), rel=1e-12)
        assert found["tokens_route_mismatch"] == pytest.approx(differ.any(axis=1).mean(), rel=1e-12)
        assert 0 < found["tokens_route_mismatch"] <= 1
        for layer in range(MODEL.num_layers):
            assert found[f"route_mismatch/{layer}"] == pytest.approx(differ[:, layer].mean(), rel=1e-12)


@pytest.mark.parametrize(("layout", "mode"), [*((layout, "r2") for layout in LAYOUTS), *PACKED.items()])
def test_samples_to_be_read_say_where_routes_differ(directory: Path, layout: str, mode: str) -> None:
    """Against the rollouts and the store. Each rank sees some tokens or some layers; all of a sample end on rank 0."""
    ranks = facts(directory, layout, mode)
    with RouteStore(directory / f"{layout}-{mode}") as store:
        used = {(entry.step, entry.sample): recording.ids for entry, recording in store.iter_records()}
    assert ranks[1]["read"] == [[]] * STEPS
    differing = 0
    for step, read in enumerate(ranks[0]["read"]):
        assert len(read) == 8
        for sample in read:
            assert sample["step"] == step + 1 and sample["versions"] == [[str(step), 0, sample["length"]]]
            assert None not in sample["logprobs_training"]
            assert (sample["discrepancy"] is None) == (sample["length"] == 0)
            number = (sample["prompt_index"] - 4 * step) * 4 + sample["member"]
            rollouts = [sampled for rank in ranks[:: 1 if "dp2" in layout else 2] for sampled in rank["sampled"][step]]
            tokens, routes = rollouts[number]
            assert sample["tokens"] == tokens.tolist()
            if mode == "r3":  # and nothing is measured without replay
                assert sample["routes_differ"] is None
                continue
            counts = (used[step, number] != np.sort(routes.numpy(), axis=-1)).any(axis=-1).sum(axis=1)
            assert sample["routes_differ"] == [[t, n] for t, n in enumerate(counts.tolist()) if n]
            differing += len(sample["routes_differ"])
    assert (differing > 0) == (mode == "r2")


@pytest.mark.parametrize(("layout", "mode"), PACKED.items())
def test_packing_samples_changes_neither_what_is_kept_nor_the_step(directory: Path, layout: str, mode: str) -> None:
    kept = []
    for name in (layout, layout.removesuffix("_packed")):
        with RouteStore(directory / f"{name}-{mode}") as store:
            kept.append({(entry.step, entry.sample): recording for entry, recording in store.iter_records()})
    packed, padded = kept
    assert packed.keys() == padded.keys() and len(packed) == STEPS * SAMPLES
    for key, recording in packed.items():
        other = padded[key]
        assert np.array_equal(recording.ids, other.ids) and np.array_equal(recording.valid, other.valid), key
        assert (recording.spans, recording.token_hash) == (other.spans, other.token_hash)
    ours, theirs = (facts(directory, name, mode)[0]["values"] for name in (layout, layout.removesuffix("_packed")))
    for step, pair in enumerate(zip(ours, theirs)):
        found, wanted = ({n: v for n, v in values.items() if "second" not in n} for values in pair)
        fed = found.pop("padding_fraction"), wanted.pop("padding_fraction")
        assert 0 < fed[0] and fed[0] != fed[1] and found["route_coverage"] == 1
        assert 0.9 < found["router_shift_mean"] < 1  # half of it is of the first update, before which nothing has moved
        # Adam makes an update as large as the rate from the rounding of a gradient near zero: step 1 is less alike.
        assert found == pytest.approx(wanted, rel=1e-4 if step else 1e-5, abs=1e-4 if step else 1e-5)
