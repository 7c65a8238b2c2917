"""Metrics that a run wrote and that the table of metrics has no row for."""

import json
import os
from contextlib import suppress
from pathlib import Path

import yaml

from megatron_bai.monitor.metrics.table.sections import find_metric

OBJECTIVES = {path.stem for path in (Path(__file__).parents[1] / "conf" / "objective").glob("*.yaml")}


def list_records(directory: Path) -> set[Path]:
    """Every `metrics.jsonl` below a directory, also while another process removes some of it."""
    records = {Path(parent) / "metrics.jsonl" for parent, _, names in os.walk(directory) if "metrics.jsonl" in names}
    return {record for record in records if record.is_file()}


def find_metrics_without_row(record: Path) -> set[str]:
    """The names in a `metrics.jsonl` that have no row.

    There is none of a run whose objective is from outside, which may log more. A line that a kill or a test has torn is
    left out.
    """
    settings = record.with_name("config.yaml")
    objective = (yaml.safe_load(settings.read_text()) or {}).get("objective") if settings.is_file() else None
    if isinstance(objective, dict) and objective.get("name") not in OBJECTIVES:
        return set()
    names: set[str] = set()
    for line in record.read_text().splitlines():
        with suppress(ValueError):
            names |= set(json.loads(line))
    return {name for name in names if find_metric(name) is None}
