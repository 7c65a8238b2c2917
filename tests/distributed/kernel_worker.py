"""Run as a script: what a run has of Transformer Engine and Apex. Arguments: a directory for copies of stand-ins.

Each case is a process of its own, a fork that has torch, with the copies of its stand-ins on its path and a torch that
says it has CUDA where the case does. Prints JSON: for each case what is logged, and the kernels or the refusal.
"""

import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import kernel_stubs
import torch

from megatron_bai import config
from megatron_bai.errors import UserError


@dataclass(frozen=True)
class Case:
    """Faults of both packages, as in `kernel_stubs`, or None: it is not there; and the settings."""

    engine: str | None = None
    apex: str | None = None
    kind: str = "cuda"
    impl: str = "auto"
    require: list[str] = field(default_factory=list)


CASES = {
    "nothing": Case(),
    "nothing, local": Case(impl="local"),
    "engine": Case(""),
    "both": Case("", "", require=["transformer_engine", "apex"]),
    "engine, local": Case("", impl="local"),
    "apex, local": Case(None, "", impl="local", require=["apex"]),
    "engine without a library": Case("library"),
    "engine without a library, named": Case("library", impl="transformer_engine"),
    "engine without a library, local": Case("library", "", impl="local"),
    "engine without a library, required": Case("library", impl="local", require=["transformer_engine"]),
    "engine of another torch": Case("symbol"),
    "engine without grouped layers": Case("grouped"),
    "engine of a newer release": Case("newer"),
    "apex in Python alone, local": Case(None, "python", impl="local"),
    "apex in Python alone, required": Case("", "python", require=["apex"]),
    "apex of another torch, required": Case("", "symbol", require=["apex"]),
    "apex without its optimizer, required": Case("", "optimizer", require=["apex"]),
    "apex that cannot be parsed": Case("", "syntax"),
    "another apex, local": Case(None, "other", impl="local"),
    "another apex, required": Case("", "other", require=["apex"]),
    "no apex, required": Case("", require=["apex"]),
    "no engine, required": Case(impl="local", require=["transformer_engine"]),
    "a CPU with both": Case("", "", kind="cpu"),
    "a CPU, required": Case(kind="cpu", require=["apex"]),
    "a CPU, named": Case(kind="cpu", impl="transformer_engine"),
}


def look(case: Case, directory: Path) -> dict[str, Any]:
    """Do what a run does with its settings first; return its kernels, or the refusal."""
    from megatron_bai.distributed import backend

    directory.mkdir()
    if case.engine is not None:
        kernel_stubs.place_transformer_engine(directory, case.engine)
    if case.apex is not None:
        kernel_stubs.place_apex(directory, case.apex)
    sys.path.insert(0, str(directory))
    if case.kind == "cuda":
        cuda: Any = torch.cuda
        cuda.is_available, cuda.device_count, cuda.set_device = lambda: True, lambda: 1, lambda device: None
        backend.dist.init_process_group = lambda *args, **named: None
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("megatron_bai").addHandler(handler)
    settings = config.Backend(kind=case.kind, transformer_impl=case.impl, require=case.require)
    try:
        device = backend.init_backend(settings)
    except UserError as error:
        return {"logged": logged, "refused": str(error)}
    from megatron_bai.distributed.kernel_sources import describe_kernels, format_kernels

    kernels = describe_kernels(device.use_transformer_engine)
    return {"logged": logged, "kernels": kernels, "line": format_kernels(device.use_transformer_engine)}


def in_fork(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a fork, as JSON; if it raises, its traceback."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            found = function()
        except BaseException:
            found = {"traceback": traceback.format_exc()}
        with os.fdopen(write, "w") as file:
            json.dump(found, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found = json.loads(file.read() or '{"traceback": "the process ended"}')
    os.waitpid(child, 0)
    return found


def needed_by_megatron() -> list[str]:
    """Return what is imported with Megatron-Core, and is not of it: most of the time that takes."""
    before = set(sys.modules)
    importlib.import_module("megatron.core.optimizer")
    return [name for name in sys.modules if name not in before and not name.startswith("megatron")]


def main(directory: Path) -> None:
    """Print what each case found; one that raises what is no refusal has its traceback."""
    for name in in_fork(needed_by_megatron):
        with suppress(Exception):
            importlib.import_module(name)
    assert "megatron.core" not in sys.modules, "each case imports it by itself"
    cases = enumerate(CASES.items())
    print(json.dumps({name: in_fork(partial(look, case, directory / str(i))) for i, (name, case) in cases}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
