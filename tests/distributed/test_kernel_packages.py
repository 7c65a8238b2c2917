"""Which of Transformer Engine, Apex and torch Megatron-Core's parts come from, and what is refused, with stand-ins.

Cases are `kernel_worker.CASES`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed.kernel_worker import CASES
from processes import TESTS, launch

pytestmark = pytest.mark.distributed
ENGINE, APEX = "Transformer Engine 2.11.0", "NVIDIA's Apex"
LAYERS, OPTIMIZER, NORM = "layers, norms and attention", "optimizer", "gradient norm and clipping"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker says of each case."""
    directory = tmp_path_factory.mktemp("kernels")
    results: dict[str, Any] = json.loads(
        launch(TESTS / "distributed" / "kernel_worker.py", directory, fresh=True).splitlines()[-1]
    )
    assert not {name: result["traceback"] for name, result in results.items() if "traceback" in result}
    return results


# Layers, and the optimizer with the gradients' norm: Transformer Engine's, else Apex's, else torch's.
CHOSEN = {
    "nothing, local": ("torch", "torch"),
    "engine": (ENGINE, ENGINE),
    "both": (ENGINE, ENGINE),
    "engine, local": ("torch", ENGINE),
    "apex, local": ("torch", APEX),
    "engine without a library, local": ("torch", APEX),
    "apex in Python alone, local": ("torch", "torch"),
    "apex that cannot be parsed": (ENGINE, ENGINE),
    "another apex, local": ("torch", "torch"),
    "a CPU with both": ("torch", "torch"),
}
REFUSED = {
    "nothing": "Transformer Engine is not installed, and without it a Python loop computes one expert after another",
    "engine without a library": "cannot be imported (OSError: libcudnn.so.9: cannot open shared object file), and",
    "engine without a library, named": "backend.transformer_impl is transformer_engine, and Transformer Engine",
    "engine without a library, required": "backend.require names transformer_engine, and Transformer Engine cannot be",
    "engine of another torch": "cannot be imported (ImportError: undefined symbol",
    "engine without grouped layers": "has no transformer_engine.pytorch.GroupedLinear",
    "engine of a newer release": "does not find in Transformer Engine 2.99.0 all that it uses",
    "apex in Python alone, required": "backend.require names apex, and NVIDIA's Apex was built without its CUDA",
    "apex of another torch, required": "backend.require names apex, and NVIDIA's Apex cannot be imported (ImportError",
    "apex without its optimizer, required": "backend.require names apex, and NVIDIA's Apex has no apex.optimizers",
    "another apex, required": "the `apex 0.9.10.dev0` here is another project, as PyPI's is: in a checkout of https://",
    "no apex, required": "backend.require names apex, and NVIDIA's Apex is not installed: in a checkout of https://",
    "no engine, required": "backend.require names transformer_engine, and Transformer Engine is not installed: install",
    "a CPU, required": "backend.require names apex, which only a run with CUDA uses: leave it out",
    "a CPU, named": "backend.transformer_impl names transformer_engine, which only a run with CUDA uses: leave it out",
}


def test_every_case_is_looked_at() -> None:
    assert CHOSEN.keys() | REFUSED.keys() == CASES.keys() and not CHOSEN.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", CHOSEN)
def test_parts_of_a_step_come_from(name: str, found: dict[str, Any]) -> None:
    kernels, (layers, optimizer) = found[name]["kernels"], CHOSEN[name]
    assert (kernels[LAYERS], kernels[OPTIMIZER], kernels[NORM]) == (layers, optimizer, optimizer)
    assert kernels[f"experts ({'one after another' if layers == 'torch' else 'grouped'})"] == layers
    assert kernels["gradient accumulation"] == "not fused"
    assert layers in found[name]["line"] and optimizer in found[name]["line"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_asked_for_and_missing_or_broken_is_refused_in_a_line(name: str, found: dict[str, Any]) -> None:
    said = found[name]["refused"]
    assert REFUSED[name] in said and "\n" not in said


def test_a_refusal_is_one_line_of_the_command_and_exit_code_2(tmp_path: Path) -> None:
    words = ["train", "experiment=demo_pretrained", f"run.dir={tmp_path}/run", f"trainer.save={tmp_path}/saved"]
    command = [sys.executable, "-m", "megatron_bai", *words, "backend.kind=cpu", "backend.require=[transformer_engine]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        "megatron-bai: error: backend.require names transformer_engine, which only a run with CUDA uses: leave it out"
    ]


def test_a_loop_over_experts_has_to_be_asked_for(found: dict[str, Any]) -> None:
    for name in ("nothing", "engine without a library", "engine of a newer release"):
        assert found[name]["refused"].endswith("or set backend.transformer_impl=local")


def test_what_is_installed_and_of_no_use_is_named(found: dict[str, Any]) -> None:
    def logged(name: str) -> str:
        return " ".join(found[name]["logged"])

    assert "NVIDIA's Apex was built without its CUDA extensions (amp_C), so" in logged("apex in Python alone, local")
    assert "SyntaxError" in logged("apex that cannot be parsed") and "another project" in logged("another apex, local")
    assert "libcudnn" in logged("engine without a library, local")
    assert not logged("both") and not logged("nothing, local")
