r"""Find the final answer in a text, and compare answers as texts and as plain numbers.

Conventions, the first that a text has counts, its last occurrence: `\boxed{…}`; `####` (GSM8K); "answer is", "answer:".
"""

import json
import math
import re
from datetime import date, time
from decimal import Decimal, InvalidOperation
from typing import Any

_BRACE = re.compile(r"(\\f?boxed\s*\{)|\\\\(?!f?boxed)|\\[{}]|([{}])")  # escaped ones are no braces
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_STATED = re.compile(r"\banswer(?:\s+is|\s*[:=])[ \t:=]*(\S[^\n]*)", re.IGNORECASE)
_POWER = r"(?:[eE][-+]?\d{1,3}(?!\w))?"  # 1e3, as a spreadsheet writes it
_NUMBER = re.compile(
    rf"(?<![\w.)])[-+]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?{_POWER}(?!\d)|(?<!\d[eE])\d+(?:\.\d+)?{_POWER}"
)
_TEXT_COMMANDS = r"\\(?:text|textbf|mathrm|mathbf|mbox|boldsymbol)\s*\{"
_MARKUP = re.compile(_TEXT_COMMANDS + r"|\\[()\[\],;:!%$ ]|\^\s*(?:\{\s*)?\\circ\}?|\\(?:left|right)\b|\$|\*\*")
# What stands around a number that is a part of something else: 1/2, 2^{10}, 3\sqrt{2}, 5\pi, 10_8, 1.5e3, 15:30, 1,23.
_PART_BEFORE = re.compile(r"(?:[/^]|[\w)}]_|[}\w^_]\s*\{|\\[a-zA-Z]+|\d\s*[-+*×÷·]|\b[a-zA-Z]\s*[-+*])\s*$|\d:$")
_TERMS = r"\\(?:[dt]?frac|sqrt|pi|times|cdot|div|pm|over|choose|leq?|geq?|[lg]t|log|ln|sin|cos|tan)\b"
_PART_AFTER = re.compile(rf"\s*(?:\^|[-+*/×÷·]\s*[\d({{\\]|{_TERMS})|_[\d{{]|[:,]\d|[eE][-+]?\d|[xyz]\b")
_ONE_OF_SEVERAL = re.compile(r"\s*(?:,|and\b|or\b)[\s}]*[-+]?\d")  # in a box: 3, 4
_NEAR = 40  # characters before a number that are looked at
_PLAIN_NUMBER = re.compile(rf"[-+]?(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+){_POWER}")


def format_answer(value: Any) -> str:
    """Return an answer as the text that a response should have: 15.0 as "15", 0.1 + 0.2 as "0.3", a date in ISO's form.

    Args:
        value: of a row.

    Raises:
        ValueError: it is no text, number or date; says what it is.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, date | time):
        if value != value:  # pandas' NaT
            raise ValueError("it is NaT")
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"it is a {type(value).__name__}")
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"it is {value}")
    text = repr(value) if isinstance(value, float) else str(value)
    short = f"{value:.15g}"
    if isinstance(value, float) and len(re.sub(r"e.*|\D", "", short).strip("0")) <= 12:
        text = short  # what is beyond is the rounding of a computation
    plain = format(Decimal(text), "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def last_boxed(response: str) -> str | None:
    r"""Return the content of the last complete `\boxed{…}`, braces balanced; None where there is none.

    One pass: a response that repeats `\boxed{` to its end takes no longer than another one.
    """
    last: tuple[int, int] | None = None
    opened: list[int | None] = []  # where the content of a box begins; None of another brace
    for found in _BRACE.finditer(response):
        if found[1]:
            opened.append(found.end())
        elif found[2] == "{":
            opened.append(None)
        elif found[2] and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, found.start()
    return None if last is None else response[last[0] : last[1]]


def marked_answer(text: str) -> str | None:
    """Return the answer that a text marks by a convention of this module, or None."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_HASHES, _STATED):
        if matches := pattern.findall(text):
            return str(matches[-1])
    return None


