"""Packages from outside, as pip would leave them: those of docs/objectives.md, docs/data.md and examples/plugin."""

import re
import shutil
import tomllib
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = Path(__file__).parents[1] / "examples"


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


def install_example(place: Path) -> Path:
    """Into a directory for PYTHONPATH: the package of examples/plugin with the entry points of its pyproject.toml."""
    project = tomllib.loads((EXAMPLES / "plugin" / "pyproject.toml").read_text())["project"]
    about = place / "my_package-1.0.dist-info"
    about.mkdir(parents=True)
    shutil.copytree(
        EXAMPLES / "plugin" / "my_package", place / "my_package", ignore=shutil.ignore_patterns("__pycache__")
    )
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, names in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place
