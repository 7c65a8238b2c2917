"""Servers on every machine of a run: the first rank of each starts its own, and rank 0 supervises all of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_bai.config import Rollout
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.rollout.servers import auth, fleet
from megatron_bai.rollout.servers.fleet import FleetInfo, ServerFleet
from megatron_bai.rollout.servers.placement import find_machines, place_servers


@contextmanager
def open_servers(
    model_dir: Path | None, rollout: Rollout, logs: Path, device: str, route_weights: bool = False
) -> Iterator[tuple[FleetInfo, ServerFleet | None]]:
    """Start the run's servers where `place_servers` says, or connect to running ones. *Collective*.

    However the block ends, each rank stops the servers that it started.

    Args:
        model_dir: a Hugging Face checkpoint that all machines read; None: servers run already, at `rollout.urls`.
        rollout: settings of the servers.
        logs: as in `fleet.start_servers`.
        device: `cpu` or `cuda`.
        route_weights: as in `SGLangServer`.

    Yields:
        The addresses of all servers; and on rank 0 what supervises them, on another rank that started some what
        restarts those, elsewhere None.

    Raises:
        UserError: on every rank, where one did not start or cannot be used.
    """
    group = current_ranks()
    own: list[ServerFleet] = []
    with ExitStack() as stack:

        def start() -> FleetInfo | None:
            if model_dir is None:
                own.extend([fleet.connect_servers(rollout)] if group.rank == 0 else [])
            elif machine.is_leader and local:
                own.append(
                    stack.enter_context(
                        fleet.start_servers(model_dir, rollout, logs, device, route_weights, placements=local)
                    )
                )
            return own[0].fleet if own else None

        if model_dir is not None:
            machine = find_machines(device)
            placements = enumerate(place_servers(rollout, machine.machines))
            local = {index: placement for index, placement in placements if placement.machine == machine.index}
        info = _join([info for info in group.run_on_all(start) if info])
        auth.register_key(info.urls, rollout.api_key_file)
        if group.rank == 0:  # which sees all of them, and may have started none
            own[:] = [ServerFleet(info, rollout, own[0].owned if own else None)]
        yield info, own[0] if own else None


def _join(infos: list[FleetInfo]) -> FleetInfo:
    """Return the addresses of the servers of all machines, in the order of these."""
    return FleetInfo(
        [url for info in infos for url in info.urls],
        [size for info in infos for size in info.tp_sizes],
        [url for info in infos for url in info.sampling_urls],
        tuple(sorted({release for info in infos for release in info.untested})),
    )


def recover_servers(own: ServerFleet | None, model_dir: Path, version: str) -> bool:
    """Recover every server that failed, each on its machine; return whether any had. *Collective*.

    Args:
        own: from `open_servers`.
        model_dir: a checkpoint of the model served, which all machines read.
        version: of the weights that servers must have.

    Raises:
        UserError: on every rank, as `ServerFleet.find_faults` and `restart`.
    """
    group = current_ranks()

    def find() -> dict[str, str]:
        assert own, "rank 0 supervises the servers"
        return own.find_faults(version)

    faults = group.run_on_first(find)
    if faults:
        group.run_on_all(lambda: own.restart(list(faults), model_dir) if own else None)
    return bool(faults)
