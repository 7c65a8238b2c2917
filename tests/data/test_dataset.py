"""Rows on local disk: read, refused by name, ordered, rendered, rewarded and learned."""

import ast
import json
import re
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_bai import config
from megatron_bai.config import Arithmetic, Dataset
from megatron_bai.data import task_factory
from megatron_bai.data.dataset_task import DatasetTask
from megatron_bai.data.row_texts import read_texts
from megatron_bai.data.shuffle import permute_index, shuffled_index
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.utils.dataclass_defaults import read_defaults

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


@pytest.mark.parametrize("separate", [True, False])
def test_a_prompt_that_is_held_out_is_in_train_in_no_form(write, tokenizer, separate: bool) -> None:
    """One prompt as a text, as messages, and as messages with the nulls that Parquet fills in, has one text."""
    forms: list[dict[str, Any]] = []
    for row in sums(30):
        message = {"role": "user", "content": row["prompt"]}
        forms += [row | {"prompt": [message | {"name": None}]}, row | {"prompt": [message]}, row]
    settings = Dataset(train=write(forms), hold_out=0.2)
    if separate:
        settings.eval = write(
            [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in sums(9)], "e.jsonl"
        )
    task = DatasetTask(settings, tokenizer, 64)
    held = [prompt.text for prompt in task.prompts("eval", 0, 0, len(task._eval_order))]
    trained = {prompt.text for prompt in task.prompts("train", 0, 0, len(task._train_order))}
    assert held and len(set(held)) == len(held) and not trained & set(held)
    assert len(trained) + len(held) == 30 and len(task._train_order) == 3 * len(trained)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in sums(30)).encode())
    task = DatasetTask(Dataset(train=str(path), hold_out=0.3), tokenizer, 64)
    assert len(task._train_order) + len(task._eval_order) == 30


def test_prompts_that_are_too_long_are_left_out_and_counted(task) -> None:
    said: list[str] = []
    rows = [*sums(40), *({"prompt": "1+" * 20 + f"{i}", "answer": "1"} for i in range(7))]
    found = task(rows, hold_out=0.3, eval_prompts=0, max_prompt_tokens=8, log=said.append)
    assert said == [
        "data.train: 7 of 47 rows are left out, their prompt has more than 8 tokens (data.max_prompt_tokens)"
    ]
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
        ('{"prompt": "1+1", "answer": null}', "'answer' is null"),
        ('{"prompt": "1+1", "answer": NaN}', "'answer' must be a text or a number: it is nan"),
        ('{"prompt": "1+1", "answer": -Infinity}', "'answer' must be a text or a number: it is -inf"),
        ('{"prompt": "1+1", "answer": ["1", "2"]}', "'answer' must be a text or a number: it is a list"),
        (r'{"prompt": "a\ud800b", "answer": 1}', r"'a\ud800b' has half of a surrogate pair"),
        (r'{"prompt": "a", "answer": "\udfff"}', r"'\udfff' has half of a surrogate pair"),
        (r'{"prompt": "a", "answer": "1", "more": [{"\uDBFFx": 1}]}', r"'\udbffx' has half of a surrogate pair"),
        (
            r'{"prompt": [{"role": "user", "content": "\udc00"}], "answer": 1}',
            r"'\udc00' has half of a surrogate pair",
        ),
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
        ({"system": "\udcff"}, r"data.system has '\\udcff', which is no text"),
        ({"template_options": {"a": ["\ud800"]}}, "data.template_options has"),
        ({"answer": "\ud800"}, "data.answer has"),
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
    with pytest.raises(UserError, match=r"64, and data.hold_out holds out only \d+ prompts: .*=0 .* data.hold_out"):
        DatasetTask(Dataset(train=write(sums(30)), hold_out=0.2), tokenizer, 64).prompts("eval", 0, 0, 64)
    rows = write(sums(30), "eval.jsonl")
    with pytest.raises(UserError, match=r"64, and data.eval has only 30 prompts: data.eval_prompts=0 takes all$"):
        DatasetTask(Dataset(train=write(sums(60)), eval=rows), tokenizer, 64).prompts("eval", 0, 0, 64)


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


def test_the_setting_that_a_message_names_is_the_one_that_bounds(task) -> None:
    def left(**kwargs: Any) -> str:
        with pytest.raises(UserError, match="leaves 0 rows to train on") as error:
            task(sums(20), **kwargs)
        return str(error.value)

    assert "supervised.length" in left(max_tokens=2, supervised=True) and "max_prompt" not in left(
        max_tokens=2, supervised=True
    )
    assert "data.max_prompt_tokens" in left(max_prompt_tokens=2)
    assert "rollout.max_new_tokens" in left(max_tokens=2)


