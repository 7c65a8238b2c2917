"""Copies of the stand-ins for Transformer Engine and Apex in `stubs/`, whole or with a fault, and PyPI's `apex`."""

import shutil
from pathlib import Path

STUBS = Path(__file__).parent / "stubs"
SYMBOL = "undefined symbol: _ZN3c104cuda9SetDeviceEa"


def place_transformer_engine(directory: Path, fault: str = "") -> None:
    """Put Transformer Engine into a directory.

    Args:
        directory: for the path.
        fault: `library` (one it needs is not there), `symbol` (built for another torch), `grouped` (one without grouped
            layers), `newer` (one in which Megatron-Core finds other modules), `killed` (its import ends the process).
    """
    package = directory / "transformer_engine"
    shutil.copytree(STUBS / "transformer_engine", package, ignore=shutil.ignore_patterns("__pycache__"))
    torch_part = package / "pytorch" / "__init__.py"
    added = {
        "": "",
        "library": 'raise OSError("libcudnn.so.9: cannot open shared object file\\nsecond line")',
        "symbol": f'raise ImportError("{SYMBOL}")',
        "grouped": "del GroupedLinear",
        "newer": "",
        "killed": "import os; os.abort()",
    }[fault]
    torch_part.write_text(f"{torch_part.read_text()}\n{added}\n")
    if fault == "newer":
        (package / "pytorch" / "fp8.py").unlink()
        init = package / "__init__.py"
        init.write_text(init.read_text().replace("2.11.0", "2.99.0"))


def place_apex(directory: Path, fault: str = "") -> None:
    """Put an Apex into a directory.

    Args:
        directory: for the path.
        fault: `python` (built without its CUDA extensions), `symbol`, `optimizer` (one without its optimizer), `syntax`
            (an error that is no ImportError) or `other` (PyPI's project of that name).
    """
    package = directory / "apex"
    if fault == "other":
        package.mkdir()
        (package / "__init__.py").write_text("from pyramid.security import NO_PERMISSION_REQUIRED\n")
        about = directory / "apex-0.9.10.dev0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n")
        return
    shutil.copytree(STUBS / "apex", package, ignore=shutil.ignore_patterns("__pycache__"))
    if fault != "python":
        shutil.copy(STUBS / "amp_C.py", directory)
    added = {"symbol": f'raise ImportError("{SYMBOL}")', "syntax": "print 1", "optimizer": "del FusedAdam"}.get(fault)
    if added:
        file = package / "optimizers" / "__init__.py"
        file.write_text(f"{file.read_text()}\n{added}\n")
