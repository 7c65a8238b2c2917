"""The papers' experiments at small scale: whole runs of the real command, and tables made of what they wrote.

    python benchmarks/reproduce run --study bai --dir D [--seeds 3] [--updates 160] [--only reasoning bai-0.5]
    python benchmarks/reproduce table [--dir D] [--out docs/results.md]

`run` does one run after another, each of one to three minutes on two idle cores, and may be interrupted: the same
command goes on. What a table needs of a run that has ended is stored in a file of a few KB (--store), which is to be
committed: a run that is there is not run again, on whatever machine. `table` reads the runs in D, if it is given, and
those that are stored, and replaces what lies between a study's marks in the document; without --out it prints.
"""

import argparse
import signal
import sys
from pathlib import Path

import document
import runner
import stored_runs
from studies import all_studies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    run = verbs.add_parser("run")
    run.set_defaults(verb=_run)
    run.add_argument("--study", choices=all_studies(Path()), required=True)
    run.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    run.add_argument("--updates", type=int, help="of each run; the study's own number unless given")
    run.add_argument("--only", nargs="+", default=[], help="variants")
    table = verbs.add_parser("table")
    table.set_defaults(verb=_table)
    table.add_argument("--out", type=Path, help="a document with the studies' marks")
    for verb in (run, table):
        verb.add_argument("--dir", type=Path, required=verb is run, help="holds checkpoints, merges and runs")
        verb.add_argument("--store", type=Path, default=stored_runs.STORE, help="holds stored runs")
    options = parser.parse_args()
    options.verb(options)


def _run(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the run in work ends first
    directory = options.dir.resolve()
    study = all_studies(directory)[options.study]
    updates = options.updates or study.updates
    failed = runner.run_study(directory, study, range(options.seeds), updates, options.only, options.store)
    sys.exit(failed > 0)


def _table(options: argparse.Namespace) -> None:
    directory = options.dir.resolve() if options.dir else None
    tables = {name: document.make_table(directory, options.store, name) for name in all_studies(Path())}
    if options.out:
        document.replace(options.out, tables)
    else:
        print("\n\n".join(table.text() for table in tables.values()))


if __name__ == "__main__":
    main()
