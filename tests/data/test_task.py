"""Prompts, rewards and supervised batches."""

import numpy as np
import pytest

from megatron_bai.config import Arithmetic
from megatron_bai.data.arithmetic_task import ArithmeticTask
from megatron_bai.data.task import Prompt
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError

VOCAB = 64


@pytest.fixture(scope="module")
def task() -> ArithmeticTask:
    return ArithmeticTask(Arithmetic(), build_tokenizer(Arithmetic(), VOCAB))


def batch(task: ArithmeticTask, style: str, step: int, rows: int, length: int):
    """A supervised batch of a style, with the seed 0."""
    return ArithmeticTask(Arithmetic(style=style), task.tokenizer).supervised_batch(0, step, rows, length)


@pytest.fixture(scope="module")
def prompt(task) -> Prompt:
    return task.prompts("train", seed=0, start=0, count=1)[0]


def test_prompts_are_a_function_of_seed_and_index(task):
    stream = task.prompts("train", seed=1, start=0, count=8)
    assert task.prompts("train", seed=1, start=4, count=4) == stream[4:]
    assert task.prompts("train", seed=2, start=0, count=8) != stream
    assert all(task.tokenizer.decode(p.ids) == p.text for p in stream)
    assert all(str(eval(p.text.split(">")[1].split("<")[0])) == p.answer for p in stream)


def test_eval_prompts_are_all_different_and_never_trained_on(task):
    held_out = {p.text for p in task.prompts("eval", seed=0, start=0, count=64)}
    assert len(held_out) == 64
    assert held_out.isdisjoint(p.text for p in task.prompts("train", seed=0, start=0, count=3000))
    for style in ("pretrained", "instruct", "reasoning"):
        tokens, _ = batch(task, style, 0, 200, 128)
        text = " ".join(task.tokenizer.decode(row) for row in tokens)
        assert text.count("<user>") > 300 and not any(p in text for p in held_out)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("answer:{0}<eos>", 1.0),
        ("1+1=2;answer:{0}<eos>", 1.0),  # only the answer is judged
        ("answer:1{0}<eos>", 0.0),
        ("answer:{0}0<eos>", 0.0),
        ("answer:0{0}<eos>", 0.0),
        ("answer:{0}", 0.0),  # cut off
        ("answer:{0};", 0.0),
        ("answer:{0}<pad>", 0.0),
        ("answer:{0};<eos>", 0.0),
        ("{0}<eos>", 0.0),
        ("<eos>", 0.0),
        ("", 0.0),
        ("answer:{0}<eos><eos>", 0.0),
        ("answer:{0}<pad><eos>", 0.0),
        ("<assistant>;answer:{0}<eos>", 0.0),
        ("answer:9;answer:{0}<eos>", 1.0),
        ("answer:{0};answer:9<eos>", 0.0),
    ],
)
def test_reward(task, prompt, response, reward):
    ids = task.tokenizer.encode(response.format(prompt.answer))
    assert task.reward(prompt, ids) == reward
    assert task.reward(prompt, np.array(ids, dtype=np.int64)) == reward


def test_an_id_without_text_earns_nothing(task, prompt):
    """The tokenizer drops ids it does not know when it decodes: they must not pass for a clean answer."""
    good = task.tokenizer.encode(f"answer:{prompt.answer}<eos>")
    assert len(task.tokenizer) < VOCAB and task.reward(prompt, [VOCAB - 1, *good]) == 0.0


def test_rewards_of_the_programs_own_solutions(task):
    """Every response taught is one that earns the reward."""
    prompts = {p.text: p for p in task.prompts("train", seed=3, start=0, count=2000)}
    seen = 0
    for style in ("instruct", "reasoning"):
        tokens, _ = batch(task, style, 0, 100, 96)
        for row in tokens:
            for text in task.tokenizer.decode(row).replace("<pad>", "").split("<user>")[1:]:
                question, response = text.split("<assistant>")
                if found := prompts.get(f"<user>{question}<assistant>"):
                    assert task.reward(found, task.tokenizer.encode(response)) == 1.0
                    seen += 1
    assert seen > 20


def test_batches_do_not_depend_on_who_makes_them(task):
    tokens, mask = batch(task, "pretrained", 5, 8, 64)
    again, again_mask = batch(task, "pretrained", 5, 4, 64)
    assert np.array_equal(tokens[:4], again) and np.array_equal(mask[:4], again_mask)
    other, _ = batch(task, "pretrained", 6, 8, 64)
    assert not np.array_equal(tokens, other)
    assert tokens.dtype == np.int64 and mask.dtype == np.float32 and tokens.shape == mask.shape == (8, 64)


def test_loss_mask_marks_what_is_learned(task):
    tokens, mask = batch(task, "reasoning", 0, 4, 128)
    for row, marked in zip(tokens, mask):
        learned = task.tokenizer.decode(row[marked == 1])
        expected = "".join(part.split("<assistant>")[1] for part in task.tokenizer.decode(row).split("<user>")[1:])
        assert learned == expected.replace("<pad>", "") and learned.endswith("<eos>")
    tokens, mask = batch(task, "pretrained", 0, 4, 128)
    assert not mask[:, 0].any() and np.array_equal(mask[:, 1:] == 1, tokens[:, 1:] != task.tokenizer.pad_token_id)


def test_refusals(task):
    with pytest.raises(UserError, match="eval_prompts"):
        task.prompts("eval", seed=0, start=60, count=5)
    with pytest.raises(UserError, match="split"):
        task.prompts("test", seed=0, start=0, count=1)
    with pytest.raises(UserError, match="data.style"):
        batch(task, "poetry", 0, 1, 64)
    with pytest.raises(UserError, match="too short"):
        batch(task, "reasoning", 0, 1, 8)


@pytest.mark.parametrize("wrong", [{"min_terms": 2}, {"min_terms": 5, "max_terms": 4}, {"max_number": 1}])
def test_refuses_contradictory_settings(task, wrong):
    with pytest.raises(UserError, match=f"data.({'|'.join(wrong)})"):
        ArithmeticTask(Arithmetic(**wrong), task.tokenizer)
