"""The table of releases: which of each engine this package is written for, and how other releases of a server differ.

No other module names a release. Compatibility fixes and the checks before replay hold for the installed release
alone. A server that the run did not start may be of another: it is sent what that release understands, or refused with
the reason, since no error would show that its replies hold another request's routes or that it ignores a field.
"""

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

MEGATRON_CORE = "0.16.1"  # its router is what routing replay binds to
SGLANG = "0.5.21"  # fixed for a CPU, and the one that servers of a run's own must be


@dataclass(frozen=True)
class SGLangRelease:
    """The differences of a release of SGLang that a running server may be of.

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


def server_fault(release: str | None) -> str:
    """Return why a release of SGLang that is not among `SERVERS` is refused, as the end of a sentence."""
    try:
        version = Version(release or "")
    except InvalidVersion:
        return ", which is no release"
    fault = next((fault for before, fault in _FAULTS if version < Version(before)), "no one has tried it")
    return f", and {fault}"
