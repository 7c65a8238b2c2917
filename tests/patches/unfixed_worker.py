"""Run a script as if this package fixed nothing of Megatron-Core: `unfixed_worker.py SCRIPT ARGUMENTS`."""

import runpy
import sys

if __name__ == "__main__":
    from megatron_bai import compat
    from megatron_bai.model import build

    compat.PATCHES = ()
    build._mark_experts = lambda model: None
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
