"""What a patch is, and how patches are applied. Imports no patched library."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from megatron_bai.errors import UserError

_applied: set[str] = set()  # names of the patches installed in this process


@dataclass(frozen=True)
class Patch:
    """A fix to one released version of somebody else's package.

    Attributes:
        name: unique; the module's name.
        distribution: the patched package, as pip names it.
        version: the one release the fix was written for and tested with.
        scope: what needs it (`sglang-cpu`, `megatron-cpu`): patches of a scope are applied together.
        summary: the symptom without it, in one line.
        install: puts the fix in place in this process. Imports the patched package only when called.
    """

    name: str
    distribution: str
    version: str
    scope: str
    summary: str
    install: Callable[[], None]

    @property
    def found(self) -> str | None:
        """The installed release, without a build's local suffix (`+cpu`); None when there is none."""
        try:
            return version(self.distribution).partition("+")[0]
        except PackageNotFoundError:
            return None

    @property
    def state(self) -> str:
        """`applied` in this process, `ready`, `not installed` (the package), or `moved` (another release)."""
        if self.name in _applied:
            return "applied"
        if self.found is None:
            return "not installed"
        return "ready" if self.found == self.version else "moved"

    def apply(self) -> None:
        """Install once per process.

        Raises:
            UserError: the installed package is not the release this patch was written for.
        """
        if self.name in _applied:
            return
        if self.found != self.version:
            raise UserError(
                f"patch {self.name} is written for {self.distribution} {self.version}, but {self.found or 'none'} is "
                f"installed: install {self.distribution}=={self.version}"
            )
        self.install()
        _applied.add(self.name)


def after_import(name: str, install: Callable[[ModuleType], None]) -> None:
    """Call `install` with a module once it is imported, or now if it is: a process that never needs a module with many
    others behind it, as most of a server's, does not import it for a patch's sake.
    """
    if name in sys.modules:
        install(sys.modules[name])
    else:
        sys.meta_path.insert(0, _After(name, install))


class _After(MetaPathFinder):
    """Finds one module as the others do, once, and lets its loader call `install`."""

    def __init__(self, name: str, install: Callable[[ModuleType], None]) -> None:
        self.name, self.install = name, install

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # whose method is replaced
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.install(module)

            loader.exec_module = exec_module
        return spec


def apply_scope(patches: Iterable[Patch], scope: str) -> None:
    """Apply the patches of one scope, in order."""
    for patch in patches:
        if patch.scope == scope:
            patch.apply()
