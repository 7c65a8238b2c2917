"""The machines of a run: whether there are several, and how the others reach this one."""

import ipaddress
import os
import socket

import psutil

from megatron_bai.errors import UserError


def is_multi_host() -> bool:
    """Whether torchrun started this process as one of a run on more than one machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_address() -> str:
    """This machine's address on the way to the one where the run meets; loopback where it is alone.

    Raises:
        UserError: there is no way, or the meeting place's name means loopback here.
    """
    if not is_multi_host():
        return "127.0.0.1"
    head = os.environ["MASTER_ADDR"]
    try:
        family, kind, _, _, place = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # nothing is sent
            probe.connect(place)
            address: str = probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"no way from {socket.gethostname()} to {head}, where the run meets: {error}") from error
    if ipaddress.ip_address(place[0]).is_loopback:
        raise UserError(
            f"{socket.gethostname()} knows {head}, where the run meets, as {place[0]}, which other machines cannot "
            "reach: start the run with the address instead (launch/torchrun.sh --head)"
        )
    return address


def set_gloo_interface() -> None:
    """Have gloo use the interface of `host_address`. Before any process group is made.

    By itself gloo takes the one that the host name stands for: loopback on many machines, Debian's among them. Who set
    GLOO_SOCKET_IFNAME, torch's own variable, has chosen.

    Raises:
        UserError: as `host_address`.
    """
    if not is_multi_host() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = host_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
