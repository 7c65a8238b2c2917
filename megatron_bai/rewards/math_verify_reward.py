"""LaTeX and plain mathematical answers, compared by the package math-verify (0.9.0)."""

from typing import Any

from megatron_bai import config
from megatron_bai.data import answers
from megatron_bai.rewards.reward import Reward
from megatron_bai.rewards.sample_function import per_sample, require_package


def score(prompt: str, response: str, answer: str, extra: dict[str, Any], settings: Any) -> float:
    r"""Return 1.0 where the response's answer, the last `\boxed{…}` if it has one, equals the row's, else 0.0.

    An answer that is not LaTeX in its delimiters is read as if it were in `$…$`. math-verify's own time limits are off:
    they are signals, which code in C does not see; this process is killed instead.

    Args:
        prompt: text, not used.
        response: text, the end token removed.
        answer: the row's, LaTeX or plain.
        extra: the row's other columns, not used.
        settings: of the reward, not used.

    Raises:
        ValueError: the row's answer cannot be read.
    """
    import math_verify

    limits = {"parsing_timeout": None, "raise_on_error": True}
    if "####" in answer:  # a solution, as GSM8K's
        answer = answers.reference_answer(answer) or answer
    delimited = any(mark in answer for mark in ("$", r"\boxed", r"\(", r"\["))
    gold = math_verify.parse(answer if delimited else f"${answer}$", **limits)
    if not gold:
        raise ValueError(f"math-verify cannot read the row's answer {answer!r}")
    last = answers.last_boxed(response)  # math-verify would read several as one answer, a set
    found = math_verify.parse(response if last is None else rf"\boxed{{{last}}}", **limits)
    return float(math_verify.verify(gold, found, timeout_seconds=None, raise_on_error=True))


def _require(settings: config.MathVerify) -> None:
    require_package("math_verify", "math", "math_verify")


REWARD = Reward(config.MathVerify, per_sample(score), require=_require)
