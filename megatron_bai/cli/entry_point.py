"""`megatron-bai VERB [group.key=value …]`: every verb takes the same Hydra configuration."""

import codecs
import errno
import functools
import hashlib
import importlib
import locale
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
from omegaconf import OmegaConf

from megatron_bai import config
from megatron_bai.checkpoint.iterations import resolve_settings
from megatron_bai.cli import multirun, torchrun
from megatron_bai.cli.compose import compose, compose_unresolved, hydra_errors_as_user_errors
from megatron_bai.cli.help_text import overview, verb_help
from megatron_bai.cli.overrides import for_hydra
from megatron_bai.cli.verbs import VERBS
from megatron_bai.compat.megatron_notices import hide_notices
from megatron_bai.config.limits import unknown_name
from megatron_bai.errors import UserError, from_os_error, from_peer_error
from megatron_bai.utils import terminal_logging
from megatron_bai.utils.child_processes import stop_after_parent
from megatron_bai.utils.imports import gc_disabled_for_imports
from megatron_bai.utils.stop_signals import unwind_at_stop_signals
from megatron_bai.utils.terminal_text import escape_controls

_STOP_AFTER_TORCHRUN_S = 30.0  # from SIGTERM to SIGKILL, once torchrun was killed; as long as torchrun itself waits
_RANK_0_HEAD_START_S = 5.0  # of a rank, while another says what went wrong
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a write, which names no file
_MULTIRUN_FLAGS = ("--multirun", "-m")
_HYDRA_FLAGS = re.compile(r"^(--cfg|-c|--info|-i|--resolve|--package|-p|--hydra-help|--shell-completion)")
_CFG_JOB = ({"--cfg", "job"}, {"-c", "job"}, {"--cfg=job"})  # the only one of them that shows mappings, too
_OVERRIDE = re.compile(r"~|[^-=][^=]*=")


def main() -> None:
    """Run the command line; the exit code is 0, 1 (the main job cannot run), 2 (a user's mistake) or 130 (Ctrl-C)."""
    _leave_ascii_locale()
    terminal_logging.setup()
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers|hydra)\b")
    hide_notices()
    unwind_at_stop_signals()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_after_parent(_STOP_AFTER_TORCHRUN_S)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    try:
        _dispatch(sys.argv[1:])
        if sys.stdout is not None:  # None where it was closed
            sys.stdout.flush()
    except UserError as error:
        _print_error(error)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has seen enough
        _drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        print("megatron-bai: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _DISK_ERRORS:
            _drop_output()
            _print_error(from_os_error(error, "what was being written, such as the standard output"))
            sys.exit(2)
        if not (lost := from_peer_error(error)):
            _wait_for_rank_0()
            raise
        if _print_error(lost) == 0:
            time.sleep(
                _RANK_0_HEAD_START_S + 1
            )  # torchrun ends the others with this one: let the one that failed say why
        sys.exit(2)


def _drop_output() -> None:
    """Let what is not written yet go nowhere: Python would try once more at its end, and print a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_ascii_locale() -> None:
    """Start this process again in UTF-8 where its locale is ASCII, in which torch cannot read its own files."""
    if codecs.lookup(locale.getpreferredencoding(False)).name == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(overview())
        return
    name, *rest = arguments
    if name == "torchrun":
        torchrun.launch(rest)
    if name not in VERBS:
        raise UserError(unknown_name(f"there is no verb {name!r}", name, VERBS))
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(verb_help(name, verb))
        return
    config.register_schema()
    overrides = [word for word in rest if word not in _MULTIRUN_FLAGS]
    if overrides != rest:
        with hydra_errors_as_user_errors():
            multirun.run_multirun(name, overrides, functools.partial(compose, verb=verb))
        return
    if any(_HYDRA_FLAGS.match(word) for word in rest):  # Hydra's own: printing the configuration
        words = [word for word in rest if _OVERRIDE.match(word)]
        compose(words, verb)
        flags = [word for word in rest if word not in words]
        if set(flags) - {"--resolve"} in _CFG_JOB:
            print(OmegaConf.to_yaml(compose_unresolved(words), resolve="--resolve" in flags), end="")
            return
        sys.argv = [f"megatron-bai {name}", *flags, *for_hydra(words)[0]]
        start = hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
        start(lambda settings: None)()
        return
    settings = resolve_settings(compose(rest, verb))
    module, _, function = verb.function.partition(":")
    with gc_disabled_for_imports():
        run: Callable[[config.Config], None] = getattr(importlib.import_module(module), function)
    run(settings)


def _print_error(error: UserError) -> int:
    """Print the error in one line, unless another rank of this machine has said it. Returns this process's rank."""
    rank = _wait_for_rank_0()
    where = f" [rank {rank}]" if rank else ""
    if _is_first_to_say(str(error)):
        print(f"megatron-bai: error{where}: {escape_controls(str(error))}", file=sys.stderr, flush=True)
    return rank


def _is_first_to_say(text: str) -> bool:
    """Return whether no other rank has said this: a file beside torchrun's own for errors stands for what was said.

    Waiting alone does not tell: how long torchrun takes to end a rank depends on the machine's load.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # LOG_DIR/RUN/attempt_N/LOCAL_RANK/error.json
    if not own:
        return True
    said = Path(own).parent.parent / f"said-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}"
    try:
        os.close(os.open(said, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:  # no directory: another launcher's variable
        return True
    return True


def _wait_for_rank_0() -> int:
    """Wait on other ranks than 0: torchrun ends them meanwhile if they fail as rank 0 does, or because it left."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(_RANK_0_HEAD_START_S)
    return rank
