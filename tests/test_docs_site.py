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
            chosen_by_name = group.name in ("data", "init", "reward", "objective") and setting.name == "name"
            assert chosen_by_name or f"`{group.name}.{setting.name}`" in page, setting.name


def test_its_links_to_its_own_sections_lead_there() -> None:
    page = settings_page.make_page()
    titles = re.findall(r"^#+ (.+)$", page, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert len(links) > 10 and set(links) <= anchors


def test_every_page_is_in_the_navigation() -> None:
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = re.findall(r"[\w-]+\.md", str(entries))
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
