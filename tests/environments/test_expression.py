"""The calculator's arithmetic is exact, bounded, and no Python."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bai.environments.expression import ExpressionError, evaluate, format_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("384*917", "352128"), ("1+2*3", "7"), ("(1+2)*3", "9"), ("10-2-3", "5"), ("12/4/3", "1"), ("-3*-2", "6"),
        ("2 × 3 ÷ 4 − 1", "0.5"), ("0.1+0.2", "0.3"), ("1/3", "0.333333333333333"), ("-2/3", "-0.666666666666667"),
        ("100/3", "33.3333333333333"), ("1/8", "0.125"), ("--1", "1"), (" 7 ", "7"), ("1.50", "1.5"), ("0*5-0", "0"),
        ("1/10000000000000000000", "0"),
    ],
)  # fmt: skip
def test_values(text: str, value: str) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it ends too early"), ("1+", "it ends too early"), ("1 2", "'2' is not expected"), (")", "not expected"),
        ("(1", "a parenthesis is not closed"), ("2**3", "'*' is not expected"), ("1/0", "division by zero"),
        ("1/(2-2)", "division by zero"), ("__import__('os')", "'_' is not expected"), ("1e9", "'e' is not expected"),
        (".5", "'.' is not expected"), ("(" * 99 + "1" + ")" * 99, "more than 32 levels"), ("1" * 201, "more than 200"),
        ("*".join(["9" * 30] * 6), "a number is too large"), ("9" * 199, "a number is too large"),
        ("½", "is not expected"),
        ("-" * 100 + "1", "more than 32 levels"), ("١+١", "is not expected"),
    ],
)  # fmt: skip
def test_what_is_no_expression_is_named(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError, match=re.escape(reason)):
        evaluate(text)


@given(st.fractions(max_denominator=10**6))
def test_a_number_as_text_is_near_it(value: Fraction) -> None:
    assert abs(Fraction(format_number(value)) - value) <= max(Fraction(1), abs(value)) / 10**13
