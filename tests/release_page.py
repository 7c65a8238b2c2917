"""What `tests/release_matrix.py` found: the records in tests/data/release_matrix.json, and docs/compatibility.md from
them. The page is a function of the table of releases, the suites and the records, and of nothing else.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine_releases import ROOT, Engines

from megatron_bai.utils.atomic_file import write_text

RECORDS = ROOT / "tests" / "data" / "release_matrix.json"
PAGE = ROOT / "docs" / "compatibility.md"
NAMES = {"megatron-core": "Megatron-Core", "sglang": "SGLang", "transformers": "transformers"}
FAILURES_SHOWN = 12  # of a cell


class Described(Protocol):
    """A suite, as far as the page is about it."""

    @property
    def shows(self) -> str:
        """What its tests show."""

    @property
    def arguments(self) -> Sequence[str]:
        """What pytest is asked for."""

    @property
    def engines(self) -> Sequence[str]:
        """The distributions whose release its result depends on."""


Rows = Mapping[Engines, Sequence[str]]  # the suites of each row of releases


def make_key(engines: Engines, suite: str) -> str:
    """The name of a cell: of its record, and as the command takes it."""
    return " ".join(f"{name}={each}" for name, each in (*engines.releases.items(), ("suite", suite)))


def read_records() -> dict[str, Any]:
    """The records by the names of their cells."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def keep(key: str, record: Mapping[str, Any]) -> None:
    """Put a record in the place of the cell's earlier one, at once and whole."""
    records = read_records() | {key: record}
    text = json.dumps(records, indent=1, sort_keys=True, ensure_ascii=False)
    write_text(RECORDS, text + "\n")


def write(rows: Rows, suites: Mapping[str, Described]) -> None:
    """Write the page from the records."""
    PAGE.write_text(make_page(rows, suites, read_records()), encoding="utf-8")


