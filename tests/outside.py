"""A package from outside that brings an objective, as pip would leave it: the example of docs/objectives.md."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs" / "objectives.md"


def install(place: Path) -> Path:
    """Into a directory for PYTHONPATH: the module, and the entry point that names it."""
    text = DOCS.read_text()
    (module,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (group, name) = re.search(r'\[project.entry-points."(.+)"\]\n(\w+) = ', text).groups()
    about = place / "outside-1.0.dist-info"
    about.mkdir(parents=True)
    (place / "outside.py").write_text(module)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = outside\n")
    return place
