"""Find the final answer in a response, and compare answers as texts."""

import re

_BOXED = re.compile(r"\\boxed\s*\{")


def last_boxed(response: str) -> str | None:
    r"""Return the content of the last complete `\boxed{…}`, braces balanced; None where there is none."""
    for found in reversed(list(_BOXED.finditer(response))):
        depth = 1
        for end in range(found.end(), len(response)):
            depth += {"{": 1, "}": -1}.get(response[end], 0)
            if not depth:
                return response[found.end() : end]
    return None


def final_answer(response: str) -> str:
    r"""Return the content of the last `\boxed{…}`; without one the last line that is not blank; or an empty text."""
    answer = last_boxed(response)
    if answer is not None:
        return answer
    lines = [line for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def normalise_answer(answer: str) -> str:
    """Remove enclosing dollar signs and a full stop at the end, and reduce white space to single blanks."""
    words = " ".join(answer.split()).removesuffix(".")
    while len(words) > 1 and words[0] == words[-1] == "$":
        words = words[1:-1]
    return words.strip()