def test_every_setting_that_a_message_names_exists() -> None:
    groups = {field.name: read_defaults(type(getattr(config.Config(), field.name))) for field in fields(config.Config)}
    kinds_by_group: dict[str, list[type]] = {
        "data": [Arithmetic, config.Tools, Dataset],
        "reward": [config.Function, config.RewardModel, config.Code, config.Several],
        "env": [config.Calculator, config.PythonTool],
        "objective": [config.Ppo],
        "init": [config.CheckpointInit, config.MergeInit],
    }
    for group, kinds in kinds_by_group.items():
        groups[group] = {name: 0 for kind in kinds for name in read_defaults(kind)}
    package = Path(task_factory.__file__).parent.parent
    found = set()
    for file in [*package.glob("data/*.py"), *package.glob("rewards/*.py"), *package.glob("rl/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                found |= set(re.findall(r"(?<![\w/.])([a-z]+)\.([a-z_]{3,})(?![\w/.(])", ast.unparse(node)))
    named = {(group, name) for group, name in found if group in groups and name not in ("jsonl", "parquet")}
    assert len(named) > 30
    assert not {(group, name) for group, name in named if name not in groups[group]}


def test_values_that_json_lacks_are_taken_from_parquet(tmp_path: Path, tokenizer) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    day = datetime(2024, 1, 2)
    messages = [
        [{"role": "user", "content": f"{i}+1", "timestamp": day, "raw": b"\xff", "score": None}] for i in range(30)
    ]
    table = pa.table(
        {
            "prompt": messages,
            "answer": pa.array([i + 0.5 for i in range(30)], pa.float32()),
            "day": [day.date()] * 30,
            "cost": pa.array([Decimal("1.50")] * 30),
            "more": [[{"at": day}]] * 30,
            "map": pa.array([[("k", 1)]] * 30, pa.map_(pa.string(), pa.int32())),
            "code": pa.array(["a"] * 30).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    task = DatasetTask(Dataset(train=str(tmp_path / "rows.parquet"), hold_out=0.2), tokenizer, 64)
    prompt = task._prompt(task._train, 3)
    assert prompt.text == "<user>3+1<assistant>" and prompt.answer == "3.5"
    assert prompt.messages == ({"role": "user", "content": "3+1", "timestamp": "2024-01-02T00:00:00", "raw": "/w=="},)
    assert prompt.extra == {
        "day": "2024-01-02", "cost": "1.50", "more": [{"at": "2024-01-02T00:00:00"}], "map": [["k", 1]], "code": "a"
    }  # fmt: skip
    json.dumps([prompt.messages, prompt.extra])


@pytest.mark.parametrize(("width", "nested"), [(16, False), (32, False), (16, True), (32, True)])
def test_a_narrow_float_is_the_number_that_was_written(tmp_path: Path, tokenizer, width: int, nested: bool) -> None:
    """Also in a field, a list, or a dictionary of equal values: 0.1 is neither 0.10000000149 nor 0.099975586."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    values = pa.array(np.full(30, 0.1, np.dtype(f"float{width}")))
    answer = pa.StructArray.from_arrays([values], ["truth"]) if nested else values
    scores = pa.ListArray.from_arrays(pa.array(range(31), pa.int32()), values)
    table = pa.table({"prompt": [f"{i}+1" for i in range(30)], "answer": answer, "scores": scores})
    pq.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        settings = Dataset(train=str(path), hold_out=0.2, answer="answer.truth" if nested else "answer")
        task = DatasetTask(settings, tokenizer, 64)
        prompt = task._prompt(task._train, 3)
        assert prompt.answer == "0.1" and prompt.extra == {"scores": [0.1]}


@pytest.mark.parametrize("column", ["prompt", "messages", "answer", "response"])
def test_bytes_that_are_no_text_are_refused_where_one_is_needed(tmp_path: Path, tokenizer, column: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[Any]] = {"prompt": ["1", "2"], "answer": ["1", "2"], "response": ["1", "2"]}
    columns[column] = [b"\xc3\xa9", b"\xe9"]  # é in UTF-8, and in Latin-1
    if column == "messages":
        columns["messages"] = [[{"role": "user", "content": text}] for text in columns["messages"]]
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    settings = Dataset(train=str(tmp_path / "rows.parquet"), prompt="messages" if column == "messages" else "prompt")
    with pytest.raises(UserError, match=rf"rows.parquet: row 2: '{column}' .*bytes that are no text in UTF-8"):
        DatasetTask(settings, tokenizer, 64, supervised=column == "response")


@pytest.mark.parametrize("column", ["prompt", "answer", "other"])
def test_a_value_that_cannot_be_read_is_named_with_its_row_and_column(tmp_path: Path, tokenizer, column: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"prompt": pa.array(["1", "2"]), "answer": pa.array(["1", "2"]), "other": pa.array(["1", "2"])}
    columns[column] = pa.array([1, 10**15], pa.timestamp("s"))  # the second in a year that Python has not
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=f"rows.parquet: row 2: the column '{column}' cannot be read"):
        DatasetTask(Dataset(train=str(tmp_path / "rows.parquet")), tokenizer, 64)


def test_answers_that_texts_are_not_compared_with_have_no_check(task) -> None:
    texts = ["42", "so 40 + 2 = 42\n#### 42", "def f():\n    return 1", '{"inputs": [1]}', ""]
    rows = [{"prompt": f"{i}+2", "answer": text} for i, text in enumerate(texts)]
    found = task([*rows, *sums(30)], hold_out=0.1)
    assert [found.has_check(found._prompt(found._train, i)) for i in range(5)] == [True, True, False, False, False]


def test_texts_to_run_a_model_on_are_the_first_rows_each_with_its_response_if_it_has_one(write, tokenizer) -> None:
    rows = [{"prompt": "1+1"}, {"prompt": "1+2", "response": "3"}, {"prompt": "1+3", "response": None}]
    found = read_texts(write(rows), "inspect.prompts", Dataset(chat_template=False), tokenizer, 2)
    assert found == [
        tokenizer.encode("1+1"),
        [*tokenizer.encode("1+2"), *tokenizer.encode("3"), tokenizer.eos_token_id],
    ]
    cut = read_texts(write(rows), "inspect.prompts", Dataset(max_prompt_tokens=4), tokenizer, 9)
    assert [len(ids) for ids in cut] == [4, 4, 4]
    with pytest.raises(UserError, match="rows.jsonl:1: there is no 'question'"):
        read_texts(write(rows), "inspect.prompts", Dataset(prompt="question"), tokenizer, 9)
