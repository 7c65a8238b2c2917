"""The servers of a run, all with the same weights: started and supervised by it, or already running elsewhere."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bai.config import Rollout
from megatron_bai.config.limits import LARGEST_PORT, validate_group
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import auth, control, releases
from megatron_bai.rollout.servers.logprob_temperature import require_sampled_logprobs
from megatron_bai.rollout.servers.ports import require_local_address
from megatron_bai.rollout.servers.sglang_server import SGLangServer, installed_release
from megatron_bai.rollout.servers.weight_sync import on_all_servers

_log = logging.getLogger(__name__)
_HEALTH_S = 30.0  # for an answer of a server's scheduler


@dataclass(frozen=True)
class FleetInfo:
    """The addresses of the servers.

    Attributes:
        urls: of the servers, all of which take part in a weight sync.
        tp_sizes: tensor-parallel ranks of each.
        sampling_urls: URLs that samples are requested from: the servers', or that of a router in front of them.
        untested: their releases that are not in the table, which `backend.untested` takes: a run verifies their rows.
    """

    urls: list[str]
    tp_sizes: list[int]
    sampling_urls: list[str]
    untested: tuple[str, ...] = ()


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
        _, release = _check_server(url, self._rollout)
        if releases.is_untested(release) and release not in self.fleet.untested:
            raise UserError(f"SGLang {release} answers at {url}, another release than this run has verified")


def validate(rollout: Rollout) -> None:
    """Refuse settings of servers that contradict each other.

    Raises:
        UserError: names the setting.
    """
    validate_group("rollout", rollout)
    if rollout.port and rollout.port + rollout.servers - 1 > LARGEST_PORT:
        raise UserError(
            f"rollout.port is {rollout.port} and rollout.servers {rollout.servers}: the last one's port would be above "
            f"{LARGEST_PORT}"
        )
    if rollout.urls and (rollout.servers, rollout.tensor, rollout.port) != (1, 1, 0):
        raise UserError("rollout.urls names servers that run already: leave out rollout.servers, tensor and port")
    if rollout.router and not rollout.urls:
        raise UserError("rollout.router needs rollout.urls: weights go to the servers behind it, one by one")
    if len({url.rstrip("/").lower() for url in rollout.urls}) < len(rollout.urls):
        raise UserError("rollout.urls names a server twice")
    auth.require_key_or_loopback(rollout)


def require_local_addresses(rollout: Rollout) -> None:
    """Refuse addresses and ports at which rank 0's machine, this one, cannot listen; before any work.

    Raises:
        UserError: names the setting.
    """
    if not rollout.urls:
        for index in range(rollout.servers if rollout.port else 1):
            require_local_address("rollout.host", rollout.host, rollout.port and rollout.port + index)
    if rollout.sync == "group":
        require_local_address("rollout.sync_host", rollout.sync_host)


@contextmanager
def start_servers(
    model_dir: Path, rollout: Rollout, logs: Path, device: str, route_weights: bool = False
) -> Iterator[ServerFleet]:
    """Start `rollout.servers` servers on this machine, all at once; stop them however the block ends.

    Args:
        model_dir: a Hugging Face checkpoint.
        rollout: settings of the servers.
        device: `cpu` or `cuda`.
        logs: directory of `server.log`, `server-1.log` and so on.
        route_weights: as in `SGLangServer`.

    Raises:
        UserError: one did not start.
    """
    with ExitStack() as stack:
        servers = []
        for i in range(rollout.servers):
            settings = replace(rollout, port=rollout.port + i if rollout.port else 0)
            log = logs / (f"server-{i}.log" if i else "server.log")
            server = SGLangServer(model_dir, settings, log, device, route_weights=route_weights)
            stack.callback(server.stop)
            server.launch()
            servers.append(server)
        for server in servers:
            server.wait()
        urls = [server.url for server in servers]
        found = {installed_release()}
        fleet = FleetInfo(urls, [rollout.tensor] * len(urls), urls, _list_untested(found))
        yield ServerFleet(fleet, rollout, dict(zip(urls, servers, strict=True)))


def connect_servers(rollout: Rollout) -> ServerFleet:
    """Connect to the servers at `rollout.urls`, having checked that they can do what a run needs.

    Raises:
        UserError: one does not answer, is of a release that is not taken, or was started without a flag that rollouts
            need.
    """
    urls = [url.rstrip("/") for url in rollout.urls]
    auth.register_key(urls, rollout.api_key_file)
    sizes, found = zip(*on_all_servers(urls, lambda url: _check_server(url, rollout)), strict=True)
    sampling_urls = [rollout.router.rstrip("/")] if rollout.router else urls
    return ServerFleet(FleetInfo(urls, list(sizes), sampling_urls, _list_untested(found)), rollout)


def _list_untested(found: Iterable[str | None]) -> tuple[str, ...]:
    """Return the releases among those found that are not in the table."""
    return tuple(sorted({release for release in found if release and releases.is_untested(release)}))


def _check_server(url: str, rollout: Rollout) -> tuple[int, str]:
    """Check that a server can do what a run needs; return the number of its tensor-parallel ranks, and its release.

    Raises:
        UserError: as `connect_servers`.
    """
    info = control.get(url, "/server_info")
    releases.check_server_info(url, info, rollout.deterministic)
    releases.check_sampling(url, info, rollout)
    require_sampled_logprobs(url, rollout.temperature, rollout.request_timeout_s)
    return int(info.get("tp_size", 1)), info["version"]
