"""Metrics that a run wrote and that the table of metrics has no row for."""

import json
from pathlib import Path

import yaml

from megatron_bai.monitor.metrics.table.sections import find_metric

OBJECTIVES = {path.stem for path in (Path(__file__).parents[1] / "conf" / "objective").glob("*.yaml")}


def find_metrics_without_row(record: Path) -> set[str]:
    """The names in a `metrics.jsonl` that have no row.

    There is none of a run whose objective is from outside, which may log more. A last line that a kill has torn is left
    out.
    """
    settings = record.with_name("config.yaml")
    objective = (yaml.safe_load(settings.read_text()) or {}).get("objective") if settings.is_file() else None
    if objective and objective["name"] not in OBJECTIVES:
        return set()
    lines = record.read_text().split("\n")[:-1]
    return {name for line in lines for name in json.loads(line) if find_metric(name) is None}
