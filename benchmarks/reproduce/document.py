"""Tables of a study's runs, a row a variant, beside what the paper reports; and the document they stand in."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stored_runs import StudyRun, find_runs
from studies import all_studies
from tables import TABLES

_NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """A study's table.

    Attributes:
        header: of the columns.
        rows: by variant, less its name.
        source: sentences about where and when the runs were made; empty where none is known.
    """

    header: list[str]
    rows: dict[str, list[str]]
    source: str

    def text(self) -> str:
        """Return it in Markdown: rows of runs, and under them the names of variants without."""
        rows = [[name, *cells] for name, cells in self.rows.items() if cells[0] != _NOT_RUN]
        table = "\n".join(f"| {' | '.join(line)} |" for line in [self.header, ["---"] * len(self.header), *rows])
        missing = [name for name, cells in self.rows.items() if cells[0] == _NOT_RUN]
        below = [self.source, f"Not run: {', '.join(missing)}." if missing else ""]
        return "\n\n".join(filter(None, [table if rows else "", *below]))


def make_table(directory: Path | None, store: Path, study: str) -> Table:
    """Make a study's table. Runs in progress count with the steps they have, and are named as such."""
    columns, rows, runs = TABLES[study], {}, []
    for name, variant in all_studies(Path())[study].variants.items():
        own = find_runs(directory, store, study, name)
        data = [run.data for run in own]
        cells = [cell(data) for cell in columns.values()] if own else [""] * len(columns)
        rows[name] = [_size(own), *cells, variant.published]
        runs += own
    return Table(["", "runs × steps", *columns, "paper"], rows, _source(runs))


def replace(document: Path, tables: dict[str, Table]) -> None:
    """Put each study's table between its marks; a row of which no run is there stays, and is said to be older."""
    content = document.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by benchmarks/reproduce -->", f"<!-- end of {name} -->"
        if content.count(begin) != 1 or content.count(end) != 1:
            raise SystemExit(f"{document} lacks the marks {begin} and {end}, or has them twice")
        head, rest = content.split(begin)
        before, tail = rest.split(end)
        content = f"{head}{begin}\n\n{_with_older_rows(name, table, before).text()}\n\n{end}{tail}"
    document.write_text(content, encoding="utf-8")


def _size(runs: list[StudyRun]) -> str:
    if not runs:
        return _NOT_RUN
    steps = sorted({len(run.data.records) for run in runs})
    unfinished = sum(not run.complete for run in runs)
    return f"{len(runs)} × {'/'.join(map(str, steps))}" + (f", {unfinished} unfinished" if unfinished else "")


def _source(runs: list[StudyRun]) -> str:
    """Say of which commits, dates and machines the runs are."""
    origins = [run.origin for run in runs if run.origin]
    if not origins:
        return ""
    dates, loads = ([getattr(origin, name) for origin in origins] for name in ("date", "load"))
    return (
        f"{len(origins)} runs, {_range(dates)}, commit {_join(origin.commit for origin in origins)}, "
        f"on {_join(origin.machine for origin in origins)}, load {_range(loads)}; together "
        f"{sum(origin.seconds for origin in origins) / 60:.0f} minutes, "
        f"{sum(origin.processor_seconds for origin in origins) / 60:.0f} of a core without shared servers."
    )


def _range(values: Sequence[str] | Sequence[float]) -> str:
    """Format the least and the largest, or the one that there is."""
    return " to ".join(dict.fromkeys((str(min(values)), str(max(values)))))


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _with_older_rows(study: str, table: Table, before: str) -> Table:
    """Keep what the document has of variants without a run, in the columns that are still there."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in before.splitlines() if line.startswith("|")]
    older = {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}
    older = {name: cells for name, cells in older.items() if cells[table.header[1]] != _NOT_RUN}
    kept = [name for name, row in table.rows.items() if row[0] == _NOT_RUN and name in older]
    if not kept:
        return table
    rows = dict(table.rows)
    for name in kept:
        rows[name] = [*(older[name].get(column, "") for column in table.header[1:-1]), rows[name][-1]]
    print(
        f"{study}: {len(kept)} rows stay as they are, of runs that are not stored: {', '.join(kept)}", file=sys.stderr
    )
    which = "All rows are" if len(kept) == len(rows) else f"{', '.join(kept)}:"
    return Table(table.header, rows, f"{table.source} {which} of runs that were not stored.".strip())
