"""A reward function that raises, hangs or returns nonsense costs its sample, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rewards import Score, score_samples
from megatron_bai.rewards.worker_pool import RewardPool
from megatron_bai.rollout.sample import Sample

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=":")
    monkeypatch.setenv("TESTER", str(os.getpid()))


def sleepers() -> list[psutil.Process]:
    """Processes that `sleeping_child` started, of this test."""
    wanted = ["sleep", f"600.{os.getpid()}"]
    return [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == wanted]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool") / "reward.log"


@pytest.fixture(scope="module")
def pool(log: Path) -> Iterator[RewardPool]:
    """Two workers with time enough to answer; a test that wants one to hang shortens it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=":")
        patch.setenv("TESTER", str(os.getpid()))
        with RewardPool("functions:misbehave", None, 2, 60.0, log) as running:
            yield running


def ask(*responses: str) -> list[list[object]]:
    return [["a prompt", response, "an answer", {}] for response in responses]


def test_rewards_come_in_the_order_of_the_samples(pool: RewardPool) -> None:
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
        ("input", "EOFError: EOF when reading a line"),
        ("1e39", "it returned 1e+39, which is too large for a reward, a float32 (up to 3.4e38)"),
        ("10**400", f"it returned 1{'0' * 99}…, which is too large for a reward, a float32 (up to 3.4e38)"),
        ("10**5000", "it returned a number of 16610 bits, which is too large for a reward, a float32 (up to 3.4e38)"),
        ("array", "it returned array([1.]), a ndarray"),
        ("decimal nan", "it returned Decimal('sNaN')"),
        ("complex", "it returned 1j, a complex"),
        ("tuple", "it returned (1.0, 'well\\ndone'), a tuple"),
        ("half a pair", "ValueError: \\ud800 is no text"),
        ("long", "ValueError: " + "x " * 144),
        ("no message", "UnreadableError, whose message cannot be read"),
        ("interrupt", "KeyboardInterrupt:"),
        ("unheard of", "KeyError: 'unheard of'"),
    ],
)
def test_a_failure_costs_its_sample_alone(pool: RewardPool, response: str, failure: str) -> None:
    found = pool.scores(ask("fine", response, "fine", "fine"))
    assert found == [Score(1.0), Score(None, failure.strip()), Score(1.0), Score(1.0)]


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("closed pipes", "it ended its process (-9: killed, or it closed its pipes)"),
        ("10 MB", "it answered more than 1,048,576 bytes"),
        ("endless line", "it answered more than 1,048,576 bytes"),
        ("latin-1", "it answered what is no UTF-8"),
        ("no JSON", "it answered what is no reply"),
        ("of another call", "it answered another call than its own"),
        ("two replies", "it answered what it was not asked"),
    ],
)
def test_what_is_written_to_the_pipe_behind_the_workers_back_is_never_a_reward(
    log: Path, response: str, failure: str
) -> None:
    """The line is read to its limit and no further, and no other sample gets it."""
    with RewardPool("functions:misbehave", None, 1, 60.0, log) as pool:
        assert pool.scores(ask(response, "fine")) == [Score(None, failure), Score(1.0)]


def test_a_sample_is_scored_while_others_are_sampled_and_a_cancelled_one_is_not(pool: RewardPool, log: Path) -> None:
    first = pool.submit_score(*ask("fine"))
    assert first.result(60) == Score(1.0)
    with RewardPool("functions:misbehave", None, 1, 60.0, log) as single:
        busy, waiting, last = single.submit(*ask("sleep")), *map(single.submit_score, ask("print", "fine"))
        while not busy.running():
            time.sleep(0.01)
        assert waiting.cancel() and not last.done()
    assert busy.result().failure == "its process was ended: the pool has ended" and last.cancelled()
    with pytest.raises(RuntimeError, match="has ended"):
        single.submit_score(*ask("fine"))


