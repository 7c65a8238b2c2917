"""Running Megatron-Core in processes of its own: on a CPU it changes what `torch.cuda` means in a process."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def launch(script: Path, processes: int, *arguments: object) -> str:
    """Run a script under torchrun, with this directory importable, and return what it printed.

    Raises:
        AssertionError: a rank failed; shows the end of what all of them said.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*torchrun, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
