"""The package's layers, the names of its modules, and what its docstrings must have."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_bai"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Each imports those before it, and never one behind it.
LAYERS = (
    "utils",
    "errors",
    "workers",
    "project_files",
    "compat",
    "config",
    "distributed",
    "data",
    "checkpoint",
    "model",
    "merge",
    "routing",
    "monitor",
    "rollout",
    "environments",
    "rewards",
    "rl",
    "memory_plan",
    "cli",
    "__main__",
)


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names of ours that a module imports at run time, those within functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [f"{module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.startswith("megatron_bai."))


def test_every_package_is_a_layer() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert names == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own != "__init__":
        allowed = LAYERS[: LAYERS.index(own) + 1]
        layers = {name.split(".")[1] for name in imported(path)} & set(LAYERS)
        assert layers <= set(allowed)


@pytest.mark.parametrize("package", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_modules_and_subpackages_of_a_package_import_in_no_circle(package: Path) -> None:
    """Where they do not, each stands above all that it imports."""
    prefix = ".".join(("megatron_bai", *package.relative_to(PACKAGE).parts, ""))
    children = {
        path.stem if path.is_file() else path.name: path for path in package.iterdir() if path.suffix in ("", ".py")
    }
    children.pop("__init__", None)
    graph = {
        name: {
            target
            for path in ([child] if child.is_file() else child.rglob("*.py"))
            for dotted in imported(path)
            if dotted.startswith(prefix)
            and (target := dotted.removeprefix(prefix).split(".")[0]) in children
            and target != name
        }
        for name, child in children.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"{package.name}: {' → '.join(error.args[1])}")


def test_no_module_has_the_name_of_another_package() -> None:
    """A reader who sees `inspect` or `safetensors` must be able to trust it is that one."""
    locks = [path.read_text(encoding="utf-8").lower() for path in (PACKAGE.parent / "requirements").glob("*.lock")]
    pinned = {line.partition("==")[0].replace("_", "-") for text in locks for line in text.splitlines()} | {"torch"}
    packages = packages_distributions().items()
    taken = {name for name, owners in packages if pinned & {owner.lower().replace("_", "-") for owner in owners}}
    assert {"numpy", "safetensors", "torch"} <= taken
    taken |= set(sys.stdlib_module_names)
    names = {path.stem if path.stem != "__init__" else path.parent.name for path in MODULES} - {"__main__"}
    assert names & taken == set()


def public_functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    """Yield public functions and methods that are not nested, with the names of their parameters but self and cls."""

    def visit(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield node

    for function in visit(ast.parse(path.read_text(encoding="utf-8")).body):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        yield function, [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_say_what_they_take(path: Path) -> None:
    """Two and more parameters, or a tensor, are described: shapes, dtypes, units, what None means."""
    silent = []
    for function, names in public_functions(path):
        types = [ast.unparse(argument.annotation) for argument in function.args.args if argument.annotation]
        if len(names) > 1 or any("Tensor" in name for name in types):
            if "Args:" not in (ast.get_docstring(function) or ""):
                silent.append(f"{function.name} in line {function.lineno}")
    assert silent == []
