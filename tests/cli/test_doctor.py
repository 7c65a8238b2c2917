"""The doctor: what it calls a fault, what merely disables something, and its exit code."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import kernel_stubs
import pytest

from megatron_bai import project_files
from megatron_bai.cli import doctor
from megatron_bai.compat import Patch
from megatron_bai.config import Backend, Config
from megatron_bai.errors import UserError

CPU = doctor.Machine(gpus=(), cores=2, memory_gib=24.0, cpu_flags=frozenset(), compiler="/usr/bin/cc")
GPU = replace(CPU, gpus=("NVIDIA H100, 81559 MiB",))
PINS = {"torch": "2.13.0+cpu", "megatron-core": "0.16.1", "transformers": "5.12.1", "sglang": "0.5.21"}


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """Distributions the doctor finds; a test changes it."""
    found = dict(PINS)
    monkeypatch.setattr(doctor, "_version", lambda name: found.get(name))
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: Own())
    monkeypatch.setattr(doctor.compat, "PATCHES", ())
    return found


class Own(dict):
    """The package's metadata as the tests need it."""

    def __init__(self) -> None:
        super().__init__({"Requires-Python": ">=3.10"})

    def get_all(self, key: str) -> list[str]:
        pins = [f"{name}=={version.partition('+')[0]}" for name, version in PINS.items() if name != "sglang"]
        return [*pins, 'sglang==0.5.21; extra == "gpu"', 'unheard-of==1; extra == "test"']


def look(backend: Backend | None = None, machine: doctor.Machine = CPU) -> dict[str, doctor.Finding]:
    return {finding.piece: finding for finding in doctor.collect_findings(backend or Backend(), machine)}


def faults(found: dict[str, doctor.Finding]) -> set[str]:
    return {piece for piece, finding in found.items() if finding.state == "fault"}


def test_a_sound_cpu_machine(installed):
    found = look()
    assert not faults(found)
    assert found["torch"].found == "2.13.0+cpu" and found["torch"].state == "ok"
    assert found["GPUs"].state == found["AMX"].state == "without"
    assert "unheard-of" not in found  # the tests' extra is no requirement of the main job


@pytest.mark.parametrize("name", PINS)
def test_every_pin_is_compared(installed, name):
    installed[name] = "0.0.1"
    assert faults(look()) == {name} and "make install" in look()[name].note
    del installed[name]
    assert faults(look()) == {name} and look()[name].found == "missing"


def test_releases_of_the_table_are_taken_beside_the_pin(installed):
    others = {"sglang": ("0.5.22", "0.5.23"), "transformers": ("5.19.0",), "torch": ("2.14.1", "2.14.1+cpu")}
    for name, release in ((name, release) for name, releases in others.items() for release in releases):
        installed[name] = release
        assert not faults(look()) and look()[name].found == release
    installed["sglang"] = "0.5.24"
    assert faults(look()) == {"sglang"}


def test_an_engine_is_told_its_row_or_what_one_without_a_row_needs(installed):
    notes = {name: look()[name].note for name in ("megatron-core", "sglang")}
    assert notes == {
        "megatron-core": "the training engine; row 0.16.1 of the table of releases",
        "sglang": "rollouts: the inference engine; row 0.5.21 of the table of releases",
    }
    installed |= {"megatron-core": "0.20.0", "sglang": "0.5.24"}
    for name, row in (("megatron-core", "0.19.2"), ("sglang", "0.5.23")):
        assert f"backend.untested=true takes it as {row}, if a probe" in look()[name].note
        assert "on a CPU it needs compatibility fixes that name it" in look()[name].note
    untested = Backend(untested=True, transformer_impl="local")
    assert faults(look(untested, GPU)) == set() and look(untested, GPU)["sglang"].state == "without"
    assert faults(look(untested)) == faults(look(Backend(transformer_impl="local"), GPU)) == {"megatron-core", "sglang"}
    installed |= {"megatron-core": "0.15.3", "sglang": "0.5.20"}
    assert faults(look(untested, GPU)) == {"megatron-core", "sglang"}
    assert "before the first row of the table of releases, 0.16.0" in look()["megatron-core"].note
    assert "row 0.5.20 of the table of releases, at rollout.urls alone" in look()["sglang"].note


def test_beside_an_installed_package_pip_is_the_remedy(installed, monkeypatch):
    del installed["sglang"]
    monkeypatch.setattr(project_files, "checkout", lambda: None)
    assert look()["sglang"].note.endswith("pip install 'sglang==0.5.21'")


def test_files_of_the_package(installed, monkeypatch, tmp_path):
    assert look()["launch scripts"].found.endswith("/launch") and look()["configuration"].found.endswith("/conf")
    monkeypatch.setattr(project_files, "checkout", lambda: tmp_path)
    assert faults(look()) == {"launch scripts", "configuration"}


def test_another_requirement_missing(installed, monkeypatch):
    monkeypatch.setattr(Own, "get_all", lambda self, key: ["plotly>=6.0"])
    assert faults(look()) == {"plotly", "other requirements"}


