"""Every command in README.md is run by `.ci/run`: the demo and the tests, and the others on what the demo left.

Those of the first pages of the documentation are among them.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```$", re.M | re.S)


def commands(page: str = "README.md") -> list[str]:
    """Lines of a page's shell blocks; a trailing backslash continues a line, a comment is none."""
    blocks = "".join(BLOCK.findall((ROOT / page).read_text())).replace("\\\n", " ")
    lines = (line.removeprefix("$ ").strip() for line in blocks.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def in_the_demo(command: str) -> bool:
    """Whether the Makefile's demo is where it is run."""
    return command.replace(".venv/bin/", "$(BIN)/") in (ROOT / "Makefile").read_text().replace(" $(ARGS)", "")


def test_every_block_of_the_readme_is_seen() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("```") == 2 * len(BLOCK.findall(text)) and len(commands()) > 4


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_the_ci_runs_what_make_is_asked_for(command: str) -> None:
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_ci_runs_all_others() -> None:
    """After the demo, on what it made: this part of `.ci/run` with an echo in the place of the shell."""
    (extracted,) = re.findall(r"^verbs=.*$", (ROOT / ".ci" / "run").read_text(), re.M)
    found = subprocess.run(["bash", "-euc", f'{extracted}\necho "$verbs"'], cwd=ROOT, capture_output=True, text=True)
    others = [line for line in commands() if not (line.startswith("make ") or in_the_demo(line))]
    assert found.stdout.splitlines() == others and len(others) > 4


@pytest.mark.parametrize("page", ["docs/install.md", "docs/quickstart.md"])
def test_the_first_pages_have_no_command_of_their_own(page: str) -> None:
    """But for those that make the environment: CI's first one does, tests/test_wheel.py as in an image."""
    own = [line for line in commands(page) if line not in commands() and not in_the_demo(line)]
    assert commands(page) and set(own) <= {"make install", "pip install --no-deps .", "pip check"}
