"""The servers of a run, all with the same weights: started and supervised by it, or already running elsewhere."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bai.config import Rollout
from megatron_bai.config.limits import LARGEST_PORT, is_set, validate_group
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import auth, control, releases
from megatron_bai.rollout.servers.logprob_temperature import require_sampled_logprobs
from megatron_bai.rollout.servers.placement import Machine, ServerPlacement, place_servers
from megatron_bai.rollout.servers.ports import require_local_address
from megatron_bai.rollout.servers.sglang_server import SGLangServer, installed_release
from megatron_bai.rollout.servers.weight_sync import on_all_servers

_log = logging.getLogger(__name__)
_HEALTH_S = 30.0  # for an answer of a server's scheduler
_OF_GPUS = ("base_gpu_id", "mem_fraction_static", "moe_runner_backend")
_OF_OWN_SERVERS = ("servers", "servers_per_machine", "tensor", "port", *_OF_GPUS)


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

    Where servers are on several machines (`machine_servers.py`), each process that started some restarts those.

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
        """Recover every server that ended, hangs, or has other weights than `version`, all from this process.

        Args:
            model_dir: as in `restart`.
            version: as in `find_faults`.

        Returns:
            The faults, one line a server; empty where there are none.

        Raises:
            UserError: as `find_faults` and `restart`.
        """
        faults = self.find_faults(version)
        self.restart(list(faults), model_dir)
        return list(faults.values())

    def find_faults(self, version: str | None = None) -> dict[str, str]:
        """Find every server that ended, hangs, or has other weights than `version`, and log what is wrong with it.

        Args:
            version: of the weights that they must have; None: any.

        Returns:
            The faults, a line a server, by URL.

        Raises:
            UserError: more faults than `rollout.restarts`.
        """
        results = on_all_servers(self.fleet.urls, lambda url: self._find_fault(url, version))
        faults = {url: fault for url, fault in zip(self.fleet.urls, results, strict=True) if fault}
        action = "it is waited for and given the run's weights" if self._rollout.urls else "it is started anew"
        for fault in faults.values():
            self._num_restarts += 1
            if self._num_restarts > self._rollout.restarts:
                raise UserError(f"{fault}: the server failed more than rollout.restarts={self._rollout.restarts} times")
            _log.warning("%s: %s (%d of %d)", fault, action, self._num_restarts, self._rollout.restarts)
        return faults

    def restart(self, urls: list[str], model_dir: Path) -> None:
        """Restart those of these servers that this process started, and wait for them, or for those at `rollout.urls`.

        They must be given their weights before any request.

        Args:
            urls: of servers that failed.
            model_dir: a checkpoint of the model served.

        Raises:
            UserError: one does not recover.
        """
        own = [self.owned[url] for url in urls if url in self.owned]
        for server in own:
            server.stop(graceful=False)
            server.model_dir = model_dir
            server.launch()
        for server in own:
            server.wait()
        for url in urls if self._rollout.urls else []:
            self._wait_for_server(url)

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
    if rollout.urls and any(is_set(rollout, name) for name in _OF_OWN_SERVERS):
        names = ", ".join(f"rollout.{name}" for name in _OF_OWN_SERVERS if is_set(rollout, name))
        raise UserError(f"rollout.urls names servers that run already: leave out {names}")
    if rollout.router and not rollout.urls:
        raise UserError("rollout.router needs rollout.urls: weights go to the servers behind it, one by one")
    if len({url.rstrip("/").lower() for url in rollout.urls}) < len(rollout.urls):
        raise UserError("rollout.urls names a server twice")
    auth.require_key_or_loopback(rollout)


def validate_kind(rollout: Rollout, kind: str) -> None:
    """Refuse settings of servers on GPUs where servers are on a CPU, which would not read them.

    Args:
        rollout: settings of the servers.
        kind: of their device, `cpu` or `cuda`.

    Raises:
        UserError: names the setting.
    """
    for name in _OF_GPUS:
        if kind == "cpu" and is_set(rollout, name):
            raise UserError(
                f"rollout.{name} is {getattr(rollout, name)}: it is for servers on GPUs, and these are on a CPU "
                "(backend.kind): leave it out"
            )


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
    model_dir: Path,
    rollout: Rollout,
    logs: Path,
    device: str,
    route_weights: bool = False,
    placements: Mapping[int, ServerPlacement] | None = None,
) -> Iterator[ServerFleet]:
    """Start servers on this machine, all at once; stop them however the block ends.

    Args:
        model_dir: a Hugging Face checkpoint.
        rollout: settings of the servers.
        device: `cpu` or `cuda`.
        logs: directory of `server.log`, `server-1.log` and so on.
        route_weights: as in `SGLangServer`.
        placements: of those of the run's servers that are on this machine, by index; None: all are, on its CPU.

    Raises:
        UserError: one did not start.
    """
    if placements is None:
        placements = dict(enumerate(place_servers(rollout, [Machine(1)])))
    with ExitStack() as stack:
        servers = []
        for i, placement in placements.items():
            port = rollout.port + i if rollout.port else 0
            settings = replace(rollout, port=port, base_gpu_id=placement.base_gpu_id)
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
