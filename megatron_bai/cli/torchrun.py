"""`megatron-bai torchrun [OPTION …] VERB …`: torchrun, without its report below a line that a rank has said already.

torchrun's own command prints what its agent logged, a traceback and a table of failures whenever a rank ends with an
error, some forty lines around the one that says what to do. Here the agent and its options are torch's; the settings
are read once before it starts any rank, and its report is a line where no rank has said one. Where ranks write to files
(`--redirects`, `--tee`) and no `--log-dir` is given, these are below `run.dir/logs`, in a directory for each host.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from argparse import ArgumentParser
from typing import Any, NoReturn

from megatron_bai import config
from megatron_bai.cli.compose import compose
from megatron_bai.cli.verbs import VERBS, Verb
from megatron_bai.config.limits import unknown_name
from megatron_bai.errors import UserError, os_errors_as_user_errors
from megatron_bai.utils.stop_signals import stop_signals

_USER_MISTAKE = 2  # exit code of a rank that has said in a line what is wrong
_REPEATED_BY_US = "torch.distributed.elastic.multiprocessing.api"  # logs which process failed, and which it ends


def launch(arguments: list[str]) -> NoReturn:
    """Start the ranks of a verb, wait for them, and exit: with 0, a rank's 2, 1, or 128 + the signal that ended them.

    Args:
        arguments: torchrun's options, a verb and its settings.

    Raises:
        UserError: an option, the verb or a setting is wrong, or a rank ended without a line that says why.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = _parse(run.get_args_parser(), arguments)
    if args.log_dir:
        with os_errors_as_user_errors(args.log_dir):
            os.makedirs(args.log_dir, exist_ok=True)
    if args.nproc_per_node != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun would choose, with a warning
    if signal.SIGHUP not in stop_signals():  # torch's agent would handle it under nohup, too
        args.signals_to_handle = ",".join(name for name in args.signals_to_handle.split(",") if name != "SIGHUP")
    logging.getLogger(_REPEATED_BY_US).setLevel(logging.CRITICAL)
    where = f" (its output is below {args.log_dir})" if args.log_dir else ""
    with tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True) as scratch:
        if not args.log_dir and args.redirects == args.tee == "0":
            args.log_dir = scratch  # torch would make two of its own, and leave them
        try:
            run.config_from_args(args)
        except ValueError as error:
            _refuse(str(error))
        try:
            run.run(args)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode != _USER_MISTAKE or (rank and args.redirects != "0"):
                print(f"megatron-bai: error: rank {rank} {_describe_end(failure.exitcode)}{where}", file=sys.stderr)
            sys.exit(_USER_MISTAKE if failure.exitcode == _USER_MISTAKE else 1)
        except SignalException as error:
            sys.exit(128 + int(error.sigval))
    sys.exit(0)


def _parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    """Parse torchrun's options, and read the verb's settings as every rank will."""
    parser.prog = "megatron-bai torchrun"
    parser.error = _refuse  # type: ignore[method-assign]
    args = parser.parse_args(arguments)
    name, words = args.training_script, args.training_script_args
    if args.module or args.no_python or args.run_path:
        raise UserError("megatron-bai torchrun takes a verb: leave out --module, --no-python and --run-path")
    if name not in VERBS:
        raise UserError(unknown_name(f"there is no verb {name!r}", name, VERBS))
    settings = _read_settings(VERBS[name], words)
    if not args.log_dir and (args.redirects, args.tee) != ("0", "0"):  # each rank's output to a file
        args.log_dir = os.path.join(settings.run.dir if settings else "runs", "logs", socket.gethostname())
    args.module, args.training_script, args.training_script_args = True, "megatron_bai", [name, *words]
    return args


def _read_settings(verb: Verb, words: list[str]) -> config.Config | None:
    """Refuse wrong settings before there are ranks; with flags, such as --help, which are the verb's, return None."""
    if any(word.startswith("-") for word in words):
        return None
    config.register_schema()
    return compose(words, verb)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"torchrun: {message}: see megatron-bai torchrun --help")


def _describe_end(exit_code: int) -> str:
    """Describe how a process ended, by its exit code or the signal that is its negative."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"