@pytest.mark.parametrize(
    ("response", "value"),
    [("float64", 0.5), ("int8", 3.0), ("bool_", 1.0), ("scalar array", 0.25), ("decimal", 0.5), ("fraction", 0.25)],
)
def test_every_kind_of_number_is_a_reward(pool: RewardPool, response: str, value: float) -> None:
    assert pool.scores(ask(response)) == [Score(value)]


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("program's input", 1.0),  # it finds the end of its input at once
        ("ranks", 0.0),
        ("descriptors", 0.0),
        ("fork", 0.0),
        ("raw print", 2.0),
        ("surrogate print", 2.0),
        ("signals", 0.0),
        ("closed stdout", 2.0),
    ],
)
def test_a_reward_has_nothing_of_the_trainers(
    log: Path, response: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with RewardPool("functions:misbehave", None, 1, 60.0, log) as pool:
            assert pool.scores(ask(response, "fine")) == [Score(value), Score(1.0)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_a_reward_from_outside_that_float32_cannot_hold_is_named_with_its_prompt() -> None:
    prompts = [Prompt([1], f"what\n{i}", "") for i in range(2)]
    tokenizer = SimpleNamespace(decode=lambda ids: "half \ud800")
    samples = [Sample(i, np.arange(3), 1, np.zeros(2), np.zeros((2, 1, 1)), (), "stop") for i in (0, 1)]
    texts: list[str] = []

    def score(items: list[Any]) -> list[Score]:
        texts.extend(item.response for item in items)
        return [Score(1e39), Score(1.0)]

    found = score_samples(score, SimpleNamespace(tokenizer=tokenizer, end_tokens={0}), prompts, samples)
    assert (found[0].reward, found[1].reward) == (None, 1.0)
    assert found[0].failure.startswith("it is 1e+39, which is too large") and r"(prompt 'what\n0')" in found[0].failure
    assert texts == ["half ?"] * 2


@pytest.mark.parametrize("response", ["sleep", "in C", "child", "session", "daemon"])
def test_a_hang_is_killed_with_all_it_started(pool: RewardPool, response: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.scores(ask("fine", "fine"))
    monkeypatch.setattr(pool, "timeout_s", 0.5)
    stuck = pool.scores(ask(response))
    assert stuck == [Score(None, "it took longer than reward.timeout_s=0.5 s")]
    monkeypatch.setattr(pool, "timeout_s", 60.0)
    assert pool.scores(ask("fine", "fine", "fine")) == [Score(1.0)] * 3  # with a worker in the place of the killed one
    assert not sleepers()


@pytest.mark.parametrize("response", ["left behind", "left by a crash"])
def test_what_a_function_leaves_behind_ends_with_its_process(log: Path, response: str) -> None:
    with RewardPool("functions:misbehave", None, 1, 60.0, log) as pool:
        (score,) = pool.scores(ask(response))
        crashed = response == "left by a crash"
        assert score == (Score(None, "it ended its process (-11)") if crashed else Score(1.0))
        assert bool(sleepers()) is not crashed
    assert not sleepers()


KILLED = """
import sys
from pathlib import Path
from megatron_bai.rewards.worker_pool import RewardPool
with RewardPool("functions:misbehave", None, 1, 600.0, Path(sys.argv[1])) as pool:
    pool.scores([["a prompt", sys.argv[2], "an answer", {}]])
    print("scored", flush=True)
    input()
"""


@pytest.mark.parametrize("response", ["left behind", "daemon", "session"])
def test_a_trainer_that_is_killed_leaves_no_process_of_a_reward(log: Path, response: str) -> None:
    command = [sys.executable, "-c", KILLED, str(log), response]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        while not sleepers():
            assert trainer.poll() is None
        trainer.kill()
    _, alive = psutil.wait_procs(sleepers(), timeout=60)
    assert not alive


def test_what_a_function_prints_goes_to_the_log(pool: RewardPool, log: Path) -> None:
    assert pool.scores(ask("print")) == [Score(2.0)] and "a reward's own words" in log.read_text()


def test_several_workers_share_the_samples_and_end_with_the_block(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEETING", str(tmp_path))
    with RewardPool("functions:misbehave", None, 2, 60.0, log) as pool:
        pids = {int(score.value) for score in pool.scores(ask("meet", "meet", *["pid"] * 40))}
        assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_a_function_gets_the_texts_and_the_rows_other_columns(log: Path) -> None:
    long = "é\n" * 200_000  # more than a pipe holds
    with RewardPool("functions:length", None, 1, 60.0, log) as pool:
        assert pool.scores([["p", long, "a", {"bonus": 5}]]) == [Score(400_005.0)]
    with RewardPool("functions:whole", None, 1, 60.0, log) as pool:
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
        RewardPool(function, None, 1, 1.0, log).__enter__()
