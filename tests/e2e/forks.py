"""`python forks.py DIRECTORY CASES`: the command line in a fork for each of CASES, a JSON object of argument lists.

Everything heavy is imported once. A case's output goes to DIRECTORY/NAME.out and .err, all exit codes to codes.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from megatron_bai import cli, compat


def main(directory: Path, cases: dict[str, list[str]]) -> None:
    compat.apply("megatron-cpu")  # as a run does, before it imports a model
    import megatron.core.models.gpt  # noqa: F401

    import megatron_bai.merge.pipeline  # noqa: F401
    import megatron_bai.rl.trainer  # noqa: F401

    codes = {}
    for name, arguments in cases.items():
        child = os.fork()
        if child == 0:
            _run(directory / name, arguments)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (directory / "codes.json").write_text(json.dumps(codes))


def _run(prefix: Path, arguments: list[str]) -> NoReturn:
    for stream, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prefix}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["megatron-bai", *arguments]
    code = 0
    try:
        cli.main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
