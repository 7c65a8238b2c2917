"""`inspect` on stores: loads and overlaps are those counted one by one."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from routing.recordings import SMALL, recording

from megatron_bai.cli import inspect_verb as verb
from megatron_bai.config import Config, Inspect
from megatron_bai.errors import UserError
from megatron_bai.routing.routes import RouteSignature
from megatron_bai.routing.store.codec import SampleRoutes, encode
from megatron_bai.routing.store.route_store import RouteStore, StoreWriter
from megatron_bai.routing.store.store_stats import compare_stores, compute_stats, load_entropy

Kept = dict[tuple[int, int], SampleRoutes]


def write(directory: Path, kept: Kept, encoding: str = "compact") -> Path:
    with StoreWriter(directory, "a") as writer:
        for (step, sample), one in kept.items():
            writer.append(step, sample, "r3", encode(one, encoding))
    return directory


def recordings(**changes) -> Kept:
    return {(i // 4, i % 4): recording(20 + i, seed=i, **changes) for i in range(8)}


def test_loads_are_counted_over_rows_with_a_route(tmp_path: Path) -> None:
    kept = recordings(valid=0.7)
    with RouteStore(write(tmp_path, kept)) as store:
        found = compute_stats(store)
    counted = Counter(
        (layer, expert)
        for one in kept.values()
        for row, valid in zip(one.ids.tolist(), one.valid)
        if valid
        for layer, experts in enumerate(row)
        for expert in experts
    )
    assert {(layer, e): n for layer, load in enumerate(found.load.tolist()) for e, n in enumerate(load) if n} == counted
    assert found.records == 8 and found.rows == sum(len(one.ids) for one in kept.values())
    assert found.valid == sum(int(one.valid.sum()) for one in kept.values()) < found.rows
    assert sum(found.versions.values()) == found.rows and found.encoded > found.bound > 0


def test_entropy_is_that_of_shares() -> None:
    load = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    assert load_entropy(load)[:3].tolist() == pytest.approx([1, 0, 0.5]) and np.isnan(load_entropy(load)[3])


def test_overlaps_are_those_of_the_sets_row_by_row(tmp_path: Path) -> None:
    kept = recordings(valid=0.8)
    other = {key: recording(len(one.ids) - key[1], seed=90 + key[1], valid=0.9) for key, one in kept.items()}
    other = {key: replace(one, token_hash=kept[key].token_hash) for key, one in other.items()}
    for key in ((0, 1), (1, 1)):  # partly the same
        half = min(len(kept[key].ids), len(other[key].ids)) // 2
        other[key].ids[:half], other[key].valid[:half] = kept[key].ids[:half, :, ::-1], kept[key].valid[:half]
    with RouteStore(write(tmp_path / "a", kept)) as a, RouteStore(write(tmp_path / "b", other, "plain")) as b:
        found = compare_stores(a, b)
    for layer in range(SMALL.moe_layers):
        pairs = [
            (set(x[layer].tolist()), set(y[layer].tolist()))
            for key in kept
            for x, y, vx, vy in zip(kept[key].ids, other[key].ids, kept[key].valid, other[key].valid)
            if vx and vy
        ]
        assert found.rows[layer] == len(pairs) > 0
        assert found.equal[layer] == sum(x == y for x, y in pairs)
        assert found.common[layer] == sum(len(x & y) for x, y in pairs)
    assert found.matched == 8 and not found.other_tokens and found.only == (0, 0)


def test_samples_of_other_tokens_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept = recordings()
    other = dict(kept)
    other[0, 3] = replace(kept[0, 3], token_hash=bytes(16))
    del other[1, 0]
    other[7, 7] = kept[0, 0]
    a, b = write(tmp_path / "a", kept), write(tmp_path / "b", other)
    verb.run(Config(inspect=Inspect(path=str(a), other=str(b))))
    text = " ".join(capsys.readouterr().out.split())
    assert f"6 samples in both; only in {a}: 1, only in {b}: 1" in text
    assert "1 samples are of other tokens and not compared: step 0 sample 3" in text
    assert text.count("100.00% │ 100.00%") == SMALL.moe_layers + 1


def test_what_a_store_holds_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = write(tmp_path / "a", recordings(valid=0.5))
    verb.run(Config(inspect=Inspect(path=str(store))))
    text = " ".join(capsys.readouterr().out.split())
    assert "8 samples of 2 steps (0 to 1), r3; 3 MoE layers, 2 of 8 experts" in text
    assert "weight versions (rows): step-1 (" in text and "schritt-2·β (" in text
    assert "bytes a row with a route: " in text and "of it)" in text and "int32 takes 24" in text
    assert "not read" not in text


def test_an_unused_expert_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = recording(50)
    one.ids[:, 1] = [[6, 2]] * 50
    one.ids[0, 1] = [6, 4]
    verb.run(Config(inspect=Inspect(path=str(write(tmp_path, {(0, 0): one})))))
    text = capsys.readouterr().out
    assert "\n    1 ··█·▁·█·\n" in text
    (row,) = [line.split("│") for line in text.splitlines() if line.startswith("│ 1 ")]
    assert row[5].strip() == "5" and row[6].strip().startswith("6 (50.0%), 2 (49.0%)")


def test_damage_is_named_and_the_rest_is_described(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = write(tmp_path / "a", recordings())
    file = store / "a.routes"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data[:-3])
    verb.run(Config(inspect=Inspect(path=str(store), other=str(store))))
    text = " ".join(capsys.readouterr().out.split())
    assert f"not read: {file}: damage, bytes" in text and "an unfinished record at the end" in text
    assert "6 samples of" in text and "6 samples in both" in text


def test_stores_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    small = write(tmp_path / "a", recordings())
    large = write(tmp_path / "b", recordings(signature=RouteSignature(3, 9, 2)))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    mixed = write(tmp_path / "c", {(0, 0): recording(4), (0, 1): recording(4, RouteSignature(3, 9, 2))})
    empty = write(tmp_path / "d", {})
    for path, other, said in [
        (small, large, "num_experts=8.* of .*num_experts=9"),
        (small, checkpoint, "compare two of one kind"),
        (checkpoint, small, "compare two of one kind"),
        (mixed, "", "step 0 sample 1 .*: two models"),
        (empty, "", "holds no intact recording"),
        ("", "", "inspect.path is empty"),
        (tmp_path / "nowhere", "", "no checkpoint at"),
    ]:
        with pytest.raises(UserError, match=said):
            verb.run(Config(inspect=Inspect(path=str(path), other=str(other))))
    for more in ({"routing": True}, {"parents": ["a"]}, {"prompts": "rows.jsonl"}):
        with pytest.raises(UserError, match="is a store of routes"):
            verb.run(Config(inspect=Inspect(path=str(small), **more)))
