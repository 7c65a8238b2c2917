"""Save and load Megatron `torch_dist` checkpoints, readable in any parallel layout.

A directory holds Megatron's own files, `config.json` (the architecture, as Hugging Face writes it), the tokenizer,
and the manifest that marks it complete.
"""

import ctypes
import os
import queue
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_bai.errors import UserError
from megatron_bai.merge.ranks import Ranks, joined
from megatron_bai.merge.torch_dist import TorchDist
from megatron_bai.model import hf, manifest, placing, unpickle
from megatron_bai.model.build import Actor

_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "iostream error")  # all that `torch.save` says of the system's error
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _sharded(actor: Actor) -> dict[str, Any]:
    return {f"model{i}": module.sharded_state_dict() for i, module in enumerate(actor.modules)}


def save(actor: Actor, target: str | Path, tokenizer: str | Path, info: dict[str, Any]) -> None:
    """Write the actor's weights. Collective; the directory must be one that all ranks see.

    Args:
        tokenizer: directory to copy the tokenizer's files from.
        info: kept in the manifest.

    Raises:
        UserError: the directory cannot be written, or another process writes it; the target is as it was.
    """
    target, group = Path(target), joined()
    with ExitStack() as stack:
        group.first(lambda: stack.enter_context(placing.lock(target)))
        stage = group.first(lambda: manifest.staging(target))
        _write(actor, stage)
        names = group.first(lambda: sorted(path.name for path in stage.iterdir()))
        shares = group.together(lambda: manifest.checksums(stage, names[group.rank :: group.size]))
        sums = {name: crc for share in shares for name, crc in share.items()}

        def finish() -> None:
            hf.write_config(actor.settings, actor.transformer_config.params_dtype, tokenizer, stage)
            manifest.seal(stage, target, info, sums)

        group.first(finish, stage)


def _write(actor: Actor, stage: Path) -> None:
    """Megatron-Core's save, whose helpers end when this process does, however it ends."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # By default results pass through a server process, which a save in the foreground does not need, and which a
    # kill -9 of this process would leave behind for good.
    filesystem_async._results_queue = queue.Queue()
    try:
        with _children_end_with_us():
            dist_checkpointing.save(_sharded(actor), str(stage))
    except CheckpointException as error:
        raise UserError(f"{stage} cannot be written: {_first(error)}") from None
    except RuntimeError as error:
        if not any(word in str(error) for word in _TORCH_CANNOT_WRITE):
            raise
        raise UserError(f"{stage} cannot be written: the disk is full or failed") from None


def _first(error: CheckpointException) -> object:
    """Why a rank could not read or write; only the coordinator is told."""
    return next((cause for cause, _ in error.failures.values()), "another rank failed")


@contextmanager
def _children_end_with_us() -> Iterator[None]:
    """Have the kernel kill the processes forked meanwhile when this one dies: Megatron-Core forks its writers."""
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl
    forking = True

    def follow() -> None:
        if forking:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # which died before the line above
                os._exit(1)

    os.register_at_fork(after_in_child=follow)  # there is no way to unregister
    try:
        yield
    finally:
        forking = False


def load(actor: Actor, directory: str | Path) -> dict[str, Any]:
    """Fill the actor from a complete checkpoint, whatever layout wrote it. Collective.

    Returns:
        The `info` it was saved with.

    Raises:
        UserError: no complete checkpoint there, or one that is not what was written, or one of another architecture.
    """
    directory, group = Path(directory), joined()
    info = manifest.require(directory)
    if not (directory / "metadata.json").is_file():
        raise UserError(f"{directory} is not a Megatron torch_dist checkpoint: `megatron-bai convert` makes one")
    found = hf.read_config(directory)
    for name in vars(found):
        if name != "init_std" and getattr(found, name) != getattr(actor.settings, name):
            raise UserError(
                f"{directory} has {name} {getattr(found, name)}, the configured model.{name} is "
                f"{getattr(actor.settings, name)}"
            )
    state = _sharded(actor)
    group.together(lambda: _check(directory, state, group))
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except CheckpointingException as error:
        raise UserError(f"Megatron cannot load {directory}: {error}") from None
    except CheckpointException as error:
        raise UserError(f"Megatron cannot load {directory}: {_first(error)}") from None
    for i, module in enumerate(actor.modules):
        module.load_state_dict(loaded[f"model{i}"])
    finish_loading(actor)
    return info


def _check(directory: Path, state: dict[str, Any], group: Ranks) -> None:
    """Before Megatron-Core's reader, which would run what a hostile file names: all is what was written, and harmless.

    The ranks share the files and the tensors' archives.
    """
    manifest.verify(directory, group.rank, group.size)
    with TorchDist(directory) as source:
        for key in sorted(source.tensors)[group.rank :: group.size]:
            for chunk in source.tensors[key].chunks:
                source.record(source.tensors[key], chunk)
        _require_tensors(source, state)
    if group.rank == 0:
        unpickle.check_common(directory / "common.pt")


def _require_tensors(source: TorchDist, state: dict[str, Any]) -> None:
    """All that the model has, as tensors: an object in their place would be unpickled, and could run anything."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for item in nested_values(state):
        if isinstance(item, ShardedTensor) and item.key in source.objects:
            raise UserError(f"{source.path}: {item.key} is no tensor there: the checkpoint cannot be used")
        if isinstance(item, ShardedTensor) and item.key not in source.tensors:
            raise UserError(f"{source.path} has no {item.key}: it is the checkpoint of another kind of model")


def finish_loading(actor: Actor) -> None:
    """Make the optimizer's master weights those of the model, after the model was filled."""
    if actor.optimizer is not None:
        actor.optimizer.reload_model_params()


def kind_of(directory: str | Path) -> str:
    """`megatron` or `hf`: the format of a checkpoint directory.

    Raises:
        UserError: neither.
    """
    directory = Path(directory)
    if (directory / "metadata.json").is_file():
        return "megatron"
    if (directory / hf.INDEX).is_file() or (directory / "model.safetensors").is_file():
        return "hf"
    raise UserError(f"{directory} holds neither a Megatron torch_dist nor a Hugging Face safetensors checkpoint")
