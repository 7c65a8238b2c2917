"""A program in a response, run against the row's cases in processes of its own (`workers/program.py`)."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_bai import config
from megatron_bai.environments.python_tool import find_fenced_programs
from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Reward
from megatron_bai.rewards.sample_function import per_sample
from megatron_bai.workers.program import ProgramLimits, require_isolation, run_program

_BUDGET = 0.8  # of `timeout_s` for all cases: after it the sample would have no reward, and not 0


@dataclass(frozen=True)
class Case:
    """One case: what the program reads and should write, or code that is run after it and should not raise.

    Attributes:
        stdin: of the program; None: the case is code.
        stdout: that it should write.
        code: that follows the program.
    """

    stdin: str | None = None
    stdout: str = ""
    code: str = ""


def score(prompt: str, response: str, answer: str, extra: dict[str, Any], settings: Any) -> float:
    """Return the share of the row's cases that the response's last program passes, or 1.0 for all and else 0.0.

    The program is the last fenced block of Python; a response without one is the program itself.

    Args:
        prompt: text, not used.
        response: text.
        answer: the row's, JSON of cases where `settings.cases` is empty.
        extra: the row's other columns, among them `settings.cases`.
        settings: of `config.Code`, as attributes.

    Raises:
        ValueError: the row has no cases, or they cannot be read.
    """
    cases = parse_cases(extra.get(settings.cases) if settings.cases else answer)
    program = (find_fenced_programs(response) or [response])[-1]
    end = time.monotonic() + _BUDGET * settings.timeout_s
    passed = 0
    for case in cases:
        left = min(settings.case_timeout_s, end - time.monotonic())
        if left > 0 and passes(program, case, ProgramLimits(left, settings.memory_mib)):
            passed += 1
        elif settings.pay == "all":
            return 0.0
    return passed / len(cases)


def passes(program: str, case: Case, limits: ProgramLimits) -> bool:
    """Return whether a program passes a case within its limits.

    Args:
        program: Python.
        case: to pass.
        limits: of the program.
    """
    if case.stdin is not None:
        room = max(limits.output_bytes, 2 * len(case.stdout.encode("utf-8", "replace")))
        result = run_program(program, case.stdin, replace(limits, output_bytes=room))
        return not result.failure and _lines(result.output) == _lines(case.stdout)
    mark = secrets.token_hex(16)  # of a program that ends itself before the case nothing is shown
    shown = f"\n{mark}"  # on a line of its own, wherever the program stopped writing
    result = run_program(f"{program}\n{case.code}\nprint({shown!r})\n", "", limits)
    return not result.failure and _lines(result.output)[-1:] == [mark]


def _lines(text: str) -> list[str]:
    """Return the lines of an output without white space at their ends, and without empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def parse_cases(values: Any) -> list[Case]:
    """Return the cases in a row: a list of `{"input", "output"}` or of codes, or `{"inputs": […], "outputs": […]}`.

    Args:
        values: those, or JSON of those.

    Raises:
        ValueError: they are none of these, or there is none.
    """
    try:
        found = json.loads(values) if isinstance(values, str) else values
    except (ValueError, RecursionError):
        raise ValueError(f"the row's cases are no JSON: {values!r:.80}") from None
    if isinstance(found, Mapping) and isinstance(found.get("inputs"), list) and isinstance(found.get("outputs"), list):
        if len(found["inputs"]) != len(found["outputs"]):
            raise ValueError("the row's cases have other numbers of inputs and outputs")
        found = [{"input": i, "output": o} for i, o in zip(found["inputs"], found["outputs"], strict=True)]
    if not isinstance(found, list) or not found:
        raise ValueError(f"the row has no list of cases: {found!r:.80}")
    return [_parse_case(each) for each in found]


def _parse_case(value: Any) -> Case:
    if isinstance(value, str):
        return Case(code=value)
    if isinstance(value, Mapping) and isinstance(value.get("input"), str) and isinstance(value.get("output"), str):
        return Case(value["input"], value["output"])
    raise ValueError(f"a case is a text of code, or has the texts input and output: {value!r:.80}")


def _check(settings: config.Code) -> None:
    if settings.case_timeout_s > _BUDGET * settings.timeout_s:
        raise UserError(
            f"reward.case_timeout_s ({settings.case_timeout_s:g}) is of one case, and reward.timeout_s "
            f"({settings.timeout_s:g}) of all of a sample: it must be at most {_BUDGET:g} of that"
        )


def _require(settings: config.Code) -> None:
    require_isolation()


REWARD = Reward(config.Code, per_sample(score), _check, _require)
