"""Text of prompts and responses made safe to print: nothing in it moves a cursor, a line or the reading direction."""

import re

# Control characters but line feed and tab, line and paragraph separators, bidirectional overrides and isolates, lone
# surrogates, the byte-order mark and invisible tags.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff"
    "\U000e0000-\U000e007f]"
)


def make_printable(text: str) -> str:
    r"""Return the text with unsafe characters as escapes: ESC is `\x1b`, a lone surrogate `\ud800`.

    A pair of surrogates is the character that it stands for. Markup is left alone: where the text becomes HTML, it is
    escaped there.
    """
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass") if text else text
    return _UNSAFE.sub(_escape, joined)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
