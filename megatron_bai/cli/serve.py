"""The verb `serve`: SGLang on a checkpoint, until interrupted."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree

from megatron_bai import config
from megatron_bai.checkpoint import atomic_dir, formats, hf_files, manifest
from megatron_bai.compat.releases import admit_untested
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import Architecture, find_architecture, require_served
from megatron_bai.model.convert import convert
from megatron_bai.model.hf_reader import HFReader
from megatron_bai.model.required_tensors import require_tensors
from megatron_bai.rl.writable_dirs import require_writable
from megatron_bai.rollout.servers import fleet
from megatron_bai.rollout.servers.ports import require_local_address
from megatron_bai.rollout.servers.releases import is_untested
from megatron_bai.rollout.servers.sglang_server import SGLangServer, installed_release

_log = logging.getLogger(__name__)


def run(settings: config.Config) -> None:
    """Serve `serve.checkpoint`, converted to Hugging Face format first where it is Megatron's.

    Raises:
        UserError: no such checkpoint, or the server did not start or ended by itself.
    """
    source = settings.serve.checkpoint or settings.merge.output
    if not source:
        raise UserError("serve.checkpoint is empty: give a Hugging Face or Megatron checkpoint")
    checkpoint_format = formats.require_model(source)
    if settings.rollout.exact:
        raise UserError(
            "rollout.exact is for train, whose forward passes it changes along with its servers': leave it out"
        )
    kind = backend.select_device(settings.backend).kind
    fleet.validate_kind(settings.rollout, kind)
    admit_untested(settings.backend.untested)
    require_writable("run.dir", settings.run.dir)
    require_local_address("rollout.host", settings.rollout.host, settings.rollout.port)
    with ExitStack() as stack:
        directory = Path(source)
        model = find_architecture(directory)  # SGLang may have models that are no family of ours
        if model is not None:
            require_served(model, settings.rollout.tensor)
            require_tensors(directory, model)  # SGLang would leave at random what is missing, and drop what it lacks
        if checkpoint_format == "hf" and not (model is not None and _needs_copy(directory, model)):
            _require_no_others(directory)
            manifest.verify_weights(source)  # SGLang would not notice; `convert` does so itself
        else:
            # Made anew each time, and removed: the source may have changed until the next.
            directory = Path(settings.run.dir) / "serve" / "model"
            formats.require_complete(source)
            stack.callback(_remove_copy, directory)
            convert(settings, source, directory, "hf")
        log = Path(settings.run.dir) / "serve" / "server.log"
        server = stack.enter_context(SGLangServer(directory, settings.rollout, log, kind, text=True))
        if is_untested(release := installed_release()):
            _log.warning("SGLang %s was not tried with this package; what it serves is compared with nothing", release)
        print(f"serving {source} at {server.url} (log: {log}); Ctrl-C stops it", flush=True)
        while True:
            time.sleep(1)
            server.check_alive()


def _needs_copy(directory: Path, model: Architecture) -> bool:
    """Return whether SGLang reads a Hugging Face checkpoint as another model than transformers does.

    It drops fused experts, and takes what `config.json` leaves out otherwise. A copy has published names and keys.
    """
    return HFReader(directory).has_fused_experts(model) or bool(model.family.missing_values(model, model.raw))


def _remove_copy(directory: Path) -> None:
    """Remove a converted checkpoint, complete or not."""
    rmtree(directory, ignore_errors=True)
    atomic_dir.remove_leftovers(directory)


def _require_no_others(path: Path) -> None:
    """Refuse files that SGLang would read beside the checkpoint's, or in place of them.

    It takes the files that the index names, and without an index every file there is, one after another.

    Args:
        path: directory of the checkpoint.

    Raises:
        UserError: names the file.
    """
    single, index = hf_files.SINGLE, path / hf_files.INDEX
    if index.is_file() and not hf_files.read_weight_map(path):
        raise UserError(f"{index} is damaged, and SGLang would take it: remove it, {single} has all tensors")
    others = sorted(file.name for file in path.glob(f"*{hf_files.SUFFIX}") if file.name != single)
    if others and not index.is_file():
        raise UserError(
            f"{path} holds {others[0]} beside {single}, and no {index.name}: SGLang would read both, move away the one"
            " that is not the model's"
        )
