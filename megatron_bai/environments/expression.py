"""Evaluate an arithmetic expression: numbers, + − × ÷ and parentheses, exactly and in bounded time."""

import re
from fractions import Fraction

MAX_LENGTH = 200  # of the text
_MAX_DEPTH, _MAX_BITS, _MAX_DIGITS = 32, 512, 15
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|[-+*/()])")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", ":": "/"})


class ExpressionError(ValueError):
    """What is wrong with an expression, in a few words."""


def evaluate(text: str) -> str:
    """Return the value of an expression as a person writes it.

    Args:
        text: such as `3*(4.5-1)/2`; with × ÷ − as well.

    Returns:
        An integer, or a decimal: exact where it has at most 15 digits after the point, else rounded to 15 in all.

    Raises:
        ExpressionError: it is no expression, is too large, or divides by zero.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"more than {MAX_LENGTH} characters")
    parser = _Parser(_split(text.translate(_SIGNS)))
    value = parser.sum(0)
    if parser.next is not None:
        raise ExpressionError(f"{parser.next!r} is not expected")
    return format_number(value)


def format_number(value: Fraction) -> str:
    """Return a number as `evaluate` does."""
    if value.denominator == 1:
        return str(value.numerator)
    scale = 10**_MAX_DIGITS
    whole, rest = divmod(abs(value), 1)
    digits = _MAX_DIGITS if (rest * scale).denominator == 1 else max(0, _MAX_DIGITS - len(str(whole)) * (whole > 0))
    scaled = round(abs(value) * 10**digits)
    text = str(scaled).rjust(digits + 1, "0")
    text = f"{text[: len(text) - digits]}.{text[len(text) - digits :]}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 and text.strip("0.") else text


def _split(text: str) -> list[str]:
    """Return the numbers and signs of a text."""
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"{text[position:].strip()[:1]!r} is not expected")
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent; every value is bounded, so that no product grows without end."""

    def __init__(self, tokens: list[str]):
        self._tokens = tokens
        self._position = 0

    @property
    def next(self) -> str | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _take(self) -> str | None:
        token = self.next
        self._position += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self.next in ("+", "-"):
            sign = self._take()
            other = self._product(depth)
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._factor(depth)
        while self.next in ("*", "/"):
            sign = self._take()
            other = self._factor(depth)
            if sign == "/" and not other:
                raise ExpressionError("division by zero")
            value = _bounded(value * other if sign == "*" else value / other)
        return value

    def _factor(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise ExpressionError(f"more than {_MAX_DEPTH} levels")
        token = self._take()
        if token in ("+", "-"):
            value = self._factor(depth + 1)
            return -value if token == "-" else value
        if token == "(":
            value = self.sum(depth + 1)
            if self._take() != ")":
                raise ExpressionError("a parenthesis is not closed")
            return value
        if token is None or not token[0].isdigit():
            raise ExpressionError("it ends too early" if token is None else f"{token!r} is not expected")
        return _bounded(Fraction(token))


def _bounded(value: Fraction) -> Fraction:
    """Return a value; refuse one of more than 512 bits."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ExpressionError("a number is too large")
    return value
