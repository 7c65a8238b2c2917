"""Samples in a file are those that were written, and a damaged file is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe import SIGNATURE, samples

from megatron_bai.errors import UserError
from megatron_bai.rollout import sample_file
from megatron_bai.rollout.kept_ids import NO_ID
from megatron_bai.rollout.sample import PARTIAL, TURN, Sample, lost_sample
from megatron_bai.rollout.turns import Turn
from megatron_bai.routing.routes import VersionSpan


@pytest.fixture
def made() -> list[tuple[int, Sample]]:
    """One empty response, one partial, one failed, one whose routes are not all known, one lost, one conversation."""
    found = samples(8, np.random.default_rng(3))
    spans = (VersionSpan("4", 0, 1), VersionSpan("5", 1, len(found[2].response)))
    found[2] = replace(found[2], spans=spans, finish=PARTIAL)
    found[3] = replace(found[3], failure="it took longer")
    found[4] = replace(found[4], reward=0.1, route_mask=np.arange(len(found[4].routes)) > 2)
    found[5] = lost_sample(0, [5, 6, 7], SIGNATURE, "no server")
    found[2] = replace(found[2], route_weights=np.random.default_rng(0).random(found[2].routes.shape, np.float32))
    for i in (2, 4):  # some tokens were drawn from fewer ids, as many as the token before them has
        ids = np.tile(np.arange(i, dtype=np.int32), (len(found[i].response), 1))
        ids[1::2, 1:] = NO_ID
        found[i] = replace(found[i], kept_ids=ids)
    length = len(found[7].response)
    assert length > 4, "the test's premise"
    turns = (
        Turn(0, 2, messages=({"role": "tool", "content": "é"},), num_reply_tokens=1, reward=0.5, state={"a": [1]}),
        Turn(3, length, ended=False),
    )
    mask = np.arange(length) != 2
    found[7] = replace(found[7], sampled_mask=mask, turns=turns, finish=TURN, turn_weight=0.5)
    return [(100 + i // 2, sample) for i, sample in enumerate(found)]


def test_what_was_written_is_read(made: list[tuple[int, Sample]], tmp_path: Path) -> None:
    sample_file.write_samples(tmp_path / "a.npz", made, SIGNATURE)
    for (number, wrote), (found, read) in zip(
        made, sample_file.read_samples(tmp_path / "a.npz", SIGNATURE), strict=True
    ):
        assert found == number
        for name, value in vars(wrote).items():
            if isinstance(value, np.ndarray):
                assert getattr(read, name).dtype == value.dtype
                np.testing.assert_array_equal(getattr(read, name), value)
            else:
                assert getattr(read, name) == (0 if name == "prompt_index" else value), name


def test_no_samples_are_none(tmp_path: Path) -> None:
    sample_file.write_samples(tmp_path / "a.npz", [], SIGNATURE)
    assert sample_file.read_samples(tmp_path / "a.npz", SIGNATURE) == []


def test_a_file_of_a_head_without_conversations_is_read(made: list[tuple[int, Sample]], tmp_path: Path) -> None:
    sample_file.write_samples(tmp_path / "a.npz", made[:6], SIGNATURE)
    arrays = dict(np.load(tmp_path / "a.npz"))
    for name in ("sampled", "kept_counts", "kept_ids"):
        del arrays[name]
    about = json.loads(arrays["about"].tobytes())
    for entry in about:
        del entry["turns"], entry["turn_weight"], entry["truncated"]
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    np.savez(tmp_path / "old.npz", **arrays)
    for (_, wrote), (_, read) in zip(made, sample_file.read_samples(tmp_path / "old.npz", SIGNATURE), strict=False):
        assert read.sampled_mask is None and read.turns == () and read.finish == wrote.finish
        np.testing.assert_array_equal(read.logprobs, wrote.logprobs)


@pytest.mark.parametrize("name", ["about", "tokens", "logprobs", "routes", "recorded", "route_weights", "kept_ids"])
def test_what_is_not_whole_is_refused(name: str, made: list[tuple[int, Sample]], tmp_path: Path) -> None:
    sample_file.write_samples(tmp_path / "a.npz", made, SIGNATURE)
    arrays = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "short.npz", **(arrays | {name: arrays[name][:-1]}))
    del arrays[name]
    np.savez(tmp_path / "without.npz", **arrays)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    np.savez(tmp_path / "object.npz", **(arrays | {name: np.array([{}, {}], dtype=object)}))
    for damaged in ("short", "without", "cut", "object", "gone"):
        with pytest.raises(UserError, match=f"{damaged}.npz"):
            sample_file.read_samples(tmp_path / f"{damaged}.npz", SIGNATURE)
