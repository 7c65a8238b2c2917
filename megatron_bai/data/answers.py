"""The final answer in a response, and when two answers are the same text."""

import re

_BOXED = re.compile(r"\\boxed\s*\{")


def boxed(response: str) -> str | None:
    r"""What the last whole `\boxed{…}` holds, braces balanced; None where there is none."""
    for found in reversed(list(_BOXED.finditer(response))):
        depth = 1
        for end in range(found.end(), len(response)):
            depth += {"{": 1, "}": -1}.get(response[end], 0)
            if not depth:
                return response[found.end() : end]
    return None


def final(response: str) -> str:
    r"""What the last `\boxed{…}` holds; without one the last line that is not blank; or nothing."""
    answer = boxed(response)
    if answer is not None:
        return answer
    lines = [line for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def normalised(answer: str) -> str:
    """Without enclosing dollar signs, a full stop at the end, and any difference in white space."""
    words = " ".join(answer.split()).removesuffix(".")
    while len(words) > 1 and words[0] == words[-1] == "$":
        words = words[1:-1]
    return words.strip()
