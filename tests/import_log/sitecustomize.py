"""With this directory on PYTHONPATH each process notes in the file ENGINE_IMPORTS where it imported an engine from.

Python imports this file at its start. `tests/engine_releases.py` reads the notes.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

ENGINES = ("megatron.core", "sglang", "transformers")


class _Noting(SourceFileLoader):
    def exec_module(self, module: Any) -> None:
        with open(os.environ["ENGINE_IMPORTS"], "a", encoding="utf-8") as log:
            log.write(f"{self.name}\t{self.path}\n")  # a short line that is appended is written whole
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in ENGINES else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Noting(spec.loader.name, spec.loader.path)
        return spec


if os.environ.get("ENGINE_IMPORTS"):
    sys.meta_path.insert(0, _Finder)
