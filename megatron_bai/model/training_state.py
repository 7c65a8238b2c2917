"""Everything a training run consists of besides its data: weights, optimizers, random-number generators.

It is saved as one Megatron sharded state dict. The optimizer's part has Megatron-Core's format `fully_reshardable`, in
which each moment has its parameter's shape, so that any layout reads what any other wrote. (`dp_reshardable` fits other
data-parallel sizes only, and 0.16.1 can no longer save `fully_sharded_model_space`, its default.)

The actor's tensors have the names they have in a checkpoint of weights, so such a directory serves as one, too. Those
of any other model follow its name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_bai.model import megatron_checkpoint
from megatron_bai.model.async_save import CheckpointSave
from megatron_bai.model.build import MegatronModel

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(
    models: dict[str, MegatronModel],
    target: Path,
    tokenizer: Path,
    info: dict[str, Any],
    in_background: bool = False,
    write_rank_files: Callable[[Path], None] | None = None,
) -> CheckpointSave:
    """Write the models, or start to: see `CheckpointSave`. *Collective*. Each must have been updated at least once.

    Args:
        models: by name; one is the `actor`.
        target: directory of the checkpoint.
        tokenizer: directory to copy the tokenizer's files from.
        info: kept in the manifest.
        in_background: as in `CheckpointSave`.
        write_rank_files: as in `CheckpointSave`.

    Raises:
        UserError: as `CheckpointSave`.
    """
    state: dict[str, Any] = {name: _sharded_state(name, model) for name, model in models.items()}
    state["random"] = _sharded_rng_states()
    return CheckpointSave(
        state,
        target,
        megatron_checkpoint.metadata_writer(models["actor"], tokenizer),
        info,
        in_background,
        write_rank_files,
    )


def load(models: dict[str, MegatronModel], directory: Path, restore_rng: bool) -> dict[str, Any]:
    """Fill the models and their optimizers, whatever layout wrote them. *Collective*.

    Args:
        models: by name, as they were saved.
        directory: of the checkpoint.
        restore_rng: set the random-number generators, too; in the layout that wrote them.

    Returns:
        The `info` it was saved with.

    Raises:
        UserError: as `megatron_checkpoint.load`.
    """
    for model in models.values():
        _init_optimizer_state(model)
    state: dict[str, Any] = {name: _sharded_state(name, model, loading=True) for name, model in models.items()}
    if restore_rng:
        state["random"] = _sharded_rng_states()
    info, loaded = megatron_checkpoint.load_sharded(models["actor"], state, directory)
    for name, model in models.items():
        for i, module in enumerate(model.modules):
            module.load_state_dict(loaded[name][f"model{i}"])
        _load_optimizer(model, loaded[name]["optimizer"])
    if restore_rng:
        _set_rng_states(loaded["random"])
    return info


def _sharded_state(name: str, model: MegatronModel, loading: bool = False) -> dict[str, Any]:
    """Return Megatron's sharded state dict of a model and its optimizer."""
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    state = megatron_checkpoint.sharded_state(model)
    with _steps_of_empty_optimizers(model.optimizer.chained_optimizers):
        state["optimizer"] = model.optimizer.sharded_state_dict(state, loading, metadata=_OPTIMIZER_FORMAT)
    for part in state["optimizer"].values():  # one for each of several optimizers; no moments would be common state
        if isinstance(part, dict) and part.get("param_state") == {}:
            del part["param_state"]
    if name != "actor":
        add_prefix_for_sharding(state, f"{name}.")
    return state


@contextmanager
def _steps_of_empty_optimizers(chained: list[Any]) -> Iterator[None]:
    """Give optimizers without parameters on this rank the step of the others, for the length of a block.

    Such is that of experts on a pipeline stage whose layers are all dense. Megatron-Core looks for the step of torch's
    Adam among the moments, and stops where there are none.
    """
    steps = [values["step"] for each in chained for values in each.optimizer.state.values() if "step" in values]
    empty = [each.optimizer for each in chained if not each.optimizer.state and steps]
    try:
        for optimizer in empty:
            content = {**optimizer.state_dict(), "state": {0: {"step": steps[0].clone()}}}
            optimizer.state_dict = lambda content=content: {
                **content,
                "param_groups": [dict(group) for group in content["param_groups"]],
            }
        yield
    finally:
        for optimizer in empty:
            optimizer.__dict__.pop("state_dict", None)


def _init_optimizer_state(model: MegatronModel) -> None:
    """Create the moments: Megatron-Core asks an optimizer for its step, which torch's cannot say before the first."""
    for optimizer in model.optimizer.chained_optimizers:
        if not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()


def _load_optimizer(model: MegatronModel, loaded: dict[Any, Any]) -> None:
    """Load an optimizer as Megatron-Core does, around two faults it has with torch's Adam.

    It looks for the step count among the moments, and gives all parameters one tensor of it, which each of them would
    advance.
    """
    chained = model.optimizer.chained_optimizers
    for i, optimizer in enumerate(chained):
        state = dict(loaded if len(chained) == 1 else loaded[i])
        moments = state.pop("param_state", {})  # an optimizer without parameters here has none
        optimizer.load_state_dict(state)
        states = optimizer.optimizer.state
        steps = {parameter: values.pop("step") for parameter, values in states.items() if "step" in values}
        optimizer.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            states[parameter]["step"] = step.clone()


def _rng_states() -> dict[str, torch.Tensor]:
    """Return this rank's states, `[bytes]` uint8 each: torch's for CPU and device, and those Megatron tracks."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    return states | {f"tracked.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}


def _sharded_rng_states() -> dict[str, Any]:
    """Return the states as sharded tensors with one row a rank."""
    from megatron.core.dist_checkpointing import ShardedTensor

    rows = {f"rng_state.{name}": state.clone() for name, state in _rng_states().items()}
    place = (0, dist.get_rank(), dist.get_world_size())
    return {key: ShardedTensor.from_rank_offsets(key, row, place, prepend_axis_num=1) for key, row in rows.items()}


def _set_rng_states(loaded: dict[str, torch.Tensor]) -> None:
    """Set the generators to states that were loaded."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {key.removeprefix("rng_state."): row.reshape(-1) for key, row in loaded.items()}
    tracked = {name: states[f"tracked.{name}"] for name in get_cuda_rng_tracker().get_states()}
    get_cuda_rng_tracker().set_states(tracked)
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["device"])
