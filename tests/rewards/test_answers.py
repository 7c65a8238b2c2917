"""Finding the final answer in a response, and comparing it as text."""

import sys
from datetime import date, datetime
from decimal import Decimal

import pytest

from megatron_bai.data.answers import (
    final_answer,
    format_answer,
    is_correct_answer,
    normalise_answer,
    reference_answer,
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{3} no, \boxed{4}. Done.", "4"),
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\boxed{3} and \boxed{4", "3"),  # the last one never ends
        (r"\boxed{a \} b} x", r"a \} b"),
        (r"\boxed{a \\} b} x", r"a \\"),  # a line's end, and no escape of the brace
        (r"} \boxed{\boxed{1} and { \fboxed{2}", "2"),
        (r"\boxed{3 \boxed{4} 5}", "4"),
        (r"\\boxed{6}", "6"),
        ("#### 3\n#### 1,234\n", "1,234"),
        ("The answer is 4.\nThe final answer is: 5.", "5."),
        ("**Answer:** x", "** x"),
        (r"#### 3, or \boxed{4}", "4"),
        ("first line\n 42 \n\n", " 42 "),
        ("42", "42"),
        (" \n", ""),
        ("", ""),
    ],
)
def test_final(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("42", " 42. ", True),
        ("$x  + 1$", "x + 1", True),
        ("$$x$$", "x", True),
        ("42", "420", False),
        ("a b", "ab", False),
    ],
)
def test_normalised(one: str, other: str, equal: bool) -> None:
    assert (normalise_answer(one) == normalise_answer(other)) is equal


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so 40 + 2 = 42\n#### 42", "Half is 40.\n40 + 2 = 42\n#### 42", True),
        ("#### 1,234", "#### 1234", True),
        (r"\boxed{$1{,}000$}", r"\boxed{$1{,}000$}", True),
        (r"It is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", True),
        ("she pays $18.00.", "18", True),
        ("The answer is 42 because 6 * 7 is.", "42", True),
        ("the answer is **42**", "42", True),
        ("40 + 2 = 42 apples", "42", True),
        ("40 + 2 = 42 apples, of 50", "42", False),
        ("#### 50%", "50", True),
        ("#### -3", "3", False),
        ("5-3", "-3", False),
        ("−3", "-3", True),
        ("answer is −3 degrees", "3", False),
        (r"\boxed{15\text{ apples}}", "15", True),
        (r"\boxed{15^\circ}", "15", True),
        (r"\boxed{x = 15}", "15", True),
        (r"\boxed{3 \times 5 = 15}", "15", True),
        (r"\boxed{3 \times 5 = 15}", "3", False),
        (r"\boxed{1{,}234}", "1234", True),
        ("Answer: **15** (15/20)", "15", True),
        ("the answer is 15, since 3 * 5 = 15", "15", True),
        ("Step 3: 15", "15", True),
        ("42", "420", False),
        ("4.20", "4.2", True),
        ("1,23", "123", False),
        ("Paris is the capital", "Paris", False),
        ("The answer is Paris.", "Paris", True),
        ("The answer is paris", "Paris", False),
        ("9007199254740993", "9007199254740992", False),
        (r"\boxed{3/4}", "3", False),  # a number in an expression is not the answer
        (r"\boxed{\frac{3}{4}}", "3", False),
        (r"\boxed{\dfrac{3}{4}}", "4", False),
        (r"\boxed{2^{10}}", "2", False),
        (r"\boxed{10\sqrt{2}}", "10", False),
        (r"\boxed{10\pi}", "10", False),
        (r"\boxed{3x}", "3", False),
        (r"\boxed{3, 4}", "3", False),
        ("#### 3/4", "3", False),
        ("so it is 1/3", "3", False),
        (r"\boxed{x = 3}", "3", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{10\text{ cm}^2}", "10", True),
        ("so 6/2 = 3", "3", True),
        ("1e3", "1000", True),
        ("#### 1,000", "1e3", True),
        ("1e3", "3", False),
        ("", "", False),
        ("def f():\n    pass", "def f():\n    pass", False),  # programs are not compared as texts
    ],
)
def test_right(response: str, answer: str, right: bool) -> None:
    assert is_correct_answer(response, answer) is right


@pytest.mark.parametrize(
    ("response", "parts"),
    [
        (r"\boxed{1/2}", "12"),
        (r"\boxed{\frac{1}{2}}", "12"),
        (r"\boxed{\dfrac 12}", "12"),
        (r"\boxed{2^{10}}", ["2", "10"]),
        (r"\boxed{3\sqrt{2}}", "32"),
        (r"\boxed{5\pi}", "5"),
        (r"\boxed{10_{8}}", ["10", "8"]),
        (r"\boxed{(5, 6)}", "56"),
        (r"\boxed{3+4i}", "34"),
        (r"\boxed{x+5}", "5"),
        (r"\boxed{[1,2]}", "12"),
        ("answer is 1.5e3", ["1.5", "3"]),
        ("the answer is 10:30", ["10", "30"]),
        ("#### 12,34", ["12", "34"]),
        ("so it is 10/2", ["10", "2"]),
        ("it is 2^{5}", "25"),
        ("it is 3 * 5", "35"),
    ],
)
def test_a_part_of_an_expression_is_no_answer(response: str, parts: str | list[str]) -> None:
    assert not any(is_correct_answer(response, part) for part in parts)


@pytest.mark.parametrize("mark", ["\\boxed{", "{", "#### ", "answer is ", "$", "1,", "1/", "\\frac{1}", "-"])
def test_a_response_that_repeats_itself_is_read_once(mark: str) -> None:
    """Counted in steps of the interpreter, not in time: a second look at every brace would be half a million."""
    steps = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal steps
        steps += 1
        return count

    sys.settrace(count)
    try:
        is_correct_answer(mark * 1000, "5")
    finally:
        sys.settrace(None)
    assert steps < 50_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (15.0, "15"), (-0.0, "0"), (0.5, "0.5"), (0.1 + 0.2, "0.3"), (1e22, "1" + "0" * 22), (1e-7, "0.0000001"),
        (2**53 + 1, "9007199254740993"), (123456789.12345679, "123456789.12345679"), (1 / 3, "0.3333333333333333"),
        (Decimal("15.00"), "15"), (Decimal("1E+3"), "1000"), (date(2024, 1, 2), "2024-01-02"), ("15.0", "15.0"),
        (datetime(2024, 1, 2, 3), "2024-01-02T03:00:00"),
    ],
)  # fmt: skip
def test_the_text_of_an_answer(value: object, text: str) -> None:
    assert format_answer(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Decimal("NaN"), None, True, [1], {"a": 1}, b"x"])
def test_no_answer(value: object) -> None:
    with pytest.raises(ValueError, match="^it is "):
        format_answer(value)


@pytest.mark.parametrize("answer", ["", "a\nb", '{"x": 1}', '["a", "b"]', '[{"input": 1}]'])
def test_what_texts_are_not_compared_with(answer: str) -> None:
    assert reference_answer(answer) is None
    assert reference_answer("[1, 2]") == "[1, 2]"
