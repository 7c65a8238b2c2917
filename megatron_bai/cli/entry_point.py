"""`megatron-bai VERB [group.key=value …]`: every verb takes the same Hydra configuration."""

import importlib
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import hydra

from megatron_bai import config
from megatron_bai.cli import multirun
from megatron_bai.cli.compose import compose, hydra_errors_as_user_errors
from megatron_bai.cli.help_text import overview, verb_help
from megatron_bai.cli.verbs import VERBS
from megatron_bai.errors import UserError, from_peer_error
from megatron_bai.utils import terminal_logging
from megatron_bai.utils.imports import gc_disabled_for_imports

_RANK_0_HEAD_START_S = 5.0  # of a rank, while another says what went wrong
_MULTIRUN_FLAGS = ("--multirun", "-m")
_HYDRA_FLAGS = re.compile(r"^(--cfg|-c|--info|-i|--resolve|--package|-p|--hydra-help|--shell-completion)")
_OVERRIDE = re.compile(r"~|[^-=][^=]*=")


def main() -> None:
    """Run the command line; the exit code is 0, 1 (the main job cannot run), 2 (a user's mistake) or 130 (Ctrl-C)."""
    terminal_logging.setup()
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|hydra)\b")
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    try:
        _dispatch(sys.argv[1:])
    except UserError as error:
        _print_error(error)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("megatron-bai: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not (lost := from_peer_error(error)):
            _wait_for_rank_0()
            raise
        if _print_error(lost) == 0:
            time.sleep(
                _RANK_0_HEAD_START_S + 1
            )  # torchrun ends the others with this one: let the one that failed say why
        sys.exit(2)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(overview())
        return
    name, *rest = arguments
    if name not in VERBS:
        raise UserError(f"there is no verb {name!r}: choose one of {', '.join(VERBS)}")
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(verb_help(name, verb))
        return
    config.register_schema()
    overrides = [word for word in rest if word not in _MULTIRUN_FLAGS]
    if overrides != rest:
        with hydra_errors_as_user_errors():
            multirun.run_multirun(name, overrides, compose)
        return
    if any(_HYDRA_FLAGS.match(word) for word in rest):  # Hydra's own: printing the configuration
        compose([word for word in rest if _OVERRIDE.match(word)])
        sys.argv = [f"megatron-bai {name}", *rest]
        start = hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
        start(lambda settings: None)()
        return
    settings = compose(rest)
    module, _, function = verb.function.partition(":")
    with gc_disabled_for_imports():
        run: Callable[[config.Config], None] = getattr(importlib.import_module(module), function)
    run(settings)


def _print_error(error: UserError) -> int:
    """Print the error in one line. Returns this process's rank."""
    rank = _wait_for_rank_0()
    where = f" [rank {rank}]" if rank else ""
    print(f"megatron-bai: error{where}: {error}", file=sys.stderr, flush=True)
    return rank


def _wait_for_rank_0() -> int:
    """Wait on other ranks than 0: torchrun ends them meanwhile if they fail as rank 0 does, or because it left."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(_RANK_0_HEAD_START_S)
    return rank


def _on_sigterm(number: int, frame: Any) -> None:
    """Unwind at SIGTERM as at an exception, so that the server is stopped and files are closed."""
    raise SystemExit(128 + number)
