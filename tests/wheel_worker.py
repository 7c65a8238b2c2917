"""`wheel_worker.py SITE`, a list on stdin: command lines of an installed package, one by one in this process."""

import contextlib
import io
import json
import runpy
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path


def called(script: Path, words: list[str]) -> dict[str, str | int]:
    """Call a console script in this process."""
    sys.argv = [str(script), *words]
    code: str | int | None = 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        except Exception:
            code = 1
            traceback.print_exc()
    return {"code": code or 0, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    site = Path(sys.argv[1])
    assert not [name for name in ("math_verify", "datasets", "pytest") if find_spec(name)]
    assert not [finder for finder in sys.meta_path if "editable" in repr(finder).lower()]
    results = [called(site / "bin" / "megatron-bai", words) for words in json.load(sys.stdin)]
    ours = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "megatron_bai"}
    assert all(file is None or Path(file).is_relative_to(site / "megatron_bai") for file in ours.values()), ours
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