def test_devices(installed):
    cuda = Backend(kind="cuda", transformer_impl="local")
    assert faults(look(cuda)) == {"GPUs"}
    assert faults(look(cuda, GPU)) == {"GPUs"}  # a CPU build of torch beside a GPU
    installed["torch"] = "2.13.0+cu130"
    assert not faults(look(cuda, GPU))
    assert look(machine=replace(CPU, compiler=None))["C compiler"].state == "without"


def test_optional_pieces_name_what_is_lost_on_a_gpu_only(installed, monkeypatch):
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    assert "fused" in look(machine=GPU)["apex"].note and "not needed" in look()["apex"].note
    assert "unfused" in look(machine=GPU)["flash-attn"].note and "not needed" in look()["flash-attn"].note


def test_without_transformer_engine_a_run_on_gpus_is_refused(installed):
    found = look(machine=GPU)
    assert faults(found) == {"transformer-engine"} and found["training kernels"].note == "none, the run is refused"
    assert "docs/gpu.md" in found["transformer-engine"].note
    found = look(Backend(transformer_impl="local"), GPU)
    assert not faults(found) and found["training kernels"].note.endswith(": torch")
    assert faults(look(Backend(transformer_impl="local", require=["apex"]), GPU)) == {"apex"}
    assert not faults(look(Backend(kind="cpu"), GPU)) and not faults(look())
    assert faults(look(Backend(require=["apex"]))) == {"training kernels"}, "a CPU has no use for it"


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A directory that this process and those it starts import from."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    return tmp_path


def test_another_apex_is_told_apart_without_a_gpu(installed, path):
    kernel_stubs.place_apex(path, "other")
    assert look()["apex"].found == "another project" and look()["apex"].state == "without"


def test_nothing_is_imported_for_a_cpu(installed, path):
    kernel_stubs.place_transformer_engine(path, "killed")
    assert look()["transformer-engine"].note == "not used on a CPU"


@pytest.mark.distributed
def test_packages_are_imported_for_gpus_and_named_with_what_they_are_used_for(installed, path):
    kernel_stubs.place_transformer_engine(path)
    init = path / "transformer_engine" / "__init__.py"
    init.write_text(init.read_text().replace("2.11.0", "2.18.0"))
    kernel_stubs.place_apex(path, "python")
    found = look(machine=GPU)
    assert not faults(found) and found["transformer-engine"].found == "2.18.0"
    assert "Megatron-Core 0.16.1 names <2.12.0,>=2.9.0" in found["transformer-engine"].note
    assert "built without its CUDA extensions (amp_C)" in found["apex"].note and "APEX_CUDA_EXT=1" in found["apex"].note
    assert "optimizer, gradient norm and clipping: Transformer Engine 2.18.0" in found["training kernels"].note


@pytest.mark.distributed
def test_an_import_that_ends_its_process_is_a_fault(installed, path):
    kernel_stubs.place_transformer_engine(path, "killed")
    found = look(machine=GPU)
    assert faults(found) == {"training kernels"} and "exit code -6" in found["training kernels"].note


def test_patches(installed, monkeypatch):
    patch = Patch("fix", "megatron-bai", ("0.0.0",), "megatron-cpu", "a symptom", lambda: None)
    ready = replace(patch, versions=(metadata.version("megatron-bai"),))
    monkeypatch.setattr(doctor.compat, "PATCHES", (ready,))
    assert look()["patch fix"].state == "ok" and "ready: a symptom" in look()["patch fix"].note
    monkeypatch.setattr(doctor.compat, "PATCHES", (patch,))
    assert faults(look()) == {"patch fix"} and "0.0.0" in look()["patch fix"].note
    assert not faults(look(Backend(transformer_impl="local"), GPU))
    monkeypatch.setattr(doctor.compat, "PATCHES", (replace(patch, scope="sglang-models"),))
    assert faults(look(Backend(transformer_impl="local"), GPU)) == {"patch fix"}
    assert not faults(look(Backend(transformer_impl="local", untested=True), GPU)), "a run does without it"


def test_exit_code_and_text(installed, monkeypatch, capsys):
    monkeypatch.setattr(doctor.Machine, "detect", classmethod(lambda cls: CPU))
    doctor.run(Config())
    assert "can run here, on the CPU" in capsys.readouterr().out
    del installed["sglang"]
    with pytest.raises(SystemExit) as error:
        doctor.run(Config())
    assert error.value.code == 1 and "cannot run here: sglang" in capsys.readouterr().out


def test_not_installed(monkeypatch):
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "metadata", absent)
    with pytest.raises(UserError, match="make install"):
        look()


def test_imports_nothing_heavy():
    code = (
        "import sys; from megatron_bai.cli import doctor;"
        "from megatron_bai.config import Backend; list(doctor.collect_findings(Backend(), doctor.Machine.detect()));"
        "sys.exit(', '.join({'torch', 'transformers', 'sglang', 'megatron.core'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
