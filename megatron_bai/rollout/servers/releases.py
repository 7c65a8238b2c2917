"""Checks of running SGLang servers: their release, and the flags they were started with.

A server reports its release (`/server_info`). The table of releases is `megatron_bai/compat/releases.py`.
"""

from collections.abc import Sequence
from typing import Any

from megatron_bai.compat.releases import SERVERS, SGLANG, SGLangRelease, server_fault
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import control

# Settings of a running server, by name, that rollouts need, and others under which routes were wrong or not tried.
_REQUIRED_FLAGS = {"enable_return_routed_experts": "--enable-return-routed-experts"}
_SEED_FLAGS = {"enable_deterministic_inference": "--enable-deterministic-inference"}
_FORBIDDEN_FLAGS = {
    "speculative_algorithm": "--speculative-algorithm",
    "enable_hierarchical_cache": "--enable-hierarchical-cache",
    "enable_dp_attention": "--enable-dp-attention",
}


def require_pinned(found: str | None, where: str) -> None:
    """Refuse another release for servers that a run starts: flags and, on a CPU, fixes are for the pinned one.

    Args:
        found: the release; None: none was found.
        where: ends the phrase "SGLang X …" in the error.

    Raises:
        UserError: names both.
    """
    if found != SGLANG:
        raise UserError(f"SGLang {found or '(none)'} {where}; this package needs sglang=={SGLANG}")


def release_of(found: str | None, where: str) -> SGLangRelease:
    """Return the table's entry of a release.

    Args:
        found: the release; None: none was found.
        where: ends the phrase "SGLang X …" in an error.

    Raises:
        UserError: it is not in the table; names it and what is wrong with it.
    """
    if found in SERVERS:
        return SERVERS[found]
    raise UserError(f"SGLang {found or '(none)'} {where}{server_fault(found)}: use one of {', '.join(SERVERS)}")


def releases(urls: Sequence[str]) -> dict[str, SGLangRelease]:
    """Return the releases of running servers, by URL.

    Raises:
        UserError: one does not answer, or is not in the table.
    """
    return {url: release_of(control.get(url, "/server_info").get("version"), f"answers at {url}") for url in urls}


def check_server_info(url: str, info: dict[str, Any], deterministic: bool) -> None:
    """Refuse a running server that cannot do what rollouts need.

    Args:
        url: of the server.
        info: its `/server_info`.
        deterministic: whether samples have seeds.

    Raises:
        UserError: names the server and the flag.
    """
    release_of(info.get("version"), f"answers at {url}")
    needed = _REQUIRED_FLAGS | (_SEED_FLAGS if deterministic else {})
    if missing := [flag for name, flag in needed.items() if not info.get(name)]:
        raise UserError(f"the server at {url} was started without {' and '.join(missing)}, which rollouts need")
    if barred := [flag for name, flag in _FORBIDDEN_FLAGS.items() if info.get(name)]:
        raise UserError(f"the server at {url} was started with {' and '.join(barred)}, under which routes may be wrong")
    if info.get("dp_size", 1) != 1:
        raise UserError(f"the server at {url} has --dp-size {info['dp_size']}: start {info['dp_size']} servers")
