"""A reward function: what the judge of benchmarks/reproduce would say of an answer's form, and 3 for the right sum."""

from typing import Any


def judged(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> float:
    """1 for an answer that says nothing twice, −1 for thirty characters."""
    lines = response.split(";")
    return 3.0 * (lines[-1] == f"answer:{answer}") + (len(set(lines)) == len(lines)) - len(response) / 30
