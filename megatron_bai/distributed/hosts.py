"""The hosts of a run: whether there are several, and the address by which the others reach this one."""

import ipaddress
import os
import socket
from urllib.parse import urlsplit

import psutil

from megatron_bai.errors import UserError


def is_multi_host() -> bool:
    """Return whether torchrun started this process as one of a run on more than one host."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1


def is_loopback(host: str) -> bool:
    """Return whether a name or an address means this host alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_loopback_url(url: str) -> bool:
    """Return whether an address such as `http://127.0.0.1:30000` means a server on this host alone."""
    return is_loopback(urlsplit(url).hostname or "")


def host_address() -> str:
    """Return this host's address on its route to the run's master; loopback where the run has one host.

    Raises:
        UserError: there is no route, or the master's name means loopback here.
    """
    if not is_multi_host():
        return "127.0.0.1"
    head = os.environ["MASTER_ADDR"]
    try:
        family, socket_type, _, _, destination = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket_type) as probe:  # nothing is sent
            probe.connect(destination)
            address: str = probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"no way from {socket.gethostname()} to {head}, where the run meets: {error}") from error
    if ipaddress.ip_address(destination[0]).is_loopback:
        raise UserError(
            f"{socket.gethostname()} knows {head}, where the run meets, as {destination[0]}, which other machines "
            "cannot reach: start the run with the address instead (launch/torchrun.sh --head)"
        )
    return address


def set_network_interface() -> None:
    """Make gloo and NCCL use the interface of `host_address`; to be called before any process group is made.

    By themselves gloo takes the interface that the host name resolves to, loopback on many hosts, Debian's among them,
    and NCCL the first of some that it finds. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are left alone where they are
    set; NCCL's is gloo's where that alone is.

    Raises:
        UserError: as `host_address`.
    """
    if not is_multi_host():
        return
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        address = host_address()
        for name, addresses in psutil.net_if_addrs().items():
            if any(known.address.partition("%")[0] == address for known in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=" all that begin so
