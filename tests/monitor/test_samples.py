"""Kept samples: which are chosen, what their files hold and refuse, and what the verb prints of them."""

import gzip
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from monitor.kept import NASTY, conversation, kept

from megatron_bai.cli import samples as verb
from megatron_bai.config import Config, Run, Samples
from megatron_bai.errors import UserError
from megatron_bai.monitor.samples import store
from megatron_bai.monitor.samples.choose import ORDERS, Candidate, choose
from megatron_bai.monitor.samples.kept_sample import KeptSample
from megatron_bai.monitor.samples.printable import make_printable
from megatron_bai.monitor.samples.show import format_sample, select
from megatron_bai.monitor.samples.token_texts import token_lengths


def candidates(number: int) -> list[Candidate]:
    draw = random.Random(5)
    return [
        Candidate(
            i // 4,
            i % 4,
            draw.choice([None, 0.0, 1.0]),
            draw.randrange(20),
            draw.choice([None, 0.0, draw.random()]),
        )
        for i in range(number)
    ]


def test_the_choice_has_every_order_and_depends_on_no_order_of_the_samples() -> None:
    all_ = candidates(64)
    chosen = choose(all_, 7, "0/train/3")
    by_key = {candidate.key: candidate for candidate in all_}
    assert len(chosen) == 7 and {name for names in chosen.values() for name in names} == set(ORDERS)
    first = {name: by_key[next(key for key, names in chosen.items() if name in names)] for name in ORDERS}
    assert first["best"].reward == 1 and first["worst"].reward == 0
    assert first["longest"].length == max(c.length for c in all_)
    assert first["discrepancy"].discrepancy == max(c.discrepancy or 0 for c in all_)
    for seed in range(5):
        shuffled = list(all_)
        random.Random(seed).shuffle(shuffled)
        assert list(choose(shuffled, 7, "0/train/3").items()) == list(chosen.items())
    assert choose(all_, 7, "0/train/4") != chosen  # ties: other prompts have their turn


@pytest.mark.parametrize("count", [0, 1, 3, 64, 1000])
def test_no_more_are_chosen_than_there_are_and_none_twice(count: int) -> None:
    assert len(choose(candidates(64), count, "")) == min(count, 64)
    assert choose([], count, "") == {}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_a_file_holds_any_text_and_any_json_reader_reads_it(tmp_path: Path, text: str) -> None:
    sample = kept(4, text, prompt=text, answer=text, failure=text, reward=None)
    store.write_step(tmp_path, 4, [sample, kept(4)], 1 << 20)
    assert store.read_step(tmp_path, 4) == [sample, kept(4)]
    lines = gzip.open(store.step_path(tmp_path, 4), "rt", encoding="ascii").readlines()
    assert len(lines) == 2 and json.loads(lines[0])["response"] == text


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_what_is_printed_moves_no_cursor_and_no_line(text: str) -> None:
    printed = format_sample(kept(response=text, prompt=text))
    printed.encode("utf-8")
    assert all(c.isprintable() or c in "\n\t\u200d" for c in printed)
    assert not set(printed) & set("\u202e\u2066\u2028\x1b")


def test_pairs_of_surrogates_are_the_character_they_stand_for() -> None:
    assert make_printable("\ud83d\ude00 \ud83d.") == "😀 \\ud83d."


def test_a_step_that_is_done_again_replaces_its_file_and_later_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        store.write_step(tmp_path, step, [kept(step)], 1 << 20)
    store.remove_after(tmp_path, 2)
    assert store.list_steps(tmp_path) == [1, 2]
    store.write_step(tmp_path, 3, [kept(3, "other")], 1 << 20)
    store.write_step(tmp_path, 3, [kept(3, "again")], 1 << 20)
    assert store.list_steps(tmp_path) == [1, 2, 3] and store.read_step(tmp_path, 3)[0].response == "again"
    assert [path.name for path in (tmp_path / "samples").iterdir() if path.name[0] == "."] == []


