"""The servers of a run, all with the same weights: started and supervised by us, or already running elsewhere."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout import access, control, versions
from megatron_bai.rollout.quantize import FORMATS
from megatron_bai.rollout.server import SGLangServer
from megatron_bai.rollout.sync import each

SYNCS = ("disk", "tensors", "group")


@dataclass(frozen=True)
class Fleet:
    """Where the servers are.

    Attributes:
        urls: of the servers, all of which take part in a weight sync.
        sizes: tensor-parallel ranks of each.
        ask: URLs that samples are asked of: the servers', or that of a router in front of them.
    """

    urls: list[str]
    sizes: list[int]
    ask: list[str]


def validate(rollout: Rollout) -> None:
    """Refuse settings of servers that contradict each other.

    Raises:
        UserError: names the setting.
    """
    for name in ("servers", "tensor", "sync_bucket_mib"):
        if getattr(rollout, name) < 1:
            raise UserError(f"rollout.{name} is {getattr(rollout, name)}: it must be at least 1")
    if rollout.quantize not in ("", *FORMATS):
        raise UserError(f"rollout.quantize is {rollout.quantize!r}: choose {' or '.join(FORMATS)}, or leave it empty")
    if rollout.sync not in SYNCS:
        raise UserError(f"rollout.sync is {rollout.sync!r}: choose {', '.join(SYNCS)}")
    if rollout.urls and (rollout.servers, rollout.tensor, rollout.port) != (1, 1, 0):
        raise UserError("rollout.urls names servers that run already: leave out rollout.servers, tensor and port")
    if rollout.router and not rollout.urls:
        raise UserError("rollout.router needs rollout.urls: weights go to the servers behind it, one by one")
    if len(set(rollout.urls)) < len(rollout.urls):
        raise UserError("rollout.urls names a server twice")
    access.check(rollout)


@contextmanager
def started(model_dir: Path, rollout: Rollout, logs: Path, device: str) -> Iterator[Fleet]:
    """Start `rollout.servers` servers on this machine, all at once; stop them however the block ends.

    Args:
        logs: directory of `server.log`, `server-1.log` and so on.

    Raises:
        UserError: one did not start.
    """
    with ExitStack() as stack:
        servers = []
        for i in range(rollout.servers):
            own = replace(rollout, port=rollout.port + i if rollout.port else 0)
            server = SGLangServer(model_dir, own, logs / (f"server-{i}.log" if i else "server.log"), device)
            stack.callback(server.stop)
            server.launch()
            servers.append(server)
        for server in servers:
            server.wait()
        urls = [server.url for server in servers]
        yield Fleet(urls, [rollout.tensor] * len(urls), urls)


def running(rollout: Rollout) -> Fleet:
    """The servers at `rollout.urls`, found to be able to do what a run asks of them.

    Raises:
        UserError: one does not answer, is another release, or was started without a flag that rollouts need.
    """
    urls = [url.rstrip("/") for url in rollout.urls]
    access.use_key(urls, rollout.api_key_file)
    found = each(urls, lambda url: control.get(url, "/server_info"))
    for url, info in zip(urls, found):
        versions.check(url, info, rollout.deterministic)
    ask = [rollout.router.rstrip("/")] if rollout.router else urls
    return Fleet(urls, [int(info.get("tp_size", 1)) for info in found], ask)
