"""`python tests/faults_table.py RESULTS`: write the table of docs/faults.md from what the tests noted.

RESULTS is the directory that pytest was given with `--faults`: a JSON file for each fault, by the fixture `fault` of
tests/conftest.py. Faults that were not provoked this time keep their row.
"""

import json
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
HEAD = ["| fault | what is lost | what the user sees | seconds to recover |", "|---|---|---|---|"]
# Every fault, in the order of the table.
FAULTS = (
    "a server killed in mid-generation",
    "a server hangs (SIGSTOP)",
    "a server slower than the time limit",
    "a server answers 500",
    "a server answers truncated JSON",
    "a server restarted with old weights",
    "a trainer rank killed",
    "the disk is full at a checkpoint",
    "the network between two nodes cut and healed",
    "SIGTERM with a grace period",
    "two runs in one directory",
)
# What differs from run to run and says nothing.
_PLACES = [(r"(exit code -9\): ).* \[", r"\1its last words ["), (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT")]
_PLACES += [(r"/(?:[\w.-]+/)*((?:run|full-\w+|locked|log)[/\w.-]*)", r"…/\1")]


def table_of(page: str) -> str:
    """The table of faults; the page has another."""
    return page[page.index(HEAD[0]) :].split("\n\n")[0].rstrip("\n")


def rows(page: str) -> dict[str, str]:
    """The table's rows by fault."""
    return {line.split(" | ")[0].removeprefix("| "): line for line in table_of(page).splitlines()[len(HEAD) :]}


def row(noted: dict) -> str:
    """One line of the table."""
    line = noted["line"]
    for place, shown in _PLACES:
        line = re.sub(place, shown, line)
    line = f"`{line}`".replace("|", "\\|") if line else "nothing"
    seconds = "–" if noted["seconds"] is None else f"{noted['seconds']:.0f}" if noted["seconds"] >= 1 else "< 1"
    return f"| {noted['fault']} | {noted['lost']} | {line} | {seconds} |"


def main(results: Path) -> None:
    page = PAGE.read_text()
    known = rows(page)
    for path in results.glob("*.json"):
        noted = json.loads(path.read_text())
        known[noted["fault"]] = row(noted)
    table = "\n".join([*HEAD, *(known[name] for name in FAULTS if name in known)])
    PAGE.write_text(page.replace(table_of(page), table))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
