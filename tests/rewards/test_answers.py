"""Finding the final answer in a response, and comparing it as text."""

import pytest

from megatron_bai.data.answers import final_answer, normalise_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{3} no, \boxed{4}. Done.", "4"),
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\boxed{3} and \boxed{4", "3"),  # the last one never ends
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
