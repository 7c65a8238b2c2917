"""The task's texts are true, and its settings are checked."""

import re
from random import Random

import pytest

from megatron_bai.config import Arithmetic
from megatron_bai.data.arithmetic_text import (
    STYLES,
    Problem,
    checked_derivation,
    derivation,
    direct_response,
    draw_problem,
    make_document,
)
from megatron_bai.errors import UserError


def test_the_two_ways_to_answer():
    problem = Problem((7, 8, 5))
    assert (problem.expression, problem.answer) == ("7+8+5", "20")
    assert direct_response(problem) == "answer:20"
    assert derivation(problem) == "7+8=15;15+5=20;answer:20"


def is_true(text: str) -> bool:
    """Whether a fact, a sum or a count is what it says."""
    if match := re.fullmatch(r"(\d+) is (odd|even)", text):
        return ("even", "odd")[int(match[1]) % 2] == match[2]
    if match := re.fullmatch(r"(\d+) is (more|less) than (\d+)", text):
        return int(match[1]) != int(match[3]) and (int(match[1]) > int(match[3])) == (match[2] == "more")
    if match := re.fullmatch(r"count:(\d+)((?: \d+)+)", text):
        rest = [int(n) for n in match[2].split()]
        return rest == [int(match[1]) + 1 + i for i in range(len(rest))]
    if match := re.fullmatch(r"(\d+)\+(\d+)=(\d+)", text):
        return int(match[1]) + int(match[2]) == int(match[3])
    return re.fullmatch(r"(\d+\+)+", text) is not None  # an unfinished expression claims nothing


@pytest.mark.parametrize("style", STYLES)
def test_every_statement_is_true(style):
    rng, kinds = Random(0), set()
    for _ in range(2000):
        text = make_document(Arithmetic(), style, rng)
        *lines, last = text.response.split(";")
        assert all(is_true(line) for line in lines), text
        if text.prompt:
            terms = re.fullmatch(r"<user>([\d+]+)<assistant>", text.prompt)[1].split("+")
            assert last == f"answer:{sum(map(int, terms))}", text
            kinds.add("reasoning" if lines else "instruct")
        else:
            assert is_true(last), text
            kinds.add(re.sub(r"[\d ]+", "", last)[:6])
    if style == "pretrained":  # mixed: both ways to answer, and every kind of fact
        assert {"instruct", "reasoning", "isodd", "iseven", "ismore", "isless", "count:", "+=", "+"} <= kinds
    else:
        assert kinds == {"instruct" if style == "instruct" else "reasoning"}


def test_a_checked_derivation_says_each_line_one_to_three_times():
    problem, rng = Problem((7, 8, 5)), Random(0)
    found = {checked_derivation(problem, rng) for _ in range(200)}
    lines = "7+8=15;", "15+5=20;"
    assert found == {lines[0] * i + lines[1] * j + "answer:20" for i in (1, 2, 3) for j in (1, 2, 3)}


def test_sizes_follow_the_settings():
    data, rng = Arithmetic(min_terms=4, max_terms=6, max_number=3), Random(0)
    problems = [draw_problem(data, rng) for _ in range(500)]
    assert {len(p.terms) for p in problems} == {4, 5, 6}
    assert {n for p in problems for n in p.terms} == {1, 2, 3}
    assert not any(p.held_out for p in problems) and draw_problem(data, rng, held_out=True).held_out


def test_a_task_without_held_out_problems_is_refused(monkeypatch):
    monkeypatch.setattr(Problem, "held_out", False)
    with pytest.raises(UserError, match="data.max_number"):
        draw_problem(Arithmetic(), Random(0), held_out=True)
