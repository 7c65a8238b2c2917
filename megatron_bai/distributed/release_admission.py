"""Releases of Megatron-Core without a row in the table: refused, or admitted once they have been probed.

The probe is `megatron_bai/routing/release_probe.py`. It builds a model, for which Megatron-Core has but one world and
one list of routers in a process: it runs in another one, once on each machine, before the run's own is built.
"""

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from megatron_bai import config
from megatron_bai.compat import releases
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError

_PROBE = "megatron_bai.routing.release_probe"
_TIMEOUT_S = 600
_OF_A_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_log = logging.getLogger(__name__)


def require_known_release(settings: config.Backend, kind: str) -> None:
    """Refuse a Megatron-Core that this package was not run with, unless `backend.untested` asks for the probe.

    Args:
        settings: `untested`.
        kind: of the device, `cpu` or `cuda`: on a CPU the fix that training needs refuses it all the same.

    Raises:
        UserError: names the release, those that were run, and the setting.
    """
    release = releases.installed_megatron()
    if release is None:
        raise UserError(f"megatron-core is not installed: install megatron-core=={releases.MEGATRON_CORE}")
    if release not in releases.MEGATRON and not settings.untested:
        remedy = ", or set backend.untested=true, which probes it first" if kind != "cpu" else ""
        raise UserError(
            f"megatron-core {release} is none of the releases that this package was run with"
            f" ({releases.list_megatron()}): install one of them{remedy}"
        )


def admit_release(settings: config.Backend, has_rollouts: bool) -> None:
    """Probe a release without a row, and admit it in this process. *Collective*. One with a row is not probed.

    Args:
        settings: of the model that is probed.
        has_rollouts: whether its rows will be compared with a server's, before anything is trained on these.

    Raises:
        UserError: names what the release fails.
    """
    if not settings.untested:
        return  # the setting is one of all ranks, which may have several releases
    is_first_here, ranks = int(os.environ.get("LOCAL_RANK", 0)) == 0, current_ranks()

    def probe() -> dict[str, list[str]]:
        release = releases.installed_megatron()
        if release is None or release in releases.MEGATRON or not is_first_here:
            return {}
        return {release: _probe(settings, release)}

    rows = "are compared with a server's next" if has_rollouts else "were not compared with a server's"
    for release, verified in {key: lines for found in ranks.run_on_all(probe) for key, lines in found.items()}.items():
        releases.admit_megatron(release)
        if ranks.rank == 0:
            _log.warning(
                f"megatron-core {release} was not tried with this package; the probe verified: {'; '.join(verified)}."
                f" Its rows {rows}. Nothing else of it is known to work"
            )


def _probe(settings: config.Backend, release: str) -> list[str]:
    """Run the probe in a process of its own and return what it verified."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_WORLD}
    environment = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC")}
    command = [sys.executable, "-m", _PROBE, json.dumps(asdict(settings))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(_failed(release, f"it did not end within {_TIMEOUT_S} s")) from None
    lines = done.stdout.splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(_failed(release, f"it ended with code {done.returncode}: {last}")) from None
    if "failed" in answer:
        raise UserError(_failed(release, answer["failed"]))
    return [str(line) for line in answer["verified"]]


def _failed(release: str, what: str) -> str:
    known = releases.list_megatron()
    return f"megatron-core {release} fails the probe of backend.untested: {what}; install one of {known}"
