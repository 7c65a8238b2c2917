"""A reward function that raises, hangs or returns nonsense costs its sample, and nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_bai.errors import UserError
from megatron_bai.rewards.reward import Score
from megatron_bai.rewards.worker_pool import WorkerPool

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=":")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool") / "reward.log"


@pytest.fixture(scope="module")
def pool(log: Path) -> Iterator[WorkerPool]:
    """Two workers with time enough to answer; a test that wants one to hang shortens it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=":")
        with WorkerPool("functions:misbehave", None, 2, 60.0, log) as running:
            yield running


def ask(*responses: str) -> list[list[object]]:
    return [["a prompt", response, "an answer", {}] for response in responses]


def test_rewards_come_in_the_order_of_the_samples(pool: WorkerPool) -> None:
    assert pool.scores(ask("fine", "true", "print", "fine")) == [Score(1.0), Score(1.0), Score(2.0), Score(1.0)]
    assert pool.scores([]) == []


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("raise", "ZeroDivisionError: division by zero"),
        ("nan", "it returned nan"),
        ("inf", "it returned -inf"),
        ("text", "it returned '1.0', a str"),
        ("nothing", "it returned None, a NoneType"),
        ("exit", "SystemExit: 3"),
        ("crash", "it ended its process (-11)"),
        ("unheard of", "KeyError: 'unheard of'"),
    ],
)
def test_a_failure_costs_its_sample_alone(pool: WorkerPool, response: str, failure: str) -> None:
    found = pool.scores(ask("fine", response, "fine", "fine"))
    assert found == [Score(1.0), Score(None, failure), Score(1.0), Score(1.0)]


@pytest.mark.parametrize("response", ["sleep", "in C", "child"])
def test_a_hang_is_killed_with_all_it_started(pool: WorkerPool, response: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.scores(ask("fine", "fine"))
    monkeypatch.setattr(pool, "timeout_s", 0.5)
    stuck = pool.scores(ask(response))
    assert stuck == [Score(None, "it took longer than reward.timeout_s=0.5 s")]
    monkeypatch.setattr(pool, "timeout_s", 60.0)
    assert pool.scores(ask("fine", "fine", "fine")) == [Score(1.0)] * 3  # with a worker in the place of the killed one
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", f"600.{os.getpid()}"]]


def test_what_a_function_prints_goes_to_the_log(pool: WorkerPool, log: Path) -> None:
    assert pool.scores(ask("print")) == [Score(2.0)] and "a reward's own words" in log.read_text()


def test_several_workers_share_the_samples_and_end_with_the_block(log: Path) -> None:
    with WorkerPool("functions:misbehave", None, 2, 60.0, log) as pool:
        pool._start_workers(2)
        pool._wait_until_ready()
        pids = {int(score.value) for score in pool.scores(ask(*["pid"] * 40))}
        assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_a_function_gets_the_texts_and_the_rows_other_columns(log: Path) -> None:
    long = "é\n" * 200_000  # more than a pipe holds
    with WorkerPool("functions:length", None, 1, 60.0, log) as pool:
        assert pool.scores([["p", long, "a", {"bonus": 5}]]) == [Score(400_005.0)]
    with WorkerPool("functions:whole", None, 1, 60.0, log) as pool:
        assert "'p|r|a', a str" in pool.scores([["p", "r", "a", {}]])[0].failure


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("functions:absent", "has no attribute 'absent'"),
        ("functions:NUMBER", "functions:NUMBER is a int and no function"),
    ],
)
def test_a_function_that_is_not_there_is_named_at_the_start(function: str, reason: str, log: Path) -> None:
    with pytest.raises(UserError, match=f"the reward {function} cannot be started: .*{reason}"):
        WorkerPool(function, None, 1, 1.0, log).__enter__()