def final_answer(response: str) -> str:
    """Return the answer that a response marks; without one the last line that is not blank; or an empty text."""
    answer = marked_answer(response)
    if answer is not None:
        return answer
    lines = [line for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def reference_answer(answer: str) -> str | None:
    """Return what a response is compared with: the answer itself, or what a solution marks as its answer.

    Returns:
        A text of one line; None where no comparison of texts can be right: several lines without a mark, such as a
        program, or JSON of test cases.
    """
    marked = marked_answer(answer)
    if marked is not None:
        return marked
    text = answer.strip()
    if not text or "\n" in text or _is_structure(text):
        return None
    return text


def is_correct_answer(response: str, answer: str) -> bool:
    """Return whether the final answer of a response is the row's.

    They are equal as texts, or as numbers: `1,234`, `$1234`, `1234.0`, `1234%` and `1.234e3` are the same. Where the
    row's answer is a number, the number of the response is the first after its mark, else the last of all. The 1 of 1/2
    or of x + 1 is no number of its own, nor is the 3 of a box with 3, 4.

    Args:
        response: text, the end token removed.
        answer: of the row: the answer, or a solution with a mark.
    """
    reference = reference_answer(answer)
    if reference is None:
        return False
    found = final_answer(response)
    if normalise_answer(found) == normalise_answer(reference):
        return True
    wanted = _parse_number(reference)
    if wanted is None:
        return False
    value = _parse_number(found)
    if value is None:
        marked = marked_answer(response)
        in_box = last_boxed(response) is not None
        value = _find_number(response, -1) if marked is None else _find_number(marked, 0, in_box)
        if value is None and marked is not None and "=" in marked:  # 3 * 5 = 15
            value = _find_number(marked.rpartition("=")[2], 0)
    return value == wanted


def _find_number(text: str, which: int, in_box: bool = False) -> Decimal | None:
    """Return the first (0) or last (-1) number of a text; None where it is a part of a fraction, a term or a list.

    Args:
        text: the response, or what it marks.
        which: index of the number.
        in_box: whether another number after a comma is one more answer, and no sentence that goes on.
    """
    plain = _MARKUP.sub(" ", text.replace("{,}", ",").replace("\u2212", "-"))
    numbers = list(_NUMBER.finditer(plain))
    if not numbers:
        return None
    number = numbers[which]
    before = plain[max(number.start() - _NEAR, 0) : number.start()]
    in_list = before.rstrip().endswith(("(", "[")) and plain[number.end() :].lstrip().startswith(",")
    if in_list or _PART_BEFORE.search(before) or _PART_AFTER.match(plain, number.end()):
        return None
    if in_box and _ONE_OF_SEVERAL.match(plain, number.end()):
        return None
    return _parse_number(number[0])


def normalise_answer(answer: str) -> str:
    """Remove enclosing dollar signs and a full stop at the end, and reduce white space to single blanks."""
    words = " ".join(answer.split()).removesuffix(".")
    while len(words) > 1 and words[0] == words[-1] == "$":
        words = words[1:-1]
    return words.strip()


def _parse_number(text: str) -> Decimal | None:
    """Return the number that a text is, without a currency's or per cent's sign and commas of thousands; or None."""
    bare = normalise_answer(text.replace("*", "").replace("\\", "").replace("\u2212", "-"))
    bare = re.sub(r"^([-+]?)\s*[$€£]\s*", r"\1", bare)
    bare = re.sub(r"\s*[%€£$]$", "", bare)
    if not bare or not _PLAIN_NUMBER.fullmatch(bare):
        return None
    try:
        return Decimal(bare.replace(",", ""))
    except InvalidOperation:  # a sign alone
        return None


def _is_structure(text: str) -> bool:
    """Return whether a text is JSON of an object, or of a list of texts, lists or objects."""
    if text[0] not in "[{":
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or any(isinstance(item, str | list | dict) for item in value)
