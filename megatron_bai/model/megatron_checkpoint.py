"""Save and load Megatron `torch_dist` checkpoints, readable in any parallel layout.

A directory holds Megatron's own files, `config.json` (the architecture, as Hugging Face writes it), the tokenizer,
and the manifest that marks it complete.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_bai.checkpoint import common_state, formats, manifest
from megatron_bai.checkpoint.iterations import resolve_iteration
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.checkpoint.weight_checks import is_state
from megatron_bai.compat.releases import megatron_release
from megatron_bai.distributed.rank_group import RankGroup, current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import require_same
from megatron_bai.model.async_save import CheckpointSave, first_cause
from megatron_bai.model.build import MegatronModel
from megatron_bai.model.hf_config_file import write_config
from megatron_bai.model.megatron_lm import megatron_lm_state
from megatron_bai.model.required_tensors import require_megatron_tensors


def sharded_state(model: MegatronModel) -> dict[str, Any]:
    """Return Megatron's sharded state dict of the weights."""
    return {f"model{i}": module.sharded_state_dict() for i, module in enumerate(model.modules)}


def save(
    model: MegatronModel,
    target: str | Path,
    tokenizer: str | Path,
    info: dict[str, Any],
    verify_origin: Callable[[], None] = lambda: None,
) -> None:
    """Write a model's weights. *Collective*; the directory must be one that all ranks see.

    Args:
        model: whose weights are written.
        target: directory of the checkpoint. One that is named as an iteration of Megatron-LM is found by `--load`.
        tokenizer: directory to copy the tokenizer's files from.
        info: kept in the manifest.
        verify_origin: as for `hf_checkpoint.write_config`.

    Raises:
        UserError: the directory cannot be written, or another process writes it; the target is unchanged.
    """
    write = metadata_writer(model, tokenizer, verify_origin)
    state = sharded_state(model) | megatron_lm_state(model.architecture, target)
    CheckpointSave(state, Path(target), write, info).finalize()


def metadata_writer(
    model: MegatronModel, tokenizer: str | Path, verify_origin: Callable[[], None] = lambda: None
) -> Callable[[Path], None]:
    """Return a function that adds the architecture and the tokenizer's files to a directory.

    Args:
        model: whose architecture is written.
        tokenizer: directory to copy the tokenizer's files from.
        verify_origin: as for `hf_checkpoint.write_config`.
    """
    dtype = model.transformer_config.params_dtype
    return lambda stage: write_config(model.architecture, dtype, tokenizer, stage, verify_origin=verify_origin)


def load(model: MegatronModel, directory: str | Path, critic: bool = False) -> dict[str, Any]:
    """Fill a model from a complete checkpoint, whatever layout wrote it. *Collective*.

    Args:
        model: whose weights are set.
        directory: of the checkpoint.
        critic: whether the model is one.

    Returns:
        The `info` it was saved with.

    Raises:
        UserError: no complete checkpoint there, or one that is not what was written, or one of another architecture.
    """
    info, loaded = load_sharded(model, sharded_state(model), directory, critic)
    for i, module in enumerate(model.modules):
        module.load_state_dict(loaded[f"model{i}"])
    reload_master_weights(model)
    return info


def load_sharded(
    model: MegatronModel, state: dict[str, Any], directory: str | Path, critic: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load what a sharded state dict describes from a complete checkpoint of a model's architecture. *Collective*.

    Args:
        model: whose architecture the checkpoint must have.
        state: Megatron's sharded state dict.
        directory: of the checkpoint.
        critic: whether the model is one.

    Returns:
        The `info` it was saved with, and the state, which may lie in the tensors that `state` had.

    Raises:
        UserError: as `load`.
    """
    directory, ranks = resolve_iteration(directory), current_ranks()
    info = formats.require_complete(directory)
    if formats.checkpoint_format(directory) != "megatron":
        raise UserError(f"{directory} is not a Megatron torch_dist checkpoint: `megatron-bai convert` makes one")
    readers: list[TorchDistReader] = []
    loadable: list[Path] = []
    with ExitStack() as stack:

        def open_and_verify() -> None:
            readers.append(stack.enter_context(TorchDistReader(directory)))
            require_same(directory, model.architecture)
            require_megatron_tensors(readers[0], model.architecture, critic)
            _verify_before_load(readers[0], state, ranks)

        ranks.run_on_all(open_and_verify)
        ranks.run_on_all(lambda: loadable.append(stack.enter_context(_loadable_directory(readers[0]))))
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException

        try:
            loaded = dist_checkpointing.load(state, str(loadable[0]))
        except CheckpointingException as error:
            raise UserError(f"Megatron cannot load {directory}: {error}") from None
        except CheckpointException as error:
            raise UserError(f"Megatron cannot load {directory}: {first_cause(error)}") from None
        ranks.run_on_all(readers[0].require_unchanged)
    return info, loaded


@contextmanager
def _loadable_directory(reader: TorchDistReader) -> Iterator[Path]:
    """Yield a directory that the installed Megatron-Core can load: the checkpoint's, or one of links to its files.

    Releases before 0.19 want `common.pt`, which those from 0.19 do not write.
    """
    path = reader.path
    if megatron_release().common_is_object or common_state.find_common_state(path) == common_state.COMMON:
        yield path
        return
    with TemporaryDirectory(prefix="megatron-bai-") as directory:
        for name in reader.own_files():
            if name != common_state.COMMON:
                (Path(directory) / name).symlink_to((path / name).absolute())
        common_state.write_common_file(reader, Path(directory))
        yield Path(directory)


def _verify_before_load(reader: TorchDistReader, state: dict[str, Any], ranks: RankGroup) -> None:
    """Verify a checkpoint before Megatron-Core's reader, which would run what a hostile file names, opens it.

    The ranks share the files and the tensors' archives.
    """
    manifest.verify_weights(reader.path, ranks.rank, ranks.num_ranks)
    has_manifest = manifest.has_manifest(reader.path)
    for key in sorted(reader.tensors)[ranks.rank :: ranks.num_ranks]:
        for chunk in reader.tensors[key].chunks:
            reader.locate_record(reader.tensors[key], chunk)
        if not has_manifest and not is_state(key):  # the archives' checksums are all there are
            reader.verify_tensor(key)
    _require_tensors(reader, state)
    if ranks.rank == 0:
        common_state.verify_common_state(reader)


def _require_tensors(reader: TorchDistReader, state: dict[str, Any]) -> None:
    """Raise unless the checkpoint has the model's tensors as tensors: an object in place of one would be unpickled."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for entry in nested_values(state):
        if isinstance(
            entry, (ShardedTensor, ShardedTensorFactory)
        ):  # whose tensors have its key, or that and an ending
            for key in reader.objects:
                if key.startswith(entry.key):
                    raise UserError(f"{reader.path}: {key} is no tensor there: the checkpoint cannot be used")
        if isinstance(entry, ShardedTensor) and entry.key not in reader.tensors:
            raise UserError(f"{reader.path} has no {entry.key}: it is the checkpoint of another kind of model")


def reload_master_weights(model: MegatronModel) -> None:
    """Set the optimizer's master weights to the model's, after the model was filled."""
    if model.optimizer is not None:
        model.optimizer.reload_model_params()
