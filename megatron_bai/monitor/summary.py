"""`summary.json`: layout, versions, settings and metrics of a run, for programs to read."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_bai import __version__, config
from megatron_bai.checkpoint.carried_files import has_provenance
from megatron_bai.errors import UserError, os_errors_as_user_errors
from megatron_bai.utils.atomic_file import write_json

_PACKAGES = ("torch", "megatron-core", "sglang", "transformers", "transformer-engine")


def package_versions() -> dict[str, str | None]:
    """Return the releases of the packages a run depends on; None for those that are not installed."""
    releases: dict[str, str | None] = {"megatron_bai": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            releases[package] = version(package)
        except PackageNotFoundError:
            releases[package] = None
    return releases


def read_summary(directory: str | Path) -> dict[str, Any]:
    """Read the summary in a run's directory; return an empty one where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(directory) / "summary.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore or remove it") from None


class Summary:
    """Collects the steps of one run."""

    def __init__(self, settings: config.Config, world: int, records: list[dict[str, Any]], resumed: list[int]):
        """Begin a summary.

        Args:
            settings: of the run.
            world: number of ranks.
            records: of the steps that are done.
            resumed: the steps after which the run was resumed from a checkpoint.
        """
        parallel = settings.parallel
        self._content: dict[str, Any] = {
            "run": settings.run.name,
            "complete": False,
            "versions": package_versions(),
            "layout": {
                "processes": world,
                "tensor": parallel.tensor,
                "expert": parallel.expert,
                "pipeline": parallel.pipeline,
                "data": world // (parallel.tensor * parallel.pipeline),
                "sequence_parallel": parallel.sequence,
            },
            "objective": settings.objective.name,
            "replay": settings.replay.mode,
            "mini_batches": settings.trainer.mini_batches,
            "init": config.initial_checkpoint(settings),
            "resumed": resumed,
            "steps": list(records),
        }
        provenance = Path(self._content["init"]) / "provenance.json"
        if self._content["init"] and has_provenance(provenance.parent):
            self._content["provenance"] = str(provenance)

    def add_step(self, values: dict[str, Any]) -> None:
        """Add the metrics of a step."""
        self._content["steps"].append(values)

    def write(self, directory: str | Path, complete: bool) -> None:
        """Write `summary.json`, with whether the run is `complete`.

        Args:
            directory: of the run; it exists.
            complete: false until the result is saved.

        Raises:
            UserError: it cannot be written; an earlier one is unchanged.
        """
        self._content["complete"] = complete
        path = Path(directory) / "summary.json"
        with os_errors_as_user_errors(path):
            write_json(path, self._content)
