"""The table of releases: which of each engine this package is written for, and how others that it meets differ.

No other module names a release. Compatibility fixes and the checks before replay hold for the installed one alone. A
server that somebody else started may be of another, which is told what it understands, or refused with the reason:
nothing else would show that its routes are somebody else's, or that a field it was sent is ignored.
"""

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

MEGATRON_CORE = "0.16.1"  # its router is what routing replay binds to
SGLANG = "0.5.21"  # fixed for a CPU, and the one that servers of a run's own must be


@dataclass(frozen=True)
class SGLangRelease:
    """What is particular to a release of SGLang that a running server may be of.

    Attributes:
        needs_update_session: tensors are taken only between /begin_weight_update and /end_weight_update.
    """

    needs_update_session: bool = True


SERVERS = {
    "0.5.19": SGLangRelease(needs_update_session=False),
    "0.5.20": SGLangRelease(needs_update_session=False),
    SGLANG: SGLangRelease(),
}
# What is wrong with releases of SGLang before the one named, for those that look behind the times.
_FAULTS = (
    ("0.5.16", "its overlap schedule gives requests each other's routes (SGLang #34319)"),
    ("0.5.19", "its replies do not say which weights a token was sampled with (weight_versions)"),
)


def server_fault(found: str | None) -> str:
    """Say why a release of SGLang that is not among `SERVERS` is refused, as the end of a sentence."""
    try:
        version = Version(found or "")
    except InvalidVersion:
        return ", which is no release"
    fault = next((fault for before, fault in _FAULTS if version < Version(before)), "no one has tried it")
    return f", and {fault}"
