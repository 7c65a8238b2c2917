"""Modules, attributes, links and anchors that the documentation and docstrings name exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_bai"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "tests/README.md",
        ROOT / "examples/README.md",
        ROOT / "patches/README.md",
    ]
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "compat")  # those name upstream's files
FILES = {path.name for folder in ("megatron_bai", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
# Of Megatron-LM, SGLang and miles
UPSTREAM = {
    "weighted_merge.py",
    "pipeline_parallel/schedules.py",
    "pretrain_gpt.py",
    "model_hook.py",
    "docs/predictive-routing-replay.md",
}


def docstrings(source: Path) -> Iterator[str]:
    """Yield the docstrings of a module."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def text_of(path: Path) -> str:
    return path.read_text() if path.suffix == ".md" else "\n".join(docstrings(path))


def code_spans(text: str) -> list[str]:
    """Return what stands in backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def missing_files(text: str, page: Path) -> list[str]:
    """Return the names of Python files and pages that are in none of the folders a reader would look in."""
    names = [name for span in code_spans(text) for name in re.findall(r"(?<![\w./*-])[\w/-]+\.py\b", span)]
    names += re.findall(r"\bdocs/[\w/-]+\.md\b", text)
    folders = (ROOT, PACKAGE, page.parent)
    return [
        name
        for name in names
        if name not in UPSTREAM
        and not any((folder / name).is_file() for folder in folders)
        and ("/" in name or name not in FILES)
    ]


@cache
def defined_names(module: Path) -> set[str]:
    """Return the names that a module defines or imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def missing_dotted(text: str) -> list[str]:
    """Return the dotted names below `megatron_bai` that are no package, module or name of a module."""
    missing = []
    for dotted in set(re.findall(r"(?<!\")\bmegatron_bai(?:\.\w+)+", text)):
        path, *rest = PACKAGE, *dotted.split(".")[1:]
        while rest and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").is_file()):
            path = path / rest.pop(0)
        module = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if rest and not (module.is_file() and rest[0] in defined_names(module)):
            missing.append(dotted)
    return missing


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the relative links to no file, or to no heading of one."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_names_exist(path: Path) -> None:
    text = text_of(path)
    assert missing_files(text, path) + missing_dotted(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n`rl/nowhere.py` and `terms.py` [a](#a-heading) [b](#another) [c](missing.md)\n")
    assert missing_files(page.read_text(), page) == ["rl/nowhere.py"]
    assert missing_dotted("megatron_bai.rl.nowhere, megatron_bai.errors.UserError") == ["megatron_bai.rl.nowhere"]
    assert broken_links(page) == ["#another", "missing.md"]