def make_page(rows: Rows, suites: Mapping[str, Described], records: Mapping[str, Any]) -> str:
    """Make the page's text.

    Args:
        rows: of the table, with the suites that each is asked for.
        suites: by name, in the order of the columns.
        records: by the names of the cells.

    Raises:
        ValueError: a record is of no cell: the table of releases lost it, or a suite was renamed.
    """
    cells = {make_key(engines, suite): (engines, suite) for engines, names in rows.items() for suite in names}
    if stray := sorted(records.keys() - cells):
        raise ValueError(f"{RECORDS.name} has records of no cell, delete them: {', '.join(stray)}")
    done = {key: cell for key, cell in cells.items() if key in records}
    parts = [_INTRODUCTION, _table(rows, suites, records), _LEGEND.format(done=len(done), all=len(cells))]
    parts += [_failures(done, records), _describe(suites), _LIMITS, _runs(done, records)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


_INTRODUCTION = """
# Compatibility

What the tests say with each release of Megatron-Core, SGLang and transformers that this package takes
(`megatron_bai/compat/releases.py`). `make test-matrix` runs them on a CPU, each release from its lock in
`requirements/`, and writes this page; `tests/test_release_matrix.py` fails where the page is not what the records say
(`tests/data/release_matrix.json`). The first rows are the corners, newest and oldest of everything; the third is what
`make install` installs, with which CI runs every test; in the others one engine is not the default.
"""

_LEGEND = """
{done} of {all} cells were run. **–**: the suite does not depend on what differs from the default in this row.
**·**: asked of the last patch of a minor release, or of the corners, alone. *not run*: the cell has no record.
Numbers are of tests; failures have names [below](#what-failed). SGLang 0.5.19 and 0.5.20 are
taken at `rollout.urls` alone: a run starts no server of them, and neither does a suite. So the oldest pair has 0.5.21.

Python 3.11 alone: Megatron-Core from 0.17 on asks for 3.12, a requirement that was ignored here. No GPU, no Transformer
Engine ([limits](limits.md)).

    make test-matrix                                                # the cells without a record
    make test-matrix ARGS="megatron-core=0.19.2 suite=routing"      # these, again
    make test-matrix ARGS=failed                                    # those that failed, again

A cell ends in an error, and without a record, unless every process of its tests imported the cell's releases.
`make test-long` runs a part of all this every time (`tests/live/test_other_releases.py`).
"""

_LIMITS = """
## Limits

A run that was started with one release of Megatron-Core goes on with another: from 0.16.1 to 0.19.2 and back, and
between 0.17.1 and 0.18.2, in one process on a CPU, with the bits of a run that was not interrupted. Across releases
and layouts at once it was not tried. Saving in the background uses Megatron-Core's own writers
(`async_strategy=mcore`), which it deprecates from 0.17 on; NVIDIA's `nvidia-resiliency-ext` was not tried.
"""


def _line(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


def _head(*columns: str) -> list[str]:
    return [_line(*columns), "|" + "---|" * len(columns)]


def format_outcome(record: Mapping[str, Any] | None) -> str:
    """Say in a few words how a cell ended; None: it has no record."""
    if record is None:
        return "*not run*"
    failed = [f"**{len(record['failed'])} failed**"] if record["failed"] else []
    skipped = [f"{record['skipped']} skipped"] if record["skipped"] else []
    return ", ".join([*failed, f"{record['passed']} passed", *skipped])


def _table(rows: Rows, suites: Mapping[str, Described], records: Mapping[str, Any]) -> str:
    lines = _head(*NAMES.values(), *suites)
    for engines, names in rows.items():
        changed = engines.others.keys()
        outcomes = []
        for name, suite in suites.items():
            if not changed:
                outcomes.append("CI")
            elif name in names or not names and changed & {*suite.engines}:  # without names no suite can be asked for
                outcomes.append(format_outcome(records.get(make_key(engines, name))))
            else:
                outcomes.append("·" if changed == {"megatron-core"} and changed <= {*suite.engines} else "–")
        lines.append(_line(*engines.releases.values(), *outcomes))
    return "\n".join(lines)


def _failures(done: Mapping[str, tuple[Engines, str]], records: Mapping[str, Any]) -> str:
    lines = ["## What failed", ""]
    for key in done:
        failed = records[key]["failed"]
        lines += [f"`{key}`:", ""] if failed else []
        lines += [f"- `{name}`: `{_plain(line)}`" for name, line in list(failed.items())[:FAILURES_SHOWN]]
        lines += [f"- and {len(failed) - FAILURES_SHOWN} more"] if len(failed) > FAILURES_SHOWN else []
        lines += [""] if failed else []
    return "\n".join(lines if len(lines) > 2 else [*lines, "Nothing that was run."])


def _plain(line: str) -> str:
    """Return a line of an error without what ends a code span."""
    return line.replace("`", "'") or "no message"


def _describe(suites: Mapping[str, Described]) -> str:
    lines = ["## Suites", "", *_head("suite", "what it shows", "pytest")]
    lines += [_line(f"`{name}`", each.shows, f"`{shlex.join(each.arguments)}`") for name, each in suites.items()]
    return "\n".join(lines)


def _runs(done: Mapping[str, tuple[Engines, str]], records: Mapping[str, Any]) -> str:
    lines = ["## When and where", "", "Seconds are of one pytest, beside whatever else the machine did.", ""]
    lines += _head(*NAMES.values(), "suite", "date", "commit", "machine", "Python", "torch", "s", "imports")
    for key, (engines, suite) in done.items():
        record = records[key]
        machine = f"{record['processor']}, {record['cores']} cores"
        imports = ", ".join(f"{count} {NAMES[name]}" for name, count in record["imports"].items() if count)
        columns = [record["date"], record["commit"], machine, record["python"], record["torch"]]
        lines.append(_line(*engines.releases.values(), suite, *columns, str(record["seconds"]), imports))
    return "\n".join(lines)
