"""An environment that hangs, crashes or answers nonsense costs its sample and a line, and nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_bai.environments import Conversation, Reply, parse_reply
from megatron_bai.environments.worker_target import make_target
from megatron_bai.errors import UserError
from megatron_bai.workers.outcomes import Outcome
from megatron_bai.workers.pool import WorkerPool

HERE = Path(__file__).parent
SAID = Reply(({"role": "tool", "content": "hello 2 15"},))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=":")
    monkeypatch.setenv("TESTER", str(os.getpid()))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=":")
        patch.setenv("TESTER", str(os.getpid()))
        target = make_target("environment_classes:Misbehaving", {"greeting": "hello"})
        with WorkerPool(target, 2, 60.0, tmp_path_factory.mktemp("pool") / "environment.log") as running:
            yield running


def ask(pool: WorkerPool, *turns: str) -> list[Outcome]:
    """Submit one conversation a turn, all at once."""
    futures = [pool.submit([conversation(turn).to_json()]) for turn in turns]
    return [future.result(120) for future in futures]


def conversation(turn: str) -> Conversation:
    messages = ({"role": "user", "content": "a prompt"}, {"role": "assistant", "content": turn})
    return Conversation(messages, "15", {"source": "é"}, None, 2)


def test_replies_come_back_as_the_environment_made_them(pool: WorkerPool) -> None:
    said, ended = ask(pool, "say", "end")
    assert parse_reply(said.value) == SAID
    assert parse_reply(ended.value) == Reply((), True, 0.5, {"seen": {"source": "é"}})


@pytest.mark.parametrize(
    ("turn", "failure"),
    [
        ("raise", "ZeroDivisionError: division by zero"),
        ("crash", "it ended its process (-11)"),
        ("exit", "SystemExit: 3"),
        ("closed pipes", "it ended its process (-9: killed, or it closed its pipes)"),
        ("10 MB", "it returned 10,000,"),
        ("no UTF-8", "it returned a Reply: its messages are not a list of {'role', 'content'} with a text each"),
        ("no UTF-8 in its state", "it returned a text that is no UTF-8"),
        ("bytes", "it returned a Reply: its messages are not a list of {'role', 'content'} with a text each"),
        ("nan", "it returned a Reply: its reward is nan, which no float32 holds"),
        (
            "nan in its state",
            "it returned what is no JSON: ValueError: Out of range float values",
        ),
        ("deep", "it returned what is no JSON: RecursionError: maximum recursion depth exceeded"),
        ("nothing", "it returned a NoneType, no Reply"),
        ("no message", "it returned a Reply: it has no message and is not done: the model would be asked again"),
        ("assistant", "it returned a Reply: its messages are not a list of {'role', 'content'} with a text each"),
        ("a state", "it returned what is no JSON: TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_a_failure_costs_its_sample_and_a_line(pool: WorkerPool, turn: str, failure: str) -> None:
    first, failed, last = ask(pool, "say", turn, "say")
    assert failed.value is None and failed.failure.startswith(failure) and "\n" not in failed.failure
    assert parse_reply(first.value) == parse_reply(last.value) == SAID


def test_a_child_that_it_forks_answers_nothing(pool: WorkerPool) -> None:
    """The child has no pipe: what it returns is nobody's reply, and the next one is its own."""
    assert [parse_reply(each.value).messages[0]["content"] for each in ask(pool, "fork", "say")] == [
        "two",
        "hello 2 15",
    ]


@pytest.mark.parametrize("turn", ["hang", "left behind"])
def test_a_hang_is_killed_with_all_it_started(pool: WorkerPool, turn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(pool, "say", "say")
    monkeypatch.setattr(pool, "timeout_s", 0.5)
    assert ask(pool, turn) == [Outcome(failure="it took longer than env.timeout_s=0.5 s")]
    monkeypatch.setattr(pool, "timeout_s", 60.0)
    assert parse_reply(ask(pool, "say")[0].value) == SAID
    sleeper = ["sleep", f"600.{os.getpid()}"]
    assert not [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == sleeper]


def test_a_file_is_a_class_too_and_its_arguments_are_its_own_choice(tmp_path: Path) -> None:
    file = HERE / "environment_classes.py"
    for settings in (None, {"greeting": "hello"}):
        with WorkerPool(make_target(f"{file}:WithoutSettings", settings), 1, 60.0, tmp_path / "log") as pool:
            assert parse_reply(ask(pool, "say")[0].value).messages[0]["content"] == "hello"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:C", "No module named 'no_such_module'"),
        ("/nowhere/file.py:C", "No such file or directory"),
        ("environment_classes:say", "is a function and no class with a method respond"),
        ("environment_classes:Any", "is a .* and no class with a method respond"),
    ],
)
def test_what_is_no_environment_is_named_at_the_start(tmp_path: Path, name: str, reason: str) -> None:
    with (
        pytest.raises(UserError, match=f"the environment {name} cannot be started: .*{reason}"),
        WorkerPool(make_target(name, {}), 1, 60.0, tmp_path / "log"),
    ):
        pass
