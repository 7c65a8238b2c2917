"""Reward functions, good and bad, for worker processes."""

import ctypes
import os
import subprocess
import sys
import time
from typing import Any


def length(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> float:
    return len(response) + extra.get("bonus", 0)


def whole(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> str:
    return f"{prompt}|{response}|{answer}"


def misbehave(prompt: str, response: str, answer: str, extra: dict[str, Any]) -> Any:
    """What the response says."""
    return {
        "fine": lambda: 1,
        "raise": lambda: 1 / 0,
        "sleep": lambda: time.sleep(600),
        "in C": lambda: ctypes.PyDLL(None).sleep(600),  # holds the interpreter's lock: no signal handler runs
        "nan": lambda: float("nan"),
        "inf": lambda: float("-inf"),
        "text": lambda: "1.0",
        "nothing": lambda: None,
        "exit": lambda: sys.exit(3),
        "crash": lambda: os.kill(os.getpid(), 11),
        "print": lambda: print("a reward's own words") or 2.0,
        "child": lambda: subprocess.Popen(["sleep", f"600.{os.getppid()}"]) and time.sleep(600),
        "pid": lambda: os.getpid(),
        "true": lambda: True,
    }[response]()


NUMBER = 3