def test_beyond_the_bound_the_first_and_last_stay_and_the_others_lie_evenly(tmp_path: Path) -> None:
    store.write_step(tmp_path, 1, [kept(1)], 1 << 20)
    size = store.step_path(tmp_path, 1).stat().st_size
    for step in range(2, 101):
        store.write_step(tmp_path, step, [kept(step)], 10 * (size + 2))
        files = [path.stat().st_size for path in (tmp_path / "samples").iterdir()]
        assert sum(files) <= 10 * (size + 2)
    steps = store.list_steps(tmp_path)
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert steps[0] == 1 and steps[-1] == 100 and len(steps) >= 9 and max(gaps) <= 4 * min(gaps[:-1])


def test_a_file_above_the_bound_stays_while_it_is_the_newest(tmp_path: Path) -> None:
    for step in (1, 2):
        store.write_step(tmp_path, step, [kept(step)], 1)
    assert store.list_steps(tmp_path) == [2]


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def _line(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(kept().to_json())
        path.write_bytes(gzip.compress(json.dumps(change(content) or content).encode()))

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "torn": _torn,
    "flipped": _flipped,
    "empty": lambda path: path.write_bytes(b"") and None,
    "not gzip": lambda path: path.write_text("no gzip") and None,
    "not JSON": lambda path: path.write_bytes(gzip.compress(b"\xff\xfe{")) and None,
    "nested": lambda path: path.write_bytes(gzip.compress(b"[" * 100_000)) and None,
    "a directory": lambda path: (path.unlink(), path.mkdir()) and None,
    "a list": _line(lambda content: [content]),
    "without a key": _line(lambda content: content.pop("tokens") and None),
    "another step": _line(lambda content: content.update(step=2)),
    "text for a number": _line(lambda content: content.update(reward="1")),
    "no float": _line(lambda content: content.update(reward=10**400)),
    "lengths": _line(lambda content: content.update(token_lengths=[1])),
    "text lengths": _line(lambda content: content.update(response="x")),
    "no pairs": _line(lambda content: content.update(routes_differ=[1])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_torn_or_foreign_file_is_one_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store.write_step(tmp_path, 1, [kept()], 1 << 20)
    damage(store.step_path(tmp_path, 1))
    if store.step_path(tmp_path, 1).is_file() and store.step_path(tmp_path, 1).stat().st_size == 0:
        assert store.read_step(tmp_path, 1) == []  # as zcat has it
        return
    with pytest.raises(UserError, match=r"step-00001\.jsonl\.gz"):
        store.read_step(tmp_path, 1)


def test_keys_of_a_later_release_are_left_out() -> None:
    assert KeptSample.from_json(json.dumps({**json.loads(kept().to_json()), "new": 1})) == kept()


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="samples"):
        store.write_step(tmp_path, 1, [kept()], 1 << 20)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_step(tmp_path, 1, [kept()], 1 << 20)
    temporary = tmp_path / "samples" / f".step-00001.jsonl.gz.{os.getpid()}"
    temporary.symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        store.write_step(tmp_path, 1, [kept(response="new")], 1 << 20)
    assert store.read_step(tmp_path, 1) == [kept()]


def utf8(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["abc", "ä€😀x", "שלום", "a\n", ""])
def test_each_token_has_the_characters_it_adds(text: str) -> None:
    ids = list(text.encode())
    assert token_lengths(ids, utf8) == (text, [n for c in text for n in [0] * (len(c.encode()) - 1) + [1]])


@pytest.mark.parametrize("ids", [[0xFF], [0xF0, 0x9F], [65, 0xF0, 0x9F, 66, 0xFF, 0xFF], [0x80] * 50])
def test_bytes_that_are_no_text_add_up_all_the_same(ids: list[int]) -> None:
    text, lengths = token_lengths(ids, utf8)
    assert text == utf8(ids) and sum(lengths) == len(text) and len(lengths) == len(ids) and min(lengths) >= 0


def test_what_a_token_adds_may_depend_on_those_before_it() -> None:
    """As with tokenizers that mark the start of a word, and drop the space before the first."""
    words = ["▁Hi", "▁there", "!", "▁you"]
    decode: Callable[[list[int]], str] = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    assert token_lengths([0, 1, 2, 3], decode) == ("Hi there! you", [2, 6, 1, 4])


def test_numbers_of_tokens() -> None:
    sample = kept(response="ab", routes_differ=[[0, 1], [1, 3]], logprobs_training=[-1.5, None])
    assert sample.token_discrepancies == [1.0, None] and sample.token_texts == ["a", "b"]
    assert sample.token_routes == [3, 0]  # position 1, the prompt's last token, predicted the first
    assert replace(sample, logprobs_training=[]).token_discrepancies == [None, None]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (1, 2, 3, 7):
        steps = [
            kept(step, "good"), kept(step, "longer", reward=0.0, discrepancy=0.5, prompt_index=9, prompt="<user>1"),
            kept(step, "none", reward=None, failure="it broke", split="eval", discrepancy=None, routes_differ=None),
        ]  # fmt: skip
        store.write_step(tmp_path, step, steps, 1 << 20)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "responses"),
    [
        ({}, ["good", "longer", "none"]),
        ({"sort": "worst", "count": 1}, ["longer"]),
        ({"sort": "longest"}, ["longer", "good", "none"]),
        ({"sort": "discrepancy"}, ["longer", "good", "none"]),
        ({"sort": "mismatch"}, ["good", "longer", "none"]),
        ({"prompt": "9"}, ["longer"]),
        ({"prompt": "<user>7"}, ["good", "none"]),
        ({"split": "eval"}, ["none"]),
        ({"step": 3, "count": 0}, ["good", "longer", "none"]),
    ],
)
def test_the_verb_prints_what_is_asked_for(
    run_dir: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], responses: list[str]
) -> None:
    verb.run(Config(run=Run(dir=str(run_dir)), samples=Samples(format="json", **changes)))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sample["response"] for sample in found] == responses
    assert {sample["step"] for sample in found} == {changes.get("step", 7)}
    verb.run(Config(samples=Samples(run=str(run_dir), **changes)))
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line in responses] == responses
    assert ("no reward (it broke)" in text) == ("none" in responses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "nowhere"}, "samples.run=nowhere does not exist"),
        ({"step": 5}, "no samples of step 5: choose one of 1 to 3, 7"),
        ({"sort": "up"}, "best, worst, longest, discrepancy or mismatch"),
        ({"format": "xml"}, "text or json"),
        ({"split": "test"}, "train or eval"),
        ({"prompt": "nobody asked"}, "train 3, train 9, eval 3"),
        ({"count": -1}, "samples.count"),
    ],
)
def test_the_verb_refuses_by_name_with_what_there_is(run_dir: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        verb.run(Config(samples=Samples(**{"run": str(run_dir), **changes})))


def test_a_run_of_an_older_head_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no samples: .*monitor\.samples=0"):
        verb.run(Config(samples=Samples(run=str(tmp_path))))


def test_sorting_is_stable_and_bounded() -> None:
    both = [kept(response="a"), kept(response="b")]
    assert select(both, "best") == both and select(both, "best", 1) == both[:1]


def test_long_texts_lose_their_middle() -> None:
    text = format_sample(kept(response="a" * 50 + "b" * 50), 20)
    assert "a" * 10 + "\n[… 80 characters …]\n" + "b" * 10 in text and "a" * 11 not in text


def test_turns_and_replies_of_a_conversation_are_apart() -> None:
    sample = conversation()
    assert KeptSample.from_json(sample.to_json()) == sample
    assert sample.from_environment == [False] * 2 + [True] * 4 + [False] * 3
    assert [value is None for value in sample.token_discrepancies] == sample.from_environment
    text = format_sample(sample)
    parts = ["[turn 1]\nc;", "[reply 1, reward 0.25]\n<15>", "[turn 2]\n15;", "[reply 2]\nuser: well done"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert "9 tokens in 2 turns" in text and "[response]" not in text
    for wrong in ({"start": 0}, {"start": 0, "end": 1, "messages": "no"}, 3):
        with pytest.raises(ValueError, match="turns"):
            KeptSample.from_json(json.dumps(json.loads(sample.to_json()) | {"turns": [wrong]}))
