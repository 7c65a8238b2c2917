"""What a run directory holds, for a report.

`metrics.jsonl` (one flat JSON object per global step; needed), `config.yaml` and `summary.json` (both optional: a run in
progress may have none). `summary["provenance"]` may name a merge's `provenance.json`.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_bai.errors import UserError
from megatron_bai.monitor.detectors.alarm import Alarm


@dataclass(frozen=True)
class RunData:
    """What was found in one run directory. `records` are in the order of their steps, one a step."""

    name: str
    colour: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    provenance: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float | None]]:
        """Steps that have a number under `key`, and the numbers; null and what is not finite are gaps (None)."""
        found = [(int(r["step"]), r[key]) for r in self.records if key in r and (r[key] is None or is_number(r[key]))]
        return [step for step, _ in found], [float(v) if v is not None and math.isfinite(v) else None for _, v in found]

    def numbered_metrics(self, prefix: str) -> list[str]:
        """Metrics named PREFIX/NUMBER, in the order of the numbers."""
        found = {key for record in self.records for key in record if key.startswith(prefix + "/")}
        numbers = {int(key.split("/", 1)[1]): key for key in found if key.split("/", 1)[1].isdigit()}
        return [numbers[number] for number in sorted(numbers)]

    def alarms(self) -> list[Alarm]:
        """Those of all steps, in their order.

        Raises:
            UserError: a record's alarms are none.
        """
        try:
            return [Alarm(**alarm) for record in self.records for alarm in record.get("alarms", ())]
        except TypeError as error:
            raise UserError(f"the alarms of run {self.name} cannot be read: {error}") from None


def load_run(directory: Path, name: str, colour: str) -> RunData:
    """Everything in a run directory that a report shows.

    Raises:
        UserError: there are no usable metrics, or a file cannot be read.
    """
    summary = _read(directory / "summary.json", json.loads)
    named = str(summary.get("provenance") or "")  # relative to the run, or to where the command is run
    provenance = next((p for p in (directory / named, Path(named)) if p.is_file()), directory / "provenance.json")
    return RunData(
        name=name,
        colour=colour,
        records=_read_metrics(directory / "metrics.jsonl"),
        config=_read(directory / "config.yaml", yaml.safe_load),
        summary=summary,
        provenance=_read(provenance, json.loads),
    )


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """The mapping in a file, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}; repair or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping: repair or remove it")
    return found


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records by step. A step written twice (a resumed run) counts once, the last time it was written."""
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
    if not records:
        raise UserError(f"{path} holds no step yet: wait for the run's first")
    return [records[step] for step in sorted(records)]


def run_names(run_dirs: list[Path]) -> list[str]:
    """The directories' own names; where these collide, their paths from where they part."""
    paths = [d.resolve() for d in run_dirs]
    own = [path.name for path in paths]
    if len(set(own)) == len(own):
        return own
    parent = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(parent)) for path in paths]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
