"""Lines reach a terminal, pipe or file of any encoding, and a path is never markup."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bai.cli import entry_point
from megatron_bai.errors import UserError
from megatron_bai.utils.terminal_text import make_console, replace_unprintable

PACKAGE = Path(__file__).parents[2] / "megatron_bai"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_character_is_too_many(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    replace_unprintable()
    print("2 × 3 … – ✓ ‖a − b‖ Mᵢ ü 日 \udcff")
    sys.stdout.flush()
    written = raw.getvalue().decode(encoding)
    if encoding == "ascii":
        assert written == "2 x 3 ... - + ||a - b|| M_i \\xfc \\u65e5 \\udcff\n"
    assert "\\udcff" in written  # a file name that is no UTF-8


@pytest.mark.parametrize("name", ["[/b]", "[final]", "[red]x", ":x:", "[link=a]", "a\\[b]"])
def test_a_path_is_no_markup(name: str) -> None:
    from rich.table import Table

    file = io.StringIO()
    console = make_console(file=file, width=200)
    table = Table("column", title=name)
    table.add_row(name)
    console.print(name)
    console.print(table)
    assert file.getvalue().count(name) == 3


def test_a_name_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    name = "model\x1b]0;title\x07\x9b2J\r\x7f.weight"
    escaped = r"model\x1b]0;title\x07\x9b2J\x0d\x7f.weight"
    file = io.StringIO()
    console = make_console(file=file, width=200)
    table = Table("column", title=name)
    table.add_row(name)
    console.print(name)
    console.print(table)
    assert file.getvalue().count(escaped) == 3 and "\x1b" not in file.getvalue()
    entry_point._print_error(UserError("a\x1b[2J\x7fü"))
    assert capsys.readouterr().err == "megatron-bai: error: a\\x1b[2J\\x7fü\n"


def test_every_console_is_made_here() -> None:
    users = [
        path for path in PACKAGE.rglob("*.py") if re.search(r"\bConsole\(|[ =]_Console\(", path.read_text("utf-8"))
    ]
    assert [path.name for path in users] == ["terminal_text.py"]


def test_files_are_read_and_written_in_utf_8() -> None:
    """Whatever the locale: a tokenizer, a chat template or a path may hold any character."""
    plain = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in PACKAGE.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ".read_text()" in line or ".write_text(" in line and "encoding=" not in line and "atomic_file" not in line
    ]
    assert not plain


@pytest.mark.distributed
@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["inspect", "inspect.path=ü[/b]"]])
def test_a_verb_answers_where_only_ascii_is_printed(words: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "megatron_bai", *words]
    result = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert result.returncode == (2 if "inspect" in words else 0), result.stderr
    assert (result.stdout + result.stderr).isascii() and b"Traceback" not in result.stderr
    assert "--help" not in words or b"\\x" not in result.stdout and b"\\u" not in result.stdout  # but something alike
    assert "inspect" not in words or b"no checkpoint at \\xfc[/b]" in result.stderr  # the name, not its bytes
