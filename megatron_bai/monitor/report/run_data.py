"""Read a run directory for a report.

`metrics.jsonl` (one flat JSON object per global step; needed), `config.yaml` and `summary.json` (both optional: a run
in progress may have none). `summary["provenance"]` may name a merge's `provenance.json`.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_bai.errors import UserError
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.run_log import PROGRESS
from megatron_bai.utils.json_numbers import is_number


@dataclass(frozen=True)
class RunData:
    """The content of a run directory.

    `records` are in the order of their steps, one a step; there is none while the first is in work. `progress` is the
    phase of the step in work.
    """

    name: str
    colour: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    provenance: dict[str, Any]
    directory: Path = Path()
    progress: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[int], list[float | None]]:
        """Return the steps that have a number under `key`, and the numbers; null and non-finite ones are gaps, None."""
        pairs = [(int(r["step"]), r[key]) for r in self.records if key in r and (r[key] is None or is_number(r[key]))]
        return [step for step, _ in pairs], [float(v) if v is not None and math.isfinite(v) else None for _, v in pairs]

    def numbered_metrics(self, prefix: str) -> list[str]:
        """Return the names of metrics PREFIX/NUMBER, in the order of the numbers."""
        names = {key for record in self.records for key in record if key.startswith(prefix + "/")}
        numbers = {int(key.split("/", 1)[1]): key for key in names if key.split("/", 1)[1].isdigit()}
        return [numbers[number] for number in sorted(numbers)]

    def alarms(self) -> list[Alarm]:
        """Return the alarms of all steps, in their order.

        Raises:
            UserError: a record's alarms have other fields.
        """
        try:
            return [Alarm(**alarm) for record in self.records for alarm in record.get("alarms", ())]
        except TypeError as error:
            raise UserError(f"the alarms of run {self.name} cannot be read: {error}") from None


def load_run(directory: Path, name: str, colour: str) -> RunData:
    """Read everything in a run directory that a report shows.

    Args:
        directory: of the run, with a `metrics.jsonl`; the other files are optional.
        name: what the report calls the run.
        colour: CSS colour of the run's lines.

    Raises:
        UserError: there are no usable metrics, or a file cannot be read.
    """
    summary = _read_mapping(directory / "summary.json", json.loads)
    named = str(summary.get("provenance") or "")  # relative to the run, or to where the command is run
    provenance = next((p for p in (directory / named, Path(named)) if p.is_file()), directory / "provenance.json")
    return RunData(
        name=name,
        colour=colour,
        records=_read_metrics(directory / "metrics.jsonl", has_begun=(directory / "config.yaml").is_file()),
        config=_read_mapping(directory / "config.yaml", yaml.safe_load),
        summary=summary,
        provenance=_read_mapping(provenance, json.loads),
        directory=directory,
        progress=_read_progress(directory / PROGRESS),
    )


def _read_progress(path: Path) -> dict[str, Any]:
    """Read the phase of the step in work; an empty mapping where there is none, or none that can be read."""
    try:
        return _read_mapping(path, json.loads)
    except UserError:
        return {}


def _read_mapping(path: Path, parse: Any) -> dict[str, Any]:
    """Read the mapping in a file; return an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}; repair or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping: repair or remove it")
    return content


def _read_metrics(path: Path, has_begun: bool = False) -> list[dict[str, Any]]:
    """Read the records in the order of their steps. Of a step written twice (a resumed run) the last record counts.

    Args:
        path: of the file.
        has_begun: whether the run has written its settings, so that it may have no step yet.
    """
    if not path.is_file() and has_begun:
        return []
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a directory that a training run wrote")
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            records[int(record["step"])] = record
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) - 1:
                break  # the run is writing this line
            raise UserError(f"{path}, record {number + 1}, is not a JSON object with a step: repair it") from error
    if not records and not has_begun:
        raise UserError(f"{path} holds no step yet: wait for the run's first")
    return [records[step] for step in sorted(records)]


def run_names(run_dirs: list[Path]) -> list[str]:
    """Return the directories' names; where these collide, the paths below the common parent."""
    paths = [d.resolve() for d in run_dirs]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    parent = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(parent)) for path in paths]
