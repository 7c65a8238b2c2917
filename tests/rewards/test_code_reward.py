"""A program in a response is run against the row's cases; what it does costs nobody else."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bai import config, rewards
from megatron_bai.errors import UserError
from megatron_bai.rewards.code_reward import Case, parse_cases, score

CASES = json.dumps([{"input": "2 3", "output": "5\n"}, {"input": "10 -4", "output": "6"}])
ASSERTS = ["assert add(2, 3) == 5", "assert add(1, 1) == 2"]
ADDS = "a, b = map(int, input().split())\nprint(a + b)"
FIVE = "print(5)"


def of(response: str, answer: str = CASES, **settings: Any) -> float:
    defaults: dict[str, Any] = {
        "cases": "",
        "pay": "share",
        "timeout_s": 120.0,
        "case_timeout_s": 60.0,
        "memory_mib": 512,
    }
    return score("", response, answer, {"tests": ASSERTS}, SimpleNamespace(**defaults | settings))


@pytest.mark.parametrize(
    ("response", "share"),
    [
        (ADDS, 1.0),
        (f"First\n```python\nprint(1)\n```\nno:\n```python\n{ADDS}\n```", 1.0),
        (f"```python\n{FIVE}\n```", 0.5),
        ("print(5, end='  \\n\\n')", 0.5),
        ("this is no program", 0.0),
        ("", 0.0),
        ("print(open('/etc/passwd').read())", 0.0),
        ("print('5' * 10_000_000)", 0.0),
        ("print(float('nan'))", 0.0),
        ("import sys; sys.stdout.buffer.write(b'5\\xff')", 0.0),
        ("import os; os.closerange(0, 64)", 0.0),
        ("print(5); raise SystemExit(1)", 0.0),
    ],
)
def test_the_share_of_cases_of_standard_output(response: str, share: float) -> None:
    assert of(response) == share


def test_a_case_may_have_a_long_output() -> None:
    cases = json.dumps([{"input": "", "output": "5" * 100_000}])
    assert of("print('5' * 100_000)", cases) == 1.0 and of("print('5' * 1_000_000)", cases) == 0.0


def test_all_or_nothing() -> None:
    assert of(ADDS, pay="all") == 1.0 and of(FIVE, pay="all") == 0.0


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ("def add(a, b):\n    return a + b", 1.0),
        ("def add(a, b):\n    return 5", 0.5),
        ("def add(a, b):\n    return a + b\nprint(add(1, 1), end='')", 1.0),  # it ends no line
        ("import sys; sys.exit(0)", 0.0),  # it ends well, before the assertion
        ("import os; os._exit(0)", 0.0),
        ("def add(a, b):\n    import os; os._exit(0)", 0.0),
    ],
)
def test_cases_of_code(response: str, share: float) -> None:
    assert of(response, "unused", cases="tests") == share


def test_a_program_that_hangs_fails_its_case_and_has_a_reward() -> None:
    assert of("while True: pass", case_timeout_s=0.3) == 0.0


@pytest.mark.parametrize("values", ["", "no JSON", "[]", "{}", [1], [{"input": 1, "output": "1"}], None, "[" * 100_000])
def test_a_row_without_cases_has_no_reward(values: Any) -> None:
    with pytest.raises(ValueError, match="case"):
        parse_cases(values)


def test_forms_of_cases() -> None:
    assert parse_cases({"inputs": ["1"], "outputs": ["2"]}) == [Case("1", "2")]
    assert parse_cases('["assert f()"]') == [Case(code="assert f()")]
    with pytest.raises(ValueError, match="other numbers"):
        parse_cases({"inputs": ["1"], "outputs": []})


def test_settings_that_contradict_each_other_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"reward.case_timeout_s \(50\) is of one case"):
        rewards.resolve_reward(config.Code(case_timeout_s=50.0))
