"""Releases of SGLang: which ones this package talks to, and what each is told differently.

A server says which release it is (`/server_info`). One that is not in the table is refused by name, with the reason
where it is known: nothing else would show that its routes are somebody else's, or that a field it was sent is ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import control


@dataclass(frozen=True)
class Release:
    """What is particular to one.

    Attributes:
        weight_session: tensors are taken only between /begin_weight_update and /end_weight_update.
    """

    weight_session: bool = True


PINNED = "0.5.21"  # installed by this package, patched for a CPU, and the one that servers of a run's own must be
KNOWN = {
    "0.5.19": Release(weight_session=False),
    "0.5.20": Release(weight_session=False),
    "0.5.21": Release(),
}
# Of the releases before the version named, for those that look behind the times.
_FAULTS = (
    ("0.5.16", "its overlap schedule gives requests each other's routes (SGLang #34319)"),
    ("0.5.19", "its replies do not say which weights a token was sampled with (weight_versions)"),
)
# Settings of a running server, by name, that rollouts need, and others under which routes were wrong or not tried.
_NEEDED = {"enable_return_routed_experts": "--enable-return-routed-experts"}
_SEEDED = {"enable_deterministic_inference": "--enable-deterministic-inference"}
_BARRED = {
    "speculative_algorithm": "--speculative-algorithm",
    "enable_hierarchical_cache": "--enable-hierarchical-cache",
    "enable_dp_attention": "--enable-dp-attention",
}


def require_pinned(found: str | None, where: str) -> None:
    """Refuse another release for a server of ours: its flags, and on a CPU its patches, are for this one.

    Raises:
        UserError: names both.
    """
    if found != PINNED:
        raise UserError(f"SGLang {found or '(none)'} {where}; this package needs sglang=={PINNED}")


def known(found: str | None, where: str) -> Release:
    """What is particular to a release.

    Raises:
        UserError: it is not in the table; names it and what is wrong with it.
    """
    if found in KNOWN:
        return KNOWN[found]
    raise UserError(f"SGLang {found or '(none)'} {where}{_fault(found)}: use one of {', '.join(KNOWN)}")


def _fault(found: str | None) -> str:
    try:
        version = Version(found or "")
    except InvalidVersion:
        return ", which is no release"
    fault = next((fault for before, fault in _FAULTS if version < Version(before)), "no one has tried it")
    return f", and {fault}"


def releases(urls: Sequence[str]) -> dict[str, Release]:
    """Of running servers, by URL.

    Raises:
        UserError: one does not answer, or is not in the table.
    """
    return {url: known(control.get(url, "/server_info").get("version"), f"answers at {url}") for url in urls}


def check(url: str, info: dict[str, Any], deterministic: bool) -> None:
    """Refuse a running server that cannot do what rollouts ask.

    Args:
        info: what it says of itself.
        deterministic: samples have seeds.

    Raises:
        UserError: names the server and the flag.
    """
    known(info.get("version"), f"answers at {url}")
    needed = _NEEDED | (_SEEDED if deterministic else {})
    if missing := [flag for name, flag in needed.items() if not info.get(name)]:
        raise UserError(f"the server at {url} was started without {' and '.join(missing)}, which rollouts need")
    if barred := [flag for name, flag in _BARRED.items() if info.get(name)]:
        raise UserError(f"the server at {url} was started with {' and '.join(barred)}, under which routes may be wrong")
    if info.get("dp_size", 1) != 1:
        raise UserError(f"the server at {url} has --dp-size {info['dp_size']}: start {info['dp_size']} servers")
