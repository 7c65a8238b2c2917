"""Every command in README.md works: it is the demo or the tests, which `.ci/run` runs, or it is run here."""

import re
import shutil
from pathlib import Path

import pytest
from command import BIN, Command, Result, succeeded
from pipeline import Demo

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```$", re.M | re.S)


def commands() -> list[str]:
    """Lines of the README's shell blocks; a trailing backslash continues a line, a comment is none."""
    blocks = "".join(BLOCK.findall((ROOT / "README.md").read_text())).replace("\\\n", " ")
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


@pytest.fixture(scope="module")
def clone(demo: Demo, trained: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone looks like after `make demo`, as far as a command can tell: `.venv/bin` and `runs/demo`."""
    directory = tmp_path_factory.mktemp("clone")
    (directory / ".venv").mkdir()
    (directory / ".venv" / "bin").symlink_to(BIN)
    shutil.copytree(demo.directory, directory / "runs" / "demo")
    return directory


OTHERS = [line for line in commands() if not (line.startswith("make ") or in_the_demo(line))]


@pytest.mark.live
@pytest.mark.parametrize("command", OTHERS)
def test_a_command_of_the_readme_works(command: str, clone: Path, tmp_path: Path) -> None:
    result = succeeded(Command(tmp_path, "bash", "-ec", command, cwd=clone))
    assert result.out and not result.tracebacks
