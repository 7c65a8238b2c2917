"""The task with a calculator: its texts are what its chat template, SGLang's parser and the calculator make of them."""

import hashlib
from random import Random

import pytest

from megatron_bai.config import Arithmetic, Tools
from megatron_bai.data.arithmetic_task import ArithmeticTask
from megatron_bai.data.task_factory import validate_data
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.data.tools_task import ToolsTask
from megatron_bai.data.tools_text import make_messages, split_messages
from megatron_bai.environments.expression import evaluate
from megatron_bai.errors import UserError

VOCAB = 96


@pytest.fixture(scope="module")
def task() -> ToolsTask:
    return ToolsTask(Tools(), build_tokenizer(Tools(), VOCAB))


def test_texts_are_what_the_chat_template_renders(task: ToolsTask) -> None:
    rng, kinds = Random(0), set()
    for _ in range(50):
        messages = make_messages(task.data, rng)
        kinds.add(len(messages))
        parts = split_messages(messages, "<eos>")
        text = "".join(part for part, _ in parts)
        assert text == task.tokenizer.apply_chat_template(messages, tokenize=False)
        said = "".join(part for part, is_target in parts if is_target)
        assert said == "".join(f"{each['content']}<eos>" for each in messages if each["role"] == "assistant")
        assert task.tokenizer.decode(task.tokenizer.encode(text)) == text
    assert kinds == {2, 4}


def test_what_the_tool_says_is_right_and_so_is_the_answer(task: ToolsTask) -> None:
    for prompt in task.prompts("train", 0, 0, 50):
        expression = prompt.messages[0]["content"]
        assert evaluate(expression) == prompt.answer and prompt.text == f"<user>{expression}<assistant>"
        end = [task.tokenizer.eos_token_id]
        assert task.reward(prompt, task.tokenizer.encode(f"answer:{prompt.answer}") + end) == 1.0
        assert task.reward(prompt, task.tokenizer.encode(f"<tool_call>answer:{prompt.answer}") + end) == 0.0
    texts = {split: {each.text for each in task.prompts(split, 0, 0, 64)} for split in ("train", "eval")}
    assert len(texts["eval"]) == 64 and not texts["eval"] & texts["train"]


def test_the_loss_is_on_the_models_turns_alone(task: ToolsTask) -> None:
    tokens, mask = task.supervised_batch(0, 0, 4, 128)
    for row, targets in zip(tokens, mask):
        text = task.tokenizer.decode(row[targets > 0])
        assert "<tool>" not in text and "<user>" not in text and text.count("<eos>") == list(row).count(1)


def test_the_shares_are_those_of_the_setting() -> None:
    assert all(len(make_messages(Tools(call_fraction=1.0), Random(i))) == 4 for i in range(20))
    assert all(len(make_messages(Tools(call_fraction=0.0), Random(i))) == 2 for i in range(20))
    with pytest.raises(UserError, match="data.eval_prompts is 64, and the task has 12 calculations"):
        validate_data(Tools(max_number=2), False, "")


def test_the_arithmetic_task_has_the_token_ids_that_it_always_had() -> None:
    digest, tokenizer = hashlib.sha256(), build_tokenizer(Arithmetic(), 64)
    for style in ("pretrained", "instruct", "reasoning", "checked"):
        for array in ArithmeticTask(Arithmetic(style=style), tokenizer).supervised_batch(7, 3, 4, 96):
            digest.update(array.tobytes())
    for split in ("train", "eval"):
        for prompt in ArithmeticTask(Arithmetic(), tokenizer).prompts(split, 7, 0, 64):
            digest.update(repr((prompt.ids, prompt.text, prompt.answer)).encode())
    assert digest.hexdigest() == "13c1da745bc15698666cf0b9732f92fd73b50f1d4d102b6fd5293852e5ed0ce0"
