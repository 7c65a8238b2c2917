"""Text that any terminal, pipe or file takes: no character that its encoding lacks raises, and no path is markup."""

import codecs
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

_HANDLER = "megatron_bai.nearest"
# What our lines hold beyond ASCII, as one would type it.
_NEAREST = str.maketrans(
    {
        "×": "x", "…": "...", "–": "-", "—": "-", "−": "-", "→": "->", "←": "<-", "↔": "<->", "·": "*", "✓": "+",
        "✗": "x", "‖": "||", "≤": "<=", "≥": ">=", "∩": "&", "Σ": "sum ", "α": "alpha", "λ": "lambda", "τ": "tau",
        "π": "pi", "μ": "mu", "θ": "theta", "ε": "epsilon", "⁹": "^9", "ᵢ": "_i", "█": "#",
    }
)  # fmt: skip

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def replace_unprintable() -> None:
    """Make stdout and stderr replace what their encoding lacks, by something alike or by its escape."""
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a program has put another object there
            stream.reconfigure(errors=_HANDLER)


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Return what is written in place of characters that cannot be encoded, as codecs asks of an error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_NEAREST)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def escape_controls(text: str) -> str:
    """Replace control characters but line ends and tabs by their escapes: in a name, they could command a terminal."""
    return text.translate(_CONTROLS)


class _Console(Console):
    """A console whose texts command no terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make rich's text of a text that is printed, or is in a table.

        Args:
            text: which may be a name from a file.
            options: as for rich's `Console`.
        """
        return super().render_str(escape_controls(text), **options)


def make_console(**options: Any) -> Console:
    """Make a console that prints texts as they are: `[/b]` or `:x:` in a path is no markup, and nothing is a command.

    Args:
        options: as for rich's `Console`.
    """
    return _Console(markup=False, emoji=False, **options)
