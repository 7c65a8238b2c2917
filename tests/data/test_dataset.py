"""Rows on local disk: read, refused by name, ordered, rendered, rewarded and learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_bai.config import Arithmetic, Dataset
from megatron_bai.data import task_factory
from megatron_bai.data.dataset_task import DatasetTask
from megatron_bai.data.shuffle import permute_index, shuffled_index
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ';' }}{% elif m.role == 'user' %}"
    "{{ '<user>' + m.content }}{% else %}{{ '<assistant>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ 'answer:' if hint is defined else '' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = build_tokenizer(Arithmetic(), 64)
    found.chat_template = TEMPLATE
    return found


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1", "answer": i + 1, "response": f"answer:{i + 1}", "level": i % 3} for i in range(count)]


@pytest.fixture
def write(tmp_path: Path):
    """Writes rows, or lines, to a file; gives its path."""

    def to(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return str(path)

    return to


@pytest.fixture
def task(write, tokenizer):
    """Makes a task of rows with the given settings."""

    def make(rows: list[Any], max_tokens: int = 64, supervised: bool = False, log=lambda line: None, **settings: Any):
        return DatasetTask(Dataset(train=write(rows), **settings), tokenizer, max_tokens, supervised, log)

    return make


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000])
def test_an_order_is_a_permutation_that_its_key_decides(size: int) -> None:
    order = [permute_index(i, size, "a") for i in range(size)]
    assert sorted(order) == list(range(size))
    if size > 60:
        other = [permute_index(i, size, "b") for i in range(size)]
        assert other != order != list(range(size))
        assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.4 > abs(np.corrcoef(order, other)[0, 1])
    assert sorted(shuffled_index(i, size, "a") for i in range(5 * size, 6 * size)) == list(range(size))


def test_an_order_is_the_same_for_ever() -> None:
    """A run that is resumed with another release of anything must meet the same prompts."""
    assert [permute_index(i, 10, "train/0/0") for i in range(10)] == [0, 7, 4, 8, 5, 6, 9, 1, 3, 2]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(task) -> None:
    rows = task(sums(60), hold_out=0.2, eval_prompts=0)
    size = 60 - rows.eval_size
    epochs = [[p.text for p in rows.prompts("train", 0, start, size)] for start in (0, size)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1] and len(set(epochs[0])) == size
    assert [p.text for p in rows.prompts("train", 1, 0, size)] not in epochs
    assert not {p.text for p in rows.prompts("eval", 0, 0, rows.eval_size)} & set(epochs[0])
    assert 4 <= rows.eval_size <= 24


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_stream_does_not_depend_on_the_number_of_ranks(task, replicas: int) -> None:
    whole = task(sums(50), hold_out=0.1).prompts("train", 3, 0, 96)
    parts = [task(sums(50), hold_out=0.1) for _ in range(replicas)]  # each rank reads the file itself
    share = 32 // replicas
    found = [
        prompt
        for step in range(3)
        for rank, part in enumerate(parts)
        for prompt in part.prompts("train", 3, step * 32 + rank * share, share)
    ]
    assert found == whole


def test_a_prompt_is_rendered_by_the_chat_template(task, tokenizer) -> None:
    rows = [{"prompt": "1+2", "answer": 3, "level": 2}, {"prompt": [{"role": "user", "content": "1+2"}], "answer": "3"}]
    one = task(rows + sums(30), hold_out=0.3)
    found = [one._prompt(one._train, i) for i in (0, 1)]
    assert [p.text for p in found] == ["<user>1+2<assistant>"] * 2 and [p.answer for p in found] == ["3", "3"]
    assert found[0].ids == tokenizer.encode("<user>1+2<assistant>") and found[0].extra == {"level": 2}
    assert found[0].messages == ({"role": "user", "content": "1+2"},)
    told = task(rows + sums(30), hold_out=0.3, system="odd", template_options={"hint": True})
    assert told._prompt(told._train, 1).text == "odd;<user>1+2<assistant>answer:"
    plain = task(sums(30), hold_out=0.3, chat_template=False)
    assert plain._prompt(plain._train, 4).text == "4+1" and plain._prompt(plain._train, 4).messages == ()


def test_a_field_of_a_column_is_named_with_dots(task) -> None:
    rows = [{"q": f"{i}+1", "reward_model": {"ground_truth": str(i + 1)}, "a": "x"} for i in range(40)]
    found = task(rows, hold_out=0.3, prompt="q", answer="reward_model.ground_truth").prompts("train", 0, 0, 5)
    assert all(eval(p.text[6:-11]) == int(p.answer) and p.extra == {"a": "x"} for p in found)


def test_eval_rows_are_taken_out_of_train_and_stand_once(write, tokenizer) -> None:
    held = sums(10)
    settings = Dataset(train=write(sums(30)), eval=write([*held, held[0]], "eval.jsonl"), eval_prompts=0)
    task = DatasetTask(settings, tokenizer, 64)
    assert task.eval_size == 10
    assert [p.answer for p in task.prompts("eval", 0, 0, 10)] == [str(i + 1) for i in range(10)]  # the file's order
    assert {p.answer for p in task.prompts("train", 0, 0, 40)} == {str(i + 1) for i in range(10, 30)}


def test_prompts_that_are_too_long_are_left_out_and_counted(task) -> None:
    said: list[str] = []
    rows = [*sums(40), *({"prompt": "1+" * 20 + f"{i}", "answer": "1"} for i in range(7))]
    found = task(rows, hold_out=0.3, eval_prompts=0, max_prompt_tokens=8, log=said.append)
    assert said == ["data.train: 7 of 47 rows are left out, their prompt has more than 8 tokens"]
    assert len(found._train_order) + found.eval_size == 40
    task(rows, max_tokens=7, hold_out=0.3, log=said.append)  # what model and server leave room for
    assert "more than 7 tokens" in said[-1]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "1+1", "answer": 2', "this line is no JSON"),
        ('{"prompt": "1+1", "prompt": "2", "answer": 2}', "the key 'prompt' stands twice"),
        ("[1, 2]", "a row must be a JSON object, this is a list"),
        ('{"prompt": "1+1"}', "there is no 'answer', only 'prompt'"),
        ('{"question": "1+1", "answer": 2}', "there is no 'prompt', only 'question', 'answer'"),
        ('{"prompt": "1+1", "answer": null}', "there is no 'answer'"),
        ('{"prompt": "1+1", "answer": true}', "'answer' must be a text or a number"),
        ('{"prompt": 7, "answer": 2}', "'prompt' must be a text or a list of messages"),
        ('{"prompt": [], "answer": 2}', "'prompt' must be a text or a list of messages"),
        ('{"prompt": [{"role": "user"}], "answer": 2}', "'prompt' must be a text or a list of messages"),
        ('{"prompt": [{"role": "assistant", "content": "2"}], "answer": 2}', "ends with the assistant's message"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(task, line: str, named: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:13: ") as error:
        task([*sums(11), "", line, *sums(2)])
    assert named in str(error.value)


def test_bytes_that_are_no_text_are_named(write, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff", "answer": 1}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:1: this line is no JSON: 'utf-8'"):
        DatasetTask(Dataset(train=str(tmp_path / "b.jsonl")), tokenizer, 64)


def test_a_template_that_refuses_a_prompt_names_the_line(write) -> None:
    own = build_tokenizer(Arithmetic(), 64)
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the tokenizer's chat template refuses .*roles must alternate"):
        DatasetTask(Dataset(train=write(sums(3))), own, 64)


def test_a_file_that_changes_under_the_run_is_noticed(task, tmp_path: Path) -> None:
    found = task(sums(30), hold_out=0.3)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match="was changed while the run reads it"):
        found.prompts("train", 0, 0, 1)


def test_the_final_answer_of_a_finished_response_is_rewarded(task, tokenizer) -> None:
    found = task(sums(30), hold_out=0.3)
    prompt = found._prompt(found._train, 6)
    for text, reward in [("7<eos>", 1.0), ("7", 0.0), ("1+1=2<eos>", 0.0), ("7<eos><eos>", 0.0), ("<eos>", 0.0)]:
        assert found.reward(prompt, tokenizer.encode(text)) == reward, text


def test_a_response_is_learned_after_its_prompt_and_a_row_holds_one_document(task, tokenizer) -> None:
    said: list[str] = []
    found = task(sums(30), max_tokens=12, supervised=True, hold_out=0.2, log=said.append)
    size = len(found._train_order)
    tokens, mask = found.supervised_batch(0, 0, size, 12)
    assert tokens.dtype == np.int64 and mask.dtype == np.float32 and tokens.shape == mask.shape == (size, 12)
    texts = set()
    for row, marked in zip(tokens, mask):
        learned = tokenizer.decode(row[marked == 1])
        question = tokenizer.decode(row[: int(marked.argmax())]).removeprefix("<user>").removesuffix("<assistant>")
        assert learned == f"answer:{eval(question)}<eos>" and not row[int(marked.nonzero()[0][-1]) + 1 :].any()
        texts.add(question)
    assert len(texts) == size  # an epoch
    again, _ = found.supervised_batch(0, 1, size // 2, 12)
    assert np.array_equal(again, found.supervised_batch(0, 0, size, 12)[0][size // 2 : size // 2 * 2])
    short = task(sums(30), max_tokens=9, supervised=True, hold_out=0.2, log=said.append)
    assert len(short._train_order) < size and "prompt and response have more than 9 tokens" in said[-1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train": ""}, "data.train is empty"),
        ({"hold_out": 0.0}, "data.hold_out is 0"),
        ({"hold_out": 1.5}, "data.hold_out is 1.5"),
        ({"prompt": ""}, "data.prompt is empty"),
        ({"eval_prompts": -1}, "data.eval_prompts is -1"),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens is 0"),
        ({"chat_template": False, "system": "be odd"}, "never read with data.chat_template=false"),
        ({"name": "arithmetic"}, "choose with data=arithmetic"),
        ({"name": "rows"}, "data.name is 'rows'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        task_factory.validate_data(Dataset(**({"train": "t.jsonl"} | settings)), False, "actor")


def test_what_a_run_lacks_is_refused_by_name(write, tokenizer) -> None:
    with pytest.raises(UserError, match="choose init=checkpoint or init=merge"):
        task_factory.validate_data(Dataset(train="t.jsonl"), False, "")
    with pytest.raises(UserError, match="data.response is empty"):
        task_factory.validate_data(Dataset(train="t.jsonl", response=""), True, "actor")
    for name in ("absent.jsonl", __file__):
        with pytest.raises(UserError, match=f"data.train={name}"):
            DatasetTask(Dataset(train=name), tokenizer, 64)
    with pytest.raises(UserError, match="has no rows"):
        DatasetTask(Dataset(train=write([])), tokenizer, 64)
    with pytest.raises(UserError, match="leaves 0 rows to train on"):
        DatasetTask(Dataset(train=write(sums(5)), max_prompt_tokens=1), tokenizer, 64)
    with pytest.raises(UserError, match="no chat template"):
        DatasetTask(Dataset(train=write(sums(5))), build_tokenizer(Arithmetic(), 64), 64)
    with pytest.raises(UserError, match=r"data.eval_prompts is 64, but only \d+ prompts are held out"):
        DatasetTask(Dataset(train=write(sums(30)), hold_out=0.2), tokenizer, 64).prompts("eval", 0, 0, 64)


def test_a_package_that_is_missing_is_named(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "saved").mkdir()
    with pytest.raises(UserError, match=r"pip install 'megatron-bai\[datasets\]'"):
        DatasetTask(Dataset(train=str(tmp_path / "saved")), tokenizer, 64)


def test_datasets_and_parquet_are_read_like_json_lines(tmp_path: Path, task, tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    lines = task(sums(40), hold_out=0.2)
    saved, parquet = tmp_path / "saved", tmp_path / "rows.parquet"
    rows = datasets.Dataset.from_list(sums(40))
    rows.save_to_disk(str(saved))
    rows.to_parquet(str(parquet))
    (tmp_path / "shards").mkdir()
    rows.select(range(20)).to_parquet(str(tmp_path / "shards" / "0.parquet"))
    rows.select(range(20, 40)).to_parquet(str(tmp_path / "shards" / "1.parquet"))
    for path in (saved, parquet, tmp_path / "shards"):
        found = DatasetTask(Dataset(train=str(path), hold_out=0.2), tokenizer, 64)
        assert found.prompts("train", 0, 0, 50) == lines.prompts("train", 0, 0, 50)
        assert found._eval_order == lines._eval_order
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match="has the splits test, train: name one"):
        DatasetTask(Dataset(train=str(tmp_path / "both")), tokenizer, 64)
    with pytest.raises(UserError, match="saved: row 1: there is no 'question'"):
        DatasetTask(Dataset(train=str(saved), prompt="question"), tokenizer, 64)
    parquet.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="is no Parquet that can be read"):
        DatasetTask(Dataset(train=str(parquet)), tokenizer, 64)
