"""`make test-matrix`: the tests that touch an engine, with each release that is taken; docs/compatibility.md from it.

    python tests/release_matrix.py [all|failed|list|page] [megatron-core=X] [sglang=X] [transformers=X] [suite=NAME]
                                   [jobs=N]

A cell is a row of releases and a suite. Without arguments the cells that have no record are run, so that the command
can be stopped and started again; releases and a suite choose cells, whether recorded or not; `failed` those that
failed, `all` everything. `list` names the chosen ones, `page` writes the page alone. N cells are run side by side (1).
Each result is recorded at once (`release_page.py`).

This is a program beside pytest and no test: it runs pytest once for each cell, since the releases of a process are
those on its path when Python starts, and what it finds is a record, not a verdict on a change.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from os import cpu_count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any
from xml.etree import ElementTree

import engine_releases
import release_page
from engine_releases import DEFAULT, ROOT, TABLE, Engines
from packaging.version import Version

from megatron_bai.compat.releases import SERVERS

TIMEOUT_S = 3600


@dataclass(frozen=True)
class Suite:
    """Some tests.

    Attributes:
        shows: what they show, as docs/compatibility.md says it.
        arguments: what pytest is asked for.
        engines: the distributions whose release the result depends on; processes of the tests import each of them.
        part: what of it `make test-long` asks for (`tests/live/test_other_releases.py`).
    """

    shows: str
    arguments: tuple[str, ...]
    engines: tuple[str, ...]
    part: tuple[str, ...] = ()


_FAMILIES = tuple(
    f"tests/model/families/test_{name}.py" for name in ("families", "expert_bias", "sigmoid_router", "drawn")
)
_MODEL = tuple(f"tests/model/test_{name}.py" for name in ("attention", "checkpoint", "fused_experts", "replaced"))
_ROUTING = tuple(
    f"tests/routing/test_{name}.py" for name in ("routers", "replay", "replay_layouts", "keep", "own_loop")
)
SUITES = {
    "routing": Suite(
        "record and replay: every router, recomputation, pipelines, layouts, a loop of one's own",
        _ROUTING,
        ("megatron-core",),
        _ROUTING[:1],
    ),
    "model": Suite(
        "attention, checkpoints there and back, names and values of all families against transformers",
        (*_MODEL, *_FAMILIES),
        ("megatron-core", "transformers"),
    ),
    "distributed": Suite(
        "one training step in several layouts: gradients, weights, metrics, packed rows, the critic",
        ("tests/distributed", "tests/model/test_conversion.py"),
        ("megatron-core",),
    ),
    "torch_dist": Suite(
        "merging of sharded checkpoints, which Megatron-Core writes and loads",
        ("tests/merge/test_torch_dist.py", "tests/merge/test_megatron.py", "tests/merge/test_mixed_formats.py"),
        ("megatron-core",),
    ),
    "checkpoints": Suite(
        "those of each layout of all releases are merged, converted, trained; Megatron-LM's save directories",
        ("tests/compatibility/test_release_layouts.py", "tests/model/test_megatron_lm.py"),
        ("megatron-core",),
    ),
    "contract": Suite(
        "all that is sent to a real server and read from it, against the server's own schema",
        ("tests/live/test_contract.py",),
        ("sglang",),
        # With the diffs, of which the quick tests import no SGLang: its release is asserted by those of the contract.
        ("tests/live/test_contract.py", "tests/patches/test_diffs.py", "-m", "not long and not distributed"),
    ),
    "diffs": Suite(
        "the diffs of `patches/` apply, and do what they are for",
        ("tests/patches/test_diffs.py",),
        ("sglang",),
    ),
    "rl": Suite(
        "two steps of RL with R3 and a weight sync, two families: the server computes what the trainer does",
        ("tests/live/test_family_servers.py", "-m", "", "-k", "mixtral or qwen3_moe_mixed_tied_yarn"),
        ("megatron-core", "sglang", "transformers"),
        ("tests/live/test_family_servers.py", "-m", "", "-k", "mixtral or qwen3_moe_mixed_tied_yarn"),
    ),
}
_MEGATRON = tuple(name for name, suite in SUITES.items() if "megatron-core" in suite.engines and name != "rl")
_PATCH = ("routing", "checkpoints")


def rows() -> dict[Engines, tuple[str, ...]]:
    """The suites of each row of releases, the rows that matter most first.

    The corners have the oldest and the newest of everything, and all suites. Between them one engine at a time is not
    the default, with the suites that depend on it; of a minor release of Megatron-Core the last patch has them all, the
    others those that depend most on it. The default has none: CI runs every test with it.
    """
    startable = [release for release, server in SERVERS.items() if server.starts_here]
    oldest = Engines(TABLE["megatron-core"][0], startable[0])
    newest = Engines(TABLE["megatron-core"][-1], startable[-1], TABLE["transformers"][-1])
    corner = tuple(name for name in SUITES if name != "diffs")  # which are for the default Megatron-Core
    chosen: dict[Engines, tuple[str, ...]] = {newest: corner, oldest: corner, DEFAULT: ()}
    for release in reversed(startable):
        chosen.setdefault(Engines(sglang=release), ("contract", "rl", "diffs"))
    for release in TABLE["transformers"]:
        chosen.setdefault(Engines(transformers=release), ("model", "rl"))
    corners = {newest.megatron_core, oldest.megatron_core}
    minors: set[tuple[int, ...]] = set()
    for release in sorted(TABLE["megatron-core"], key=Version, reverse=True):
        minor = Version(release).release[:2]
        if release not in corners:
            chosen.setdefault(Engines(megatron_core=release), _PATCH if minor in minors else _MEGATRON)
        minors.add(minor)
    for release in SERVERS:
        chosen.setdefault(Engines(sglang=release), ())  # taken at rollout.urls alone: no suite starts such a server
    return chosen


@dataclass(frozen=True)
class Cell:
    """A suite with a row of releases."""

    engines: Engines
    suite: str

    @property
    def key(self) -> str:
        """Its name, as the command takes it."""
        return release_page.make_key(self.engines, self.suite)


def cells() -> list[Cell]:
    """All cells, in the order of the rows."""
    return [Cell(engines, suite) for engines, suites in rows().items() for suite in suites]


def run(cell: Cell, *, part: bool = False) -> dict[str, Any]:
    """Run the tests of a cell.

    Args:
        cell: which.
        part: ask for the part of `make test-long` alone.

    Returns:
        The numbers of those that passed and were skipped, names of those that failed with a line that says why, and
        how often each engine was imported. What pytest printed of failures goes to stderr.

    Raises:
        RuntimeError: the tests did not run to their end, or with another release than the cell's; nothing was learnt.
    """
    suite = SUITES[cell.suite]
    with TemporaryDirectory() as directory:
        report, notes, copies = (Path(directory) / name for name in ("report.xml", "notes", "tmp"))
        environment = engine_releases.environment(cell.engines, notes)
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={copies}", f"--junit-xml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *(suite.part if part else suite.arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(
                f"{cell.key}: pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
            )
        if done.returncode:
            print(done.stdout[-12000:], file=sys.stderr, flush=True)
        imports = engine_releases.require_imported(cell.engines, notes, suite.engines, copies)
        return read_report(report) | {"imports": imports}


def read_report(report: Path) -> dict[str, Any]:
    """The outcomes that a report of pytest in JUnit's form has."""
    passed, skipped, failed = 0, 0, {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if problem is not None:
            name = f"{case.get('classname', '')}::{case.get('name', '')}".lstrip(":")
            failed[name] = _telling_line(problem.get("message") or "")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def _telling_line(message: str) -> str:
    """Return the last line that names an error, since a message may have what a command said; else the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.search("error", line, re.IGNORECASE)), (lines or [""])[0])[:200]


def circumstances() -> dict[str, Any]:
    """When, from which commit and on what machine cells are run."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "processor": next(_processor_names(), platform.machine()),
        "cores": cpu_count(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def commit() -> str:
    """The commit of this checkout, with a plus sign where files differ from it, but for what this command writes."""
    written = [f":!{path.relative_to(ROOT)}" for path in (release_page.RECORDS, release_page.PAGE)]
    changed = _git("status", "--porcelain", "--", ".", *written)
    return _git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor_names() -> Iterator[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            yield " ".join(line.partition(":")[2].split())


def choose(words: list[str], records: dict[str, Any]) -> list[Cell]:
    """The cells that the command's words ask for.

    Raises:
        SystemExit: a word is unknown, or there is no such cell.
    """
    wanted = {name: each for name, _, each in (word.partition("=") for word in words) if each}
    flags = {word for word in words if "=" not in word}
    if unknown := (flags - {"all", "failed", "list", "page"}) | (wanted.keys() - {*DEFAULT.releases, "suite"}):
        raise SystemExit(f"{', '.join(sorted(unknown))}: see the first lines of {__file__}")
    chosen = [cell for cell in cells() if wanted.items() <= (cell.engines.releases | {"suite": cell.suite}).items()]
    if not chosen:
        raise SystemExit(f"no cell has {' '.join(words)}: `list` names them all")
    if "failed" in flags:
        return [cell for cell in chosen if records.get(cell.key, {}).get("failed")]
    if wanted or flags & {"all", "list"}:
        return chosen
    return [cell for cell in chosen if cell.key not in records]


def timed(cell: Cell) -> dict[str, Any]:
    """Run a cell, and return its record."""
    start = monotonic()
    return circumstances() | run(cell) | {"seconds": round(monotonic() - start)}


def main(words: list[str]) -> int:
    """Run the chosen cells; the status is 1 where one failed or could not be run."""
    records = release_page.read_records()
    jobs = [int(word.removeprefix("jobs=")) for word in words if word.startswith("jobs=")]
    words = [word for word in words if not word.startswith("jobs=")]
    chosen = [] if "page" in words else choose(words, records)
    if "list" in words:
        print(*(cell.key for cell in chosen), sep="\n")
        return 0
    status = 0
    pool = ThreadPoolExecutor(*jobs or [1])
    try:
        running = {pool.submit(timed, cell): cell for cell in chosen}
        for i, done in enumerate(as_completed(running), 1):
            print(f"[{i}/{len(chosen)}] {running[done].key}: ", end="")
            try:
                record = done.result()
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"not run: {error}", flush=True)
                status = 1
                continue
            print(f"{release_page.format_outcome(record)}, {record['seconds']} s", flush=True)
            status = status or int(bool(record["failed"]))
            release_page.keep(running[done].key, record)
    finally:
        pool.shutdown(cancel_futures=True)  # of those that an interrupt left
    release_page.write(rows(), SUITES)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
