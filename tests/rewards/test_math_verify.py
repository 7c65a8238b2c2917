"""LaTeX answers by math-verify."""

import pytest

from megatron_bai.rewards.math_verify_reward import score

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1),
        (r"so it is $\frac12$.", r"\frac{1}{2}", 1),
        (r"\boxed{2x + 2}", "2(x+1)", 1),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        (r"\boxed{(1, 2]}", "(1,2]", 1),
        (r"\boxed{(1, 2)}", "(1,2]", 0),
        (r"\boxed{\{3, 1\}}", r"\{1,3\}", 1),
        (r"first \boxed{3}, no: \boxed{4}", "4", 1),
        ("The answer is 42", "42", 1),
        ("The answer is 1,234", "1234", 1),
        (r"\boxed{41}", "42", 0),
        (r"\boxed{x}", "y", 0),
        ("I do not know", "42", 0),
        ("", "42", 0),
        (r"\boxed{\frac{}{}", "42", 0),
        (r"$42$", r"\boxed{42}", 1),
    ],
)
def test_it_tells_equal_answers_from_others(response: str, answer: str, reward: int) -> None:
    assert score("", response, answer, {}, None) == reward


def test_a_rows_answer_that_is_none_costs_the_sample() -> None:
    with pytest.raises(ValueError, match="cannot read the row's answer"):
        score("", "$42$", "", {}, None)
