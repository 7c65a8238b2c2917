"""A run's running record: `metrics.jsonl`, `config.yaml`, and one line a step on the terminal."""

import json
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

from megatron_bai import config


class Progress:
    """Writes steps as they end. On a rank that is not `active` it does nothing."""

    def __init__(self, directory: str | Path, settings: config.Config, steps: int, active: bool):
        self.directory, self.active, self.total = Path(directory), active, steps
        if not active:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(settings), self.directory / "config.yaml", resolve=True)
        self._file = open(self.directory / "metrics.jsonl", "w", encoding="utf-8")
        self._console = Console(file=sys.stdout, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal, transient=True,
        )
        self._task = self._bar.add_task("steps", total=steps)

    def __enter__(self) -> "Progress":
        if self.active:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.active:
            self._bar.stop()
            self._file.close()

    def step(self, values: dict[str, Any], shown: tuple[str, ...]) -> None:
        """Record one step's values, and show some of them."""
        if not self.active:
            return
        clean = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        words = [f"{name} {values[name]:.4g}" for name in shown if values.get(name) is not None]
        self._console.print(f"step {values['step']:>4}/{self.total}  " + "  ".join(words), soft_wrap=True)
        self._bar.advance(self._task)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one go: a reader sees the old one or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
