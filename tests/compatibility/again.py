"""`python again.py DIRECTORY CASES`: one of `e2e/forks.py`, where files have no times (`timeless.py`)."""

import json
import sys
from pathlib import Path

import forks
from timeless import forget_times

if __name__ == "__main__":
    forget_times(".")
    forks.main(Path(sys.argv[1]), json.loads(sys.argv[2]))
