"""What determines samples is compared by content: when a run is resumed, and between ranks."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bai import config
from megatron_bai.config import Arithmetic
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.data.vocabulary import validate_vocabulary
from megatron_bai.errors import UserError
from megatron_bai.rl import sample_sources
from megatron_bai.rl.sample_sources import compute_sample_sources, gather_sample_sources, list_changed_sources

ROWS = [{"prompt": f"{i}", "answer": str(i)} for i in range(4)]


def write_rows(path: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "saved":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        file = path.with_suffix(".parquet")
        if kind == "parquet directory":
            path.mkdir(parents=True, exist_ok=True)
            file = path / "0.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        return path if kind == "parquet directory" else file
    return path


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")

    def compute(
        train: Path | None = None, eval: Path | None = None, reward: str = "", template: str = "t", end: int = 1
    ):
        settings = config.Config(
            data=config.Dataset(train=str(train or ""), eval=str(eval or "")),
            reward=config.Function(function=reward) if reward else config.Exact(),
        )
        return compute_sample_sources(settings, tmp_path, template, [end])

    return compute


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "parquet directory", "saved"])
@pytest.mark.parametrize("role", ["train", "eval"])
def test_rows_are_compared_by_content(tmp_path: Path, describe, kind: str, role: str) -> None:
    first = write_rows(tmp_path / "one", kind, ROWS)
    before = describe(**{role: first})
    moved = tmp_path / f"moved{first.suffix}"
    shutil.copytree(first, moved) if first.is_dir() else shutil.copy(first, moved)
    for file in [moved, *moved.rglob("*")] if moved.is_dir() else [moved]:
        os.utime(file, (1, 1))
    if moved.is_dir():
        (moved / ".cache").mkdir()
        (moved / ".cache" / "left.parquet").write_text("by another program")
    assert describe(**{role: moved}) == before
    other = write_rows(tmp_path / "other", kind, [*ROWS[:3], {"prompt": "3", "answer": "4"}])
    assert list_changed_sources(before, describe(**{role: other})) == [f"data.{role}"]


def test_a_reward_is_compared_with_what_it_imports_from_beside_it(tmp_path: Path, describe) -> None:
    package = tmp_path / "mine"
    (package / "inner").mkdir(parents=True)
    sources = {
        "mine/__init__.py": "",
        "mine/score.py": "import json\nimport numpy\nfrom . import rules\nfrom .inner.more import x\nimport beside\n",
        "mine/rules.py": "import mine.score\n",
        "mine/inner/more.py": "x = 1\n",
        "beside.py": "def broken(:\n",
        "unused.py": "1\n",
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    before = describe(reward="mine.score:f")
    assert [file.name for file in sample_sources.module_files("mine.score")] == [
        "beside.py", "__init__.py", "more.py", "rules.py", "score.py"
    ]  # fmt: skip
    (tmp_path / "unused.py").write_text("2\n")
    assert describe(reward="mine.score:f") == before
    for name in list(sources)[:-1]:
        (tmp_path / name).write_text(sources[name] + "# changed\n")
        assert list_changed_sources(before, describe(reward="mine.score:f")) == ["reward.function"], name
        (tmp_path / name).write_text(sources[name])
    assert describe(reward="mine.score:f") == before


def test_tokenizer_and_chat_template_are_compared(tmp_path: Path, describe) -> None:
    before = describe()
    assert list_changed_sources(before, describe(template="another")) == ["the chat template"]
    assert list_changed_sources(before, describe(end=2)) == ["the end token"]
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert list_changed_sources(before, describe()) == ["the tokenizer"]
    assert list_changed_sources({}, before) == []  # what an older release did not note


def test_ranks_that_read_other_content_are_refused() -> None:
    class Ranks:
        def run_on_all(self, function: Callable[[], Any]) -> list[Any]:
            return [("here", {"data.train": "1", "data.eval": "2"}), ("there", {"data.train": "1", "data.eval": "3"})]

    with pytest.raises(UserError, match="rank 1 on there reads other content than rank 0 on here: data.eval: give all"):
        gather_sample_sources(Ranks(), dict)  # type: ignore[arg-type]


@pytest.mark.parametrize("added", ["a plain token", "a special token", "none"])
def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(added: str) -> None:
    tokenizer = build_tokenizer(Arithmetic(), 64)
    size = len(tokenizer)
    validate_vocabulary(tokenizer, size, "here")
    validate_vocabulary(tokenizer, size + 5, "here")  # padded rows
    if added != "none":
        tokenizer.add_tokens(["<more>"], special_tokens=added == "a special token")
        with pytest.raises(UserError, match=f"'<more>' the id {size}, and the model's embedding has {size} rows"):
            validate_vocabulary(tokenizer, size, "here")
    else:
        with pytest.raises(UserError, match=rf"the id {size - 1}, and .* {size - 1} rows \(model.vocab_size\)"):
            validate_vocabulary(tokenizer, size - 1, "here")
