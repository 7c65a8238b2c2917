"""Runs in files of a few KB that the repository keeps: what the tables read of a run, and where it comes from.

A run's directory (checkpoint, routes, samples) stays on the machine that made it. Where it has ended, `write_run` puts
the metrics that the tables read, unrounded, into `STUDY/VARIANT/seed-N.json` of the store, with the settings it was run
with. `find_runs` gives the runs of a variant from both, the directory's first. A run whose settings are not those that
`studies.py` declares today is another experiment: it is left out, and named.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from studies import all_studies

from megatron_bai.errors import UserError
from megatron_bai.monitor.report.run_data import RunData, load_run
from megatron_bai.monitor.summary import read_summary
from megatron_bai.utils.atomic_file import write_json, write_text

REPOSITORY = Path(__file__).resolve().parents[2]
STORE = REPOSITORY / "benchmarks" / "data" / "studies"
ANYWHERE = Path("D")  # stands for the directory of checkpoints, merges and runs
# What the tables read, and what else says whether a run was healthy. Of NUMBERED all NAME/NUMBER.
METRICS = (
    "step", "alarms", "reward_mean", "eval_accuracy", "eval_exact", "entropy", "grad_norm", "clip_fraction",
    "response_length_mean", "response_tokens", "truncated_fraction", "staleness_ratio_max", "divergence_mean",
    "kl_k1", "kl_k1_live", "router_shift_mean", "experts_effective",
    "route_mismatch", "tokens_route_mismatch", "route_coverage", "route_weight_gap",
    *(f"{name}{way}" for name in ("kl_k3", "f_1.5", "f_2", "logprob_gap") for way in ("", "_live", "_weights")),
)  # fmt: skip
NUMBERED = "merge_routes_kept", "reward_by_length", "responses_by_length"
_ORIGIN = "origin.json"  # in a run's directory


@dataclass(frozen=True)
class Origin:
    """What a run was, and where.

    Attributes:
        settings: of the verb `train`, as `studies.py` declared them, D for the directory.
        checkpoints: name → the settings that made what it started from.
        updates: of the run, in all.
        commit: of the code that ended it; `+` behind it where files had been changed since.
        date: on which it ended, in UTC.
        machine: cores and processor.
        load: mean number of processes that wanted a core, over the last quarter of an hour.
        seconds: by the clock, from start to exit.
        processor_seconds: of the run's processes, without the shared server's.
    """

    settings: list[str]
    checkpoints: dict[str, list[str]]
    updates: int
    commit: str
    date: str
    machine: str
    load: float
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class StudyRun:
    """A run of a study; `origin` is None for one that an older runner made."""

    seed: int
    data: RunData
    complete: bool
    origin: Origin | None


def declared(study: str, variant: str, seed: int, updates: int) -> tuple[list[str], dict[str, list[str]]]:
    """Return the settings of a run and of its checkpoints, as they are declared today."""
    declaration = all_studies(ANYWHERE)[study]
    run_dir = ANYWHERE / study / variant / f"seed-{seed}"
    needed = declaration.needed_checkpoints([variant])
    settings = declaration.overrides(variant, seed, updates, run_dir)
    return settings, {name: list(words) for name, words in needed.items()}


def write_origin(
    target: Path, study: str, variant: str, seed: int, updates: int, seconds: float, processor_seconds: float
) -> None:
    """Write down in a run's directory how it was made; the seconds of a resumed run add up."""
    before = read_origin(target)
    if before:
        seconds, processor_seconds = seconds + before.seconds, processor_seconds + before.processor_seconds
    settings, checkpoints = declared(study, variant, seed, updates)
    origin = Origin(
        settings, checkpoints, updates, _commit(), datetime.now(UTC).date().isoformat(), _machine(),
        round(os.getloadavg()[2], 1), round(seconds, 1), round(processor_seconds, 1),
    )  # fmt: skip
    write_json(target / _ORIGIN, asdict(origin))


