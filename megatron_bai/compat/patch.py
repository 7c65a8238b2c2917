"""`Patch`, a compatibility fix, and how fixes are applied. Imports no library that is fixed."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from megatron_bai.compat.releases import installed_megatron
from megatron_bai.errors import UserError

_applied: set[str] = set()  # names of the fixes installed in this process


@dataclass(frozen=True)
class Patch:
    """A fix to named releases of another project's package, and to no other.

    Attributes:
        name: unique; the module's name.
        distribution: the package it fixes, as pip names it.
        versions: the releases it was tested with, which need it.
        scope: what needs it (`sglang-cpu`, `sglang-models`, `sglang-weights`, `megatron-cpu`): fixes of a scope are
            applied together.
        summary: the symptom without it, in one line.
        install: puts the fix in place in this process. Imports the package only when called.
        mended_in: releases that were tried and do without it, or have another fix.
    """

    name: str
    distribution: str
    versions: tuple[str, ...]
    scope: str
    summary: str
    install: Callable[[], None]
    mended_in: tuple[str, ...] = ()

    @property
    def installed_version(self) -> str | None:
        """The installed release, without a build's local suffix (`+cpu`); None when there is none."""
        if self.distribution == "megatron-core":
            return installed_megatron()
        try:
            return version(self.distribution).partition("+")[0]
        except PackageNotFoundError:
            return None

    @property
    def state(self) -> str:
        """`applied` in this process, `ready`, `not needed`, `not installed` (no package), `moved` (another release)."""
        if self.name in _applied:
            return "applied"
        if self.installed_version is None:
            return "not installed"
        if self.installed_version in self.mended_in:
            return "not needed"
        return "ready" if self.installed_version in self.versions else "moved"

    def apply(self) -> None:
        """Install once per process, where the installed release needs it.

        Raises:
            UserError: the installed package is none of the releases this fix was tested with.
        """
        if self.state in ("applied", "not needed"):
            return
        if self.installed_version not in self.versions:
            raise UserError(
                f"patch {self.name} is written for {self.distribution} {', '.join(self.versions)}, but "
                f"{self.installed_version or 'none'} is installed: install {self.distribution}=={self.versions[0]}"
            )
        self.install()
        _applied.add(self.name)


def after_import(name: str, install: Callable[[ModuleType], None]) -> None:
    """Call `install` with a module once it is imported, or now if it already is.

    Most processes of a server never need some modules, which import many others: a fix does not import them early.

    Args:
        name: the module's full name.
        install: changes the module in place.
    """
    if name in sys.modules:
        install(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ImportHook(name, install))


class _ImportHook(MetaPathFinder):
    """Finds one module once, as the other finders do, and makes its loader call `install`."""

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
    """Apply the fixes of one scope, in order.

    Args:
        patches: of any scope.
        scope: whose fixes are applied: such as `sglang-cpu`. The others are skipped.

    Raises:
        UserError: as `Patch.apply`; the fixes before that one stay installed.
    """
    for patch in patches:
        if patch.scope == scope:
            patch.apply()
