"""The servers of a run, all with the same weights: started and supervised by it, or already running elsewhere."""

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
_HEALTH_S = 30.0  # for an answer of a server's scheduler


@dataclass(frozen=True)
class FleetInfo:
    """The addresses of the servers.

    Attributes:
        urls: of the servers, all of which take part in a weight sync.
        tp_sizes: tensor-parallel ranks of each.
        sampling_urls: URLs that samples are requested from: the servers', or that of a router in front of them.
    """

    urls: list[str]
    tp_sizes: list[int]
    sampling_urls: list[str]


class ServerFleet:
    """The servers as rank 0 supervises them: finds those that failed, and recovers them.

    Attributes:
        fleet: their addresses.
        owned: those started by this process, by URL.
    """

    def __init__(self, fleet: FleetInfo, rollout: Rollout, owned: dict[str, SGLangServer] | None = None):
        self.fleet, self._rollout, self.owned = fleet, rollout, owned or {}
        self._num_restarts = 0

    def reset_restarts(self) -> None:
        """Reset the count of restarts, which `rollout.restarts` bounds within a step."""
        self._num_restarts = 0

    def recover(self, model_dir: Path, version: str | None = None) -> list[str]:
        """Recover every server that ended, hangs, or has other weights than `version`.

        Servers started by this process are restarted; others are waited for. A recovered server must be given its
        weights before any request.

        Args:
            model_dir: a checkpoint of the model served.
            version: of the weights that they must have; None: any.

        Returns:
            The faults, one line a server, which are logged as well; empty where there are none.

        Raises:
            UserError: more faults than `rollout.restarts`, or a server does not recover.
        """
        results = on_all_servers(self.fleet.urls, lambda url: self._find_fault(url, version))
        faults = {url: fault for url, fault in zip(self.fleet.urls, results, strict=True) if fault}
        for url, fault in faults.items():
            self._num_restarts += 1
            if self._num_restarts > self._rollout.restarts:
                raise UserError(f"{fault}: the server failed more than rollout.restarts={self._rollout.restarts} times")
            server = self.owned.get(url)
            action = "it is started anew" if server else "it is waited for and given the run's weights"
            _log.warning("%s: %s (%d of %d)", fault, action, self._num_restarts, self._rollout.restarts)
            if server:
                server.stop(graceful=False)
                server.model_dir = model_dir
                server.launch()
        for url in faults:
            self.owned[url].wait() if url in self.owned else self._wait_for_server(url)
        return list(faults.values())

    def _find_fault(self, url: str, version: str | None) -> str:
        """Find what keeps a server from sampling with the right weights; return an empty string where nothing does."""
        try:
            if url in self.owned:
                self.owned[url].check_alive()
            # Its scheduler takes part in the answer, as in that of /health, which takes a second at least.
            control.get(url, "/server_info", min(_HEALTH_S, self._rollout.request_timeout_s))
            reported = control.weight_version(url)
        except UserError as error:
            return str(error)
        if version in (None, reported):
            return ""
        return f"SGLang at {url} serves weights {reported!r} and not {version!r}"

    def _wait_for_server(self, url: str) -> None:
        """Wait for a server that others restart."""
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
        model_dir: a Hugging Face checkpoint.
        rollout: settings of the servers.
        device: `cpu` or `cuda`.
        logs: directory of `server.log`, `server-1.log` and so on.

    Raises:
        UserError: one did not start.
    """
    with ExitStack() as stack:
        servers = []
        for i in range(rollout.servers):
            settings = replace(rollout, port=rollout.port + i if rollout.port else 0)
            server = SGLangServer(model_dir, settings, logs / (f"server-{i}.log" if i else "server.log"), device)
            stack.callback(server.stop)
            server.launch()
            servers.append(server)
        for server in servers:
            server.wait()
        urls = [server.url for server in servers]
        fleet = FleetInfo(urls, [rollout.tensor] * len(urls), urls)
        yield ServerFleet(fleet, rollout, dict(zip(urls, servers, strict=True)))


def connect_servers(rollout: Rollout) -> ServerFleet:
    """Connect to the servers at `rollout.urls`, having checked that they can do what a run needs.

    Raises:
        UserError: one does not answer, is another release, or was started without a flag that rollouts need.
    """
    urls = [url.rstrip("/") for url in rollout.urls]
    auth.register_key(urls, rollout.api_key_file)
    sizes = on_all_servers(urls, lambda url: _check_server(url, rollout))
    sampling_urls = [rollout.router.rstrip("/")] if rollout.router else urls
    return ServerFleet(FleetInfo(urls, sizes, sampling_urls), rollout)


def _check_server(url: str, rollout: Rollout) -> int:
    """Check that a server can do what a run needs; return the number of its tensor-parallel ranks.

    Raises:
        UserError: as `connect_servers`.
    """
    info = control.get(url, "/server_info")
    releases.check_server_info(url, info, rollout.deterministic)
    return int(info.get("tp_size", 1))