def read_origin(target: Path) -> Origin | None:
    """Read what `write_origin` wrote."""
    path = target / _ORIGIN
    return Origin(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def store_file(store: Path, study: str, variant: str, seed: int) -> Path:
    """Return where a run is stored."""
    return store / study / variant / f"seed-{seed}.json"


def write_run(target: Path, store: Path, study: str, variant: str, seed: int) -> bool:
    """Store a run that has ended; return whether it could be: not without its origin, or in progress."""
    run = _from_directory(target, seed)
    if run is None or not run.complete or run.origin is None:
        return False
    content: dict[str, Any] = {"origin": asdict(run.origin), "metrics": _columns(run.data.records)}
    path = store_file(store, study, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _format(content))
    return True


def find_run(directory: Path | None, store: Path | None, study: str, variant: str, seed: int) -> StudyRun | None:
    """Return the run in `directory`, else the stored one; None where neither is there with today's settings."""
    target = directory / study / variant / f"seed-{seed}" if directory else None
    path = store_file(store, study, variant, seed) if store else None
    for place, read in ((target, _from_directory), (path, _from_store)):
        run = read(place, seed) if place else None
        if run is None:
            continue
        difference = _difference(run.origin, study, variant, seed) if run.origin else ""
        if not difference:
            return run
        print(f"{place} is left out: it {difference}", file=sys.stderr)
    return None


def find_runs(directory: Path | None, store: Path, study: str, variant: str) -> list[StudyRun]:
    """Return the variant's runs, by seed."""
    paths = [*(store / study / variant).glob("seed-*.json")]
    if directory:
        paths += (directory / study / variant).glob("seed-*")
    seeds = sorted({int(path.name.removeprefix("seed-").removesuffix(".json")) for path in paths})
    runs = (find_run(directory, store, study, variant, seed) for seed in seeds)
    return [run for run in runs if run is not None]


def _from_directory(target: Path, seed: int) -> StudyRun | None:
    try:
        data = load_run(target, f"seed {seed}", "")
    except UserError:
        return None  # not started
    summary = read_summary(target)
    complete = summary.get("complete") is True and len(summary["steps"]) == len(data.records)
    return StudyRun(seed, data, complete, read_origin(target))


def _from_store(path: Path, seed: int) -> StudyRun | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        origin, records = Origin(**content["origin"]), _records(content["metrics"])
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path} is no stored run ({error!r}): restore or remove it") from None
    return StudyRun(seed, RunData(f"seed {seed}", "", records, {}, {}, {}), True, origin)


def _difference(origin: Origin, study: str, variant: str, seed: int) -> str:
    """Say which setting is the first that is not today's; nothing where all are."""
    settings, checkpoints = declared(study, variant, seed, origin.updates)
    pairs: list[tuple[str, Sequence[str], Sequence[str]]] = [("", origin.settings, settings)]
    for name in {**origin.checkpoints, **checkpoints}:
        pairs.append((f"was made from {name}, which ", origin.checkpoints.get(name, ()), checkpoints.get(name, ())))
    for whose, stored, today in pairs:
        if gone := [word for word in stored if word not in today]:
            return f"{whose}has {gone[0]}, which studies.py does not declare today"
        if new := [word for word in today if word not in stored]:
            return f"{whose}lacks {new[0]}, which studies.py declares today"
        if list(stored) != list(today):
            return f"{whose}has its settings in another order than studies.py today"
    return ""


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn records into a list a metric; of one that some records lack an object INDEX OF RECORD → value."""
    names = [name for name in {name: None for record in records for name in record} if _is_kept(name)]
    columns: dict[str, Any] = {}
    for name in sorted(names):
        column = {str(i): record[name] for i, record in enumerate(records) if name in record}
        columns[name] = list(column.values()) if len(column) == len(records) else column
    return columns


def _records(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"step": step} for step in columns["step"]]
    for name, column in columns.items():
        for i, value in column.items() if isinstance(column, dict) else enumerate(column):
            records[int(i)][name] = value
    return records


def _is_kept(name: str) -> bool:
    return name in METRICS or name.partition("/")[0] in NUMBERED


def _format(content: Mapping[str, Any]) -> str:
    """A line for each field of the origin and for each metric, so that a change can be read."""
    parts = []
    for part, fields in content.items():
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=7", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "megatron_bai", "conf", "benchmarks/reproduce")
    return (commit or "unknown") + ("+" if changed else "")


def _machine() -> str:
    """Count the cores and name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores ({names[0] if names else platform.machine()})"
