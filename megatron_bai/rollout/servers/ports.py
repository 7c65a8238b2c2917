"""Ports of servers on this machine: found free, and reserved until the server that was started listens.

A server listens half a minute after its port was chosen. Until then the port looks free to everyone else, so it is
reserved among the runs of a machine by a Unix socket in Linux's abstract namespace: it has no file to clean up, ends
with the process that holds it, and is seen wherever the port would be (both belong to the network namespace).
"""

import errno
import random
import socket

from megatron_bai.errors import UserError

_PORTS = range(20000, 32768)  # Linux gives out those from 32768 on
_ATTEMPTS = 100


class PortReservation:
    """A port that no other run of this machine chooses until `release`, or until this process ends."""

    def __init__(self, port: int, holder: socket.socket):
        self.port, self._holder = port, holder

    def release(self) -> None:
        """Let others choose the port. A second call does nothing."""
        self._holder.close()


def require_local_address(setting: str, host: str, port: int = 0) -> None:
    """Refuse an address at which this machine cannot listen.

    Args:
        setting: named in the error.
        host: name or IPv4 address.
        port: to try; 0: any.

    Raises:
        UserError: the name is unknown, the address is another machine's, or the port is in use.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"rollout.port={port} is in use by another run or program: choose another port, or 0 for a free one"
            ) from None
        reason = getattr(error, "strerror", None) or "it is no host's name"
        raise UserError(f"{setting}={host} is no address of this machine: {reason}") from None


def reserve_port(host: str, wanted: int) -> PortReservation:
    """Reserve `wanted`, or a free port where it is 0.

    Args:
        host: the address that the server will listen at.
        wanted: a port, 0 for any below those that the system gives to connections.

    Raises:
        UserError: it is in use, or another run has reserved it.
    """
    for port in [wanted] if wanted else random.SystemRandom().sample(_PORTS, _ATTEMPTS):
        try:
            return _try_to_reserve(host, port)
        except OSError as error:
            failure = error
    reason = failure.strerror
    if failure.errno == errno.EADDRINUSE:
        reason = f"{reason}, by another run or program: choose another port, or 0 for a free one"
    raise UserError(f"rollout.host={host} rollout.port={wanted} cannot be used: {reason}") from failure


def _try_to_reserve(host: str, port: int) -> PortReservation:
    """Reserve one port; raise OSError where it is taken."""
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0megatron_bai/port/{port}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        holder.close()
        raise
    return PortReservation(port, holder)
