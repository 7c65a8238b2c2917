"""A reward of your own: 1 for the right last line, less what the response is too long.

PYTHONPATH=examples megatron-bai train … reward=function reward.function=concise_reward:concise
"""

from typing import Any

FREE, PER_CHARACTER, MOST = 200, 0.001, 0.5


def concise(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> float:
    """Return 1 where the last line ends in the answer, minus up to `MOST` for characters beyond `FREE`."""
    last = response.rstrip().rpartition("\n")[2]
    right = last.removesuffix(".").split()[-1:] == [answer]
    return float(right) - min(MOST, PER_CHARACTER * max(0, len(response) - FREE))
