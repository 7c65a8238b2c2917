"""Refuse functions and modules of the package that do not fit the limits of CONTRIBUTING.md. `make lint` runs this."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_bai"
FUNCTION_LINES = 60
MODULE_LINES = 400  # a limit, not an aim


def violations(source: str, name: str) -> list[str]:
    """Find what is too long.

    Args:
        source: a module's text.
        name: its path, for the messages.

    Returns:
        One line for the module and for each function over the limit.
    """
    length = len(source.splitlines())
    found = [f"{name}:1: module of {length} lines, over {MODULE_LINES}"] if length > MODULE_LINES else []
    for node in ast.walk(ast.parse(source, name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{name}:{node.lineno}: function {node.name} of {length} lines, over {FUNCTION_LINES}")
    return found


def main() -> int:
    """Print what is too long in the package, and return the exit status."""
    files = sorted(PACKAGE.rglob("*.py"))
    if not files:
        print(f"no modules below {PACKAGE}")
        return 2
    found = [
        line
        for path in files
        for line in violations(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE.parent)))
    ]
    print("\n".join(found) or f"{len(files)} modules within the limits")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
