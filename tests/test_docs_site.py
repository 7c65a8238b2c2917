"""docs/settings.md is what the settings' dataclasses say, and the site's navigation has every page."""

import dataclasses
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import settings_page  # noqa: E402

from megatron_bai import config  # noqa: E402


def test_the_page_of_settings_is_what_they_say() -> None:
    assert settings_page.PAGE.read_text() == settings_page.make_page(), "run: python tools/settings_page.py"


def test_the_page_has_every_setting_of_every_group() -> None:
    page = settings_page.make_page()
    for group in dataclasses.fields(config.Config):
        kind = group.default_factory
        assert isinstance(kind, type)
        for setting in dataclasses.fields(kind):
            chosen_by_name = group.name in ("data", "init", "reward", "env", "objective") and setting.name == "name"
            assert chosen_by_name or f"`{group.name}.{setting.name}`" in page, setting.name


def test_its_links_to_its_own_sections_lead_there() -> None:
    page = settings_page.make_page()
    titles = re.findall(r"^#+ (.+)$", page, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert len(links) > 10 and set(links) <= anchors


def test_every_page_is_in_the_navigation() -> None:
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = re.findall(r"[\w/-]+\.md", str(entries))
    assert sorted(pages) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


def test_measurements_name_date_commit_and_machine() -> None:
    pages = sorted(set((ROOT / "docs/benchmarks").glob("*.md")) - {ROOT / "docs/benchmarks/index.md"})
    heading = r"^\| table \| date \| commit \| machine \|\n\|[-|]+\n((?:\|.*\n)+)"
    rows = {page.name: re.findall(heading, page.read_text(), re.M) for page in pages}
    assert pages and all(len(tables) == 1 for tables in rows.values())
    for name, (table,) in rows.items():
        for row in table.splitlines():
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert len(cells) == 4 and all(cells) and re.search(r"\d{4}", cells[1]), f"{name}: {row}"
            assert re.search(r"`[0-9a-f]{7,}`|not recorded", cells[2]), f"{name}: {row}"


def test_the_page_of_limits_leads_to_all_of_them() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if "\n## Limits\n" in path.read_text()}
    linked = re.findall(r"\]\(([\w-]+\.md)#limits\)", (ROOT / "docs/limits.md").read_text())
    assert len(pages) > 10 and sorted(linked) == sorted(pages)
