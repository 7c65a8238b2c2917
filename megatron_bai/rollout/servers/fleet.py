"""The servers of a run, all with the same weights: started and supervised by us, or already running elsewhere."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import auth, control, releases
from megatron_bai.rollout.servers.quantize import FORMATS
from megatron_bai.rollout.servers.sglang_server import SGLangServer
from megatron_bai.rollout.servers.weight_sync import on_all_servers

_log = logging.getLogger(__name__)
SYNCS = ("disk", "tensors", "group")
INCOMPLETE_GROUP_POLICIES = ("keep", "drop")
_HEALTH_S = 30.0  # for a word of a server's scheduler


@dataclass(frozen=True)
class FleetInfo:
    """Where the servers are.

    Attributes:
        urls: of the servers, all of which take part in a weight sync.
        tp_sizes: tensor-parallel ranks of each.
        sampling_urls: URLs that samples are asked of: the servers', or that of a router in front of them.
    """

    urls: list[str]
    tp_sizes: list[int]
    sampling_urls: list[str]


class ServerFleet:
    """The servers as rank 0 has them: which of them fail, and how they come back.

    Attributes:
        fleet: where they are.
        owned: those started here, by URL.
    """

    def __init__(self, fleet: FleetInfo, rollout: Rollout, owned: dict[str, SGLangServer] | None = None):
        self.fleet, self._rollout, self.owned = fleet, rollout, owned or {}
        self._num_restarts = 0

    def reset_restarts(self) -> None:
        """A step is done: `rollout.restarts` counts anew."""
        self._num_restarts = 0

    def recover(self, model_dir: Path, version: str | None = None) -> list[str]:
        """Bring back every server that ended, hangs, or has other weights than `version`: ours are started anew, those
        of others are waited for. What came back must be given its weights before it is asked for anything.

        Args:
            model_dir: a checkpoint of the model served.
            version: None: whatever they have is right.

        Returns:
            What was wrong, in a line for each; they are logged as well. Empty: nothing was.

        Raises:
            UserError: that was once too often (`rollout.restarts`), or one does not come back.
        """
        found = on_all_servers(self.fleet.urls, lambda url: self._find_fault(url, version))
        wrong = {url: why for url, why in zip(self.fleet.urls, found, strict=True) if why}
        for url, why in wrong.items():
            self._num_restarts += 1
            if self._num_restarts > self._rollout.restarts:
                raise UserError(f"{why}: the server failed more than rollout.restarts={self._rollout.restarts} times")
            server = self.owned.get(url)
            does = "it is started anew" if server else "it is waited for and given the run's weights"
            _log.warning("%s: %s (%d of %d)", why, does, self._num_restarts, self._rollout.restarts)
            if server:
                server.stop(graceful=False)
                server.model_dir = model_dir
                server.launch()
        for url in wrong:
            self.owned[url].wait() if url in self.owned else self._wait_for_server(url)
        return list(wrong.values())

    def _find_fault(self, url: str, version: str | None) -> str:
        """What keeps a server from sampling with the right weights; empty if nothing does."""
        try:
            if url in self.owned:
                self.owned[url].check_alive()
            # Its scheduler takes part in the answer, as in that of /health, which takes a second at least.
            control.get(url, "/server_info", min(_HEALTH_S, self._rollout.request_timeout_s))
            found = control.weight_version(url)
        except UserError as error:
            return str(error)
        return f"SGLang at {url} serves weights {found!r} and not {version!r}" if version not in (None, found) else ""

    def _wait_for_server(self, url: str) -> None:
        limit = self._rollout.start_timeout_s
        if not control.wait_until_healthy(url, limit):
            raise UserError(
                f"SGLang at {url} did not come back within rollout.start_timeout_s={limit:g} s: start it again, then "
                "the run"
            )
        _check_server(url, self._rollout)


def validate(rollout: Rollout) -> None:
    """Refuse settings of servers that contradict each other.

    Raises:
        UserError: names the setting.
    """
    for name, least in (("servers", 1), ("tensor", 1), ("sync_bucket_mib", 1), ("restarts", 0), ("retries", 0)):
        if getattr(rollout, name) < least:
            raise UserError(f"rollout.{name} is {getattr(rollout, name)}: it must be at least {least}")
    if not 0 <= rollout.max_failed_fraction < 1:
        raise UserError(f"rollout.max_failed_fraction is {rollout.max_failed_fraction:g}: it must be from 0 to below 1")
    if rollout.incomplete_groups not in INCOMPLETE_GROUP_POLICIES:
        choices = " or ".join(INCOMPLETE_GROUP_POLICIES)
        raise UserError(f"rollout.incomplete_groups is {rollout.incomplete_groups!r}: choose {choices}")
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
    auth.require_key_or_loopback(rollout)


@contextmanager
def start_servers(model_dir: Path, rollout: Rollout, logs: Path, device: str) -> Iterator[ServerFleet]:
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
        yield ServerFleet(FleetInfo(urls, [rollout.tensor] * len(urls), urls), rollout, dict(zip(urls, servers, strict=True)))


def connect_servers(rollout: Rollout) -> ServerFleet:
    """The servers at `rollout.urls`, found to be able to do what a run asks of them.

    Raises:
        UserError: one does not answer, is another release, or was started without a flag that rollouts need.
    """
    urls = [url.rstrip("/") for url in rollout.urls]
    auth.register_key(urls, rollout.api_key_file)
    sizes = on_all_servers(urls, lambda url: _check_server(url, rollout))
    ask = [rollout.router.rstrip("/")] if rollout.router else urls
    return ServerFleet(FleetInfo(urls, sizes, ask), rollout)


def _check_server(url: str, rollout: Rollout) -> int:
    """The tensor-parallel ranks of a server that can do what a run asks of it.

    Raises:
        UserError: as `connect_servers`.
    """
    info = control.get(url, "/server_info")
    releases.check_server_info(url, info, rollout.deterministic)
    return int(info.get("tp_size", 1))
