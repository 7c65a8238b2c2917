"""What the files at the repository's root say of the tree."""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import code_limits  # noqa: E402, found by the line above

CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(megatron_bai|tests|benchmarks|docs|conf|launch|patches|tools|requirements)(/[\w.-]+)*/?")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/where.md"])
def test_paths_that_are_named_exist(name: str) -> None:
    named = [text for text in CODE.findall((ROOT / name).read_text(encoding="utf-8")) if PATH.fullmatch(text)]
    assert len(named) > 3
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_where_each_kind_of_thing_is_added() -> None:
    """Five that a reader looks for have a section with a file or directory, a name in a registry, and a test."""
    page = (ROOT / "docs/where.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (.+)\n\n((?:- .+\n)+)", page, re.M))
    for kind in ("A merge method", "An objective", "A reward", "A family of models", "A metric"):
        paths = [text for text in CODE.findall(sections[kind]) if PATH.fullmatch(text)]
        assert any(path.startswith("megatron_bai/") for path in paths), kind
        assert any(path.startswith("tests/") for path in paths), kind
    for name in ("METHODS", "_BUILT_IN"):
        files = re.findall(rf"`{name}` of `([\w/.]+)`", page)
        assert files and all(re.search(rf"^{name}\b", (ROOT / file).read_text(), re.M) for file in files)


def test_the_readme_fits_a_screen() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 60


def test_citation_names_the_licence_and_the_three_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == "Apache-2.0"
    papers = [identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]]
    assert papers == ["arXiv:2509.00309", "arXiv:2512.01374", "arXiv:2510.11370"]


def test_code_limits_find_what_is_too_long() -> None:
    body = "    x = 1\n"
    fits = "def f():\n" + body * (code_limits.FUNCTION_LINES - 1)
    assert code_limits.violations(fits, "m.py") == []
    assert code_limits.violations(fits + body, "m.py") == ["m.py:1: function f of 61 lines, over 60"]
    nested = "class C:\n    async def f(self):\n" + "        x = 1\n" * code_limits.FUNCTION_LINES
    assert code_limits.violations(nested, "m.py") == ["m.py:2: function f of 61 lines, over 60"]
    assert code_limits.violations("\n" * code_limits.MODULE_LINES, "m.py") == []
    assert code_limits.violations("\n" * (code_limits.MODULE_LINES + 1), "m.py") == [
        "m.py:1: module of 401 lines, over 400"
    ]


def test_package_is_within_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_limits.main() == 0, capsys.readouterr().out
