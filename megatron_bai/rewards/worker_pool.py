"""Worker processes for reward functions."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron_bai.rewards.reward import Score
from megatron_bai.workers import pool
from megatron_bai.workers.outcomes import Outcome, Target, map_future, wait_for_all


class RewardPool(pool.WorkerPool):
    """Calls one function on many samples, in up to `workers` processes.

    Args:
        function: `module:function`.
        settings: what it takes as its last argument; None: nothing.
        workers: processes.
        timeout_s: of one sample.
        log: where what it prints is appended.
    """

    def __init__(self, function: str, settings: dict[str, Any] | None, workers: int, timeout_s: float, log: Path):
        opener = "megatron_bai.rewards.worker_target:open_function"
        target = Target(opener, function, settings, f"the reward {function}", "reward.timeout_s")
        super().__init__(target, workers, timeout_s, log)

    def submit_score(self, arguments: list[Any]) -> "Future[Score]":
        """Return a future of the score of one sample, as `submit` does.

        Args:
            arguments: of the function: prompt, response, answer, extra.
        """
        return map_future(self.submit(arguments), _make_score)

    def scores(self, arguments: list[list[Any]]) -> list[Score]:
        """Return one score for each list of arguments, in their order.

        Raises:
            UserError: a worker could not be started again.
        """
        return wait_for_all([self.submit_score(each) for each in arguments])


def _make_score(outcome: Outcome) -> Score:
    return Score(None, outcome.failure) if outcome.failure else Score(outcome.value)


WorkerPool = RewardPool  # what it was called until environments had workers, too
