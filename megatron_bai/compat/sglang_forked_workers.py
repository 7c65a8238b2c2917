"""Fork a server's workers in place of spawning them.

Symptom: each of a server's three processes imports SGLang, torch and transformers for itself, seven seconds of a core:
most of the time until a small server answers.

Upstream: srt/entrypoints/engine.py `_set_envs_and_config` chooses multiprocessing's spawn method, as CUDA needs: a
context does not outlive a fork. On a CPU there is none, and nothing but imports has happened when workers are started.

What it does: chooses fork. A worker asks the kernel to be killed with its parent before it does anything else, as those
spawned do in `rollout/servers/server_main.py`.

Can go: when upstream lets the method be chosen.
"""

import functools
import multiprocessing
import threading
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch, after_import
from megatron_bai.utils.child_processes import set_forks_die_with_parent


def install() -> None:
    """Choose fork in a process that starts workers."""

    def replace(module: Any) -> None:
        upstream = module._set_envs_and_config

        @functools.wraps(upstream)
        def set_envs_and_config(*arguments: Any, **named: Any) -> None:
            upstream(*arguments, **named)
            others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
            assert not others, f"a fork would lose the threads {others}"
            multiprocessing.set_start_method("fork", force=True)
            set_forks_die_with_parent(True)

        module._set_envs_and_config = set_envs_and_config

    after_import("sglang.srt.entrypoints.engine", replace)


PATCH = Patch(
    name="sglang_forked_workers",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="each process of a server imports everything again: seconds of each core at its start",
    install=install,
)
