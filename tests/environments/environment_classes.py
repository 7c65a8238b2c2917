"""Environments, good and bad, for worker processes."""

import os
import subprocess
import sys
import time
from typing import Any

from megatron_bai.environments import Conversation, Reply


class Misbehaving:
    """Does what the last turn says."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def respond(self, conversation: Conversation) -> Any:
        return {
            "say": lambda: say(f"{self.settings.greeting} {conversation.num_turns} {conversation.answer}"),
            "end": lambda: Reply(done=True, reward=0.5, state={"seen": conversation.extra}),
            "hang": lambda: time.sleep(600),
            "raise": lambda: 1 / 0,
            "crash": lambda: os.kill(os.getpid(), 11),
            "exit": lambda: sys.exit(3),
            "fork": lambda: os.fork() and say("two"),
            "left behind": lambda: subprocess.Popen(["sleep", f"600.{os.environ['TESTER']}"]) and time.sleep(600),
            "closed pipes": lambda: os.closerange(3, 64) or say("unheard"),
            "10 MB": lambda: say("x" * 10_000_000),
            "no UTF-8": lambda: say("half \ud800"),
            "no UTF-8 in its state": lambda: Reply(say("a").messages, state="half \ud800"),
            "bytes": lambda: say(b"\xff"),
            "nan": lambda: Reply(done=True, reward=float("nan")),
            "nan in its state": lambda: Reply(done=True, state=float("nan")),
            "deep": lambda: Reply(done=True, state=nest(100_000)),
            "nothing": lambda: None,
            "no message": lambda: Reply(),
            "assistant": lambda: Reply(({"role": "assistant", "content": "I"},)),
            "a state": lambda: Reply(say("a").messages, state=object()),
        }[conversation.messages[-1]["content"]]()


class WithoutSettings:
    def respond(self, conversation: Conversation) -> Reply:
        return say("hello")


def say(text: Any) -> Reply:
    return Reply(({"role": "tool", "content": text},))


def nest(depth: int) -> list[Any]:
    outer: list[Any] = []
    for _ in range(depth):
        outer = [outer]
    return outer
