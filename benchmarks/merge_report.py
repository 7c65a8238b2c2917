"""The tables of `benchmarks/merge.py` in Markdown, as docs/benchmarks/merge.md has them."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Result = dict[str, Any]
HEAD = ("", "seconds", "GB/s", "of limit", "of merge", "cpu s", "peak MiB", "base MiB")


def report(results: Iterable[Result]) -> str:
    """One table for each of the checkpoints that were merged, in the order in which they were first measured."""
    groups: dict[tuple[Any, ...], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        groups[tuple(result[key] for key in ("format", "shape", "gb", "state"))][result["row"]].append(result)
    return "\n\n".join(_table(which, rows) for which, rows in groups.items())


def _table(which: tuple[Any, ...], rows: dict[str, list[Result]]) -> str:
    form, shape, gb, state = which
    runs = [run for each in rows.values() for run in each]
    loads, turns = [run["load"] for run in runs], [len(each) for each in rows.values()]
    best = {name: min(each, key=lambda run: run.get("seconds", float("inf"))) for name, each in rows.items()}
    lines = [
        f"{form}, {shape}, {state}: three inputs of {runs[0]['bytes'] / 1e9:.2f} GB and {runs[0]['items']:,} chunks,"
        f" best of {min(turns)}{f' to {max(turns)}' if max(turns) > min(turns) else ''}, load {min(loads):.1f} to"
        f" {max(loads):.1f}",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    for name, run in best.items():
        if "error" in run:
            lines.append(f"| {name} | {run['error']} |" + " |" * (len(HEAD) - 2))
            continue
        speed = 4 * run["bytes"] / run["seconds"] / 1e9  # read three, write one
        known = [fastest_limit(best), best["merge, 1 rank"].get("seconds") if "merge, 1 rank" in best else None]
        ratios = [f"{seconds / run['seconds']:.2f}" if seconds else "" for seconds in known]
        cpu = min(each["cpu"] for each in rows[name])
        cells = [f"{run['seconds']:.2f}", f"{speed:.2f}", *ratios, f"{cpu:.2f}"]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{run['peak_mib']:.0f}", f"{run['base_mib']:.0f}"]) + " |")
    return "\n".join(lines)


def fastest_limit(best: dict[str, Result]) -> float | None:
    """Return the seconds of the fastest limit: of one thread, or of as many threads or processes as there are cores."""
    limits = [run["seconds"] for name, run in best.items() if name.split(",")[0] == "limit" and "error" not in run]
    return min(limits, default=None)
