"""Write docs/settings.md from the dataclasses in `megatron_bai/config`.

python tools/settings_page.py
"""

import dataclasses
import re
from pathlib import Path

from omegaconf import MISSING

from megatron_bai import config
from megatron_bai.cli.help_text import SettingText, describe_group
from megatron_bai.cli.verbs import VERBS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
_TITLE = """# Settings

Every setting of every verb, from the dataclasses in `megatron_bai/config`; `tools/settings_page.py` writes it, and
a test compares it with them. `group.key=value` on the command line sets one, a [preset](presets.md) many;
`megatron-bai VERB --help` prints those of a verb, `--cfg job` the values that a command line has. A value outside its
range, an unknown name, or one that a verb does not read is refused by name. `???` must be given, `null` is unset."""


def make_page() -> str:
    """Make the page's text."""
    parts = [_TITLE, *(_describe(group.name) for group in dataclasses.fields(config.Config))]
    return "\n\n".join(parts) + "\n"


def _describe(group: str) -> str:
    """Make the section of a group: its verbs, and a table for each class with settings of its own."""
    readers = [name for name, verb in VERBS.items() if group in (*verb.groups, *verb.also_reads)]
    parts = [f"## {group}", f"Read by {', '.join(f'`{name}`' for name in readers)}."]
    kinds = describe_group(group)
    chosen = getattr(kinds[0][0], "name", None) == MISSING  # by group=NAME
    for kind, about, settings in kinds:
        if chosen and kind is not kinds[0][0]:
            parts.append(f"### {_heading(group, kind)}")
        if about:
            parts.append(_link(about))
        bases = [base for base, _, own in kinds[1:] if own and base in kind.__mro__[1:]]
        if bases:
            links = [f"[{_heading(group, base)}](#{_anchor(_heading(group, base))})" for base in reversed(bases)]
            parts.append(f"It has the settings of {' and '.join(links)}, and:")
        rows = [_row(each) for each in settings if not (chosen and each.name == f"{group}.name")]
        if rows:
            parts.append("\n".join(["| setting | default | may be | what it is |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _heading(group: str, kind: type) -> str:
    """Name a choice as the command line does, and a class of several choices' settings by its own name."""
    own = vars(kind).get("name")
    return f"{group}={own}" if own else f"{group}, {kind.__name__}"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _link(text: str) -> str:
    """Make links of the pages that a text names."""
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", text)


def _row(setting: SettingText) -> str:
    may_be = f"{setting.typename}{', ' if setting.allowed else ''}{setting.allowed}"
    cells = (f"`{setting.name}`", f"`{setting.default}`", may_be, _link(setting.about))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
