"""Packages from outside, as pip would leave them: the examples of docs/objectives.md and docs/data.md."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def install(place: Path, page: str = "objectives.md") -> Path:
    """Into a directory for PYTHONPATH: the module that registers something, and the entry point that names it."""
    text = (DOCS / page).read_text()
    (module,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if ".register(" in code]
    (group, name) = re.search(r'\[project.entry-points."(.+)"\]\n(\w+) = ', text).groups()
    about = place / "outside-1.0.dist-info"
    about.mkdir(parents=True)
    (place / "outside.py").write_text(module)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = outside\n")
    return place
