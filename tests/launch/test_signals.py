"""Ranks agree on what any of them was asked by a signal, and say in one line that another is gone."""

import json
import os
import re
import signal

import pytest
from processes import TESTS, launch

from megatron_bai.errors import from_peer_error
from megatron_bai.rl.signals import handle_signals


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("signals")
    launch(TESTS / "launch" / "signals_worker.py", directory)
    return json.loads((directory / "found.json").read_text())


@pytest.mark.distributed
def test_what_one_rank_is_asked_all_do_after_the_same_step(outcome: dict) -> None:
    nothing, save, stop = [False, False], [True, False], [True, True]
    assert outcome["found"][0] == outcome["found"][1] == [nothing, save, nothing, stop, stop]
    assert outcome["codes"][:2] == [0, 0]


@pytest.mark.distributed
def test_a_step_that_does_not_end_in_time_is_given_up(outcome: dict) -> None:
    assert (outcome["codes"][2], outcome["found"][2]) == (128 + signal.SIGTERM, "unwound")


@pytest.mark.distributed
def test_another_process_that_is_gone_or_silent_is_one_line(outcome: dict) -> None:
    gone, silent = outcome["found"][3], outcome["found"][5]
    known = r"another process of the run ended or cannot be reached \((.*)\): see its log\. The same command goes on .*"
    assert re.fullmatch(r"(Read error|Connection closed).*", re.fullmatch(known, gone)[1]) and "typically" not in gone
    assert re.fullmatch(known, silent)[1] == "it did not answer within 0.5 s, backend.timeout_s"
    assert from_peer_error(RuntimeError("a bug")) is None


def test_no_grace_leaves_sigterm_alone_and_nothing_stays_behind() -> None:
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    before = [signal.getsignal(number) for number in signals]
    with handle_signals(grace_s=0):
        assert signal.getsignal(signal.SIGTERM) is before[0]
        os.kill(os.getpid(), signal.SIGUSR1)  # would end this process
    with handle_signals(grace_s=60):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in signals] == before
