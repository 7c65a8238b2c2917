"""That something is compiled is said, once; that it comes from the cache is not."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from numba import types
from megatron_bai.utils.numba_jit import jit_compile

@jit_compile(types.int64(types.int64))
def double(x):
    return 2 * x

@jit_compile(types.int64(types.int64))
def triple(x):
    return 3 * x

assert (double(3), triple(3)) == (6, 9)
"""


def test_what_numba_compiles_is_said_once_for_an_installation(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    said = [
        subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stderr for _ in range(2)
    ]
    assert said == ["compiling loops for this machine: seconds, once for an installation\n", ""]
