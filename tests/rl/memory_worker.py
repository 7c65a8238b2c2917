"""Run as a script: what Megatron-Core itself builds for a rank of a world that is only said to be there.

torch's `fake` process group lets one process be any rank of any world. Argument: a JSON list of cases, each the index
of a rank, the number of processes, the settings of the model and the layout, the dtype, and what is asked. Prints a
JSON list.

The kinds of cases: `actor` and `critic`, the parameters of bare modules, which have no memory; `whole`, the bytes of an
actor in training; `layer`, the bytes a token that autograd keeps of one layer; `family`, of which the model is the
directory of a `config.json`: the parameters, what a checkpoint has, and the bytes a token of each layer.
"""

import dataclasses
import functools
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bai import compat, config
from megatron_bai.distributed import backend


def joined(rank: int, processes: int, parallel: config.Parallel) -> None:
    from megatron.core import parallel_state

    from megatron_bai.model import build

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    build.init_parallel(parallel, seed=0)


def counted(named: Any) -> dict[str, int]:
    found = {"dense": 0, "experts": 0}
    for name, parameter in named:
        found["experts" if ".experts." in name else "dense"] += parameter.numel()
    return found


def bare(settings: config.Config, device: backend.Device, critic: bool = False) -> dict[str, int]:
    """Parameters of a rank's GPTModel, none of which has memory."""
    from megatron_bai.model import build
    from megatron_bai.model.architecture import architecture_of
    from megatron_bai.model.value_head import ValueHead

    cfg = build.transformer_config(settings.model, settings.parallel, device)
    cfg.use_cpu_initialization = cfg.perform_initialization = False
    with torch.device("meta"):
        gpt = build._build_gpt(architecture_of(settings.model), cfg, False, None, False)
        if critic and gpt.post_process:
            gpt.output_layer = ValueHead(cfg)
    return counted(gpt.named_parameters())


def whole(settings: config.Config, device: backend.Device) -> dict[str, float]:
    """Bytes of an actor in training."""
    from megatron_bai.model import build

    actor = build.build_actor(settings, device)
    buffers = [buffer for chunk in actor.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    found: dict[str, float] = counted((name, p) for module in actor.modules for name, p in module.named_parameters())
    found["weights"] = sum(p.nbytes for module in actor.modules for p in module.parameters())
    found["gradients"] = sum(buffer.grad_data.nbytes for buffer in buffers)
    masters = [p for group in actor.optimizer.param_groups for p in group["params"]]
    assert all(p.dtype is torch.float32 for p in masters)
    copies = 2 if settings.backend.dtype == "float32" else 3  # two moments of each, and itself
    found["optimizer"] = sum(4 * copies * p.numel() for p in masters)
    return found


def layer(settings: config.Config, device: backend.Device) -> float:
    """Of two layers more."""
    tokens = 64
    return (_kept(settings, device, 3, tokens) - _kept(settings, device, 1, tokens)) / 2 / tokens


def family(settings: config.Config, device: backend.Device) -> dict[str, Any]:
    """Of a published model: its parameters, the shapes of what is saved, and what autograd keeps of a token."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_bai.model import build
    from megatron_bai.model.architecture import architecture_of

    model, tokens = architecture_of(settings.model), 64
    gpt = build._build_gpt(model, build.transformer_config(model, settings.parallel, device), False, None, model.tied)
    state = gpt.sharded_state_dict()
    apply_factories(state)
    saved = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    layers = gpt.decoder.layers
    parts = [*layers, *(layer.mlp.shared_experts for layer in layers if getattr(layer.mlp, "shared_experts", None))]
    own = {each.untyped_storage().data_ptr() for each in (*gpt.parameters(), *gpt.buffers())}
    kept: list[int] = []
    for part in parts:
        part.forward = functools.partial(_measure, part.forward, own, kept)
    ids = torch.arange(tokens)[None]
    gpt(ids % model.vocab_size, ids, None)
    found: dict[str, Any] = counted(gpt.named_parameters())
    return found | {
        "saved": {each.key: list(each.global_shape) for each in saved},
        "kept": [size / tokens for size in kept],
    }


def _measure(forward: Any, own: set[int], kept: list[int], *given: Any, **named: Any) -> Any:
    """Call a module, and note the bytes that autograd keeps of it, those of modules in it included."""
    storages: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = forward(*given, **named)
    kept.append(sum(each.untyped_storage().nbytes() for place, each in storages.items() if place not in own))
    return found


def _kept(settings: config.Config, device: backend.Device, layers: int, tokens: int) -> int:
    """Bytes that autograd keeps of a forward pass, parameters apart."""
    from megatron_bai.model import build
    from megatron_bai.model.architecture import architecture_of

    model = dataclasses.replace(settings.model, num_layers=layers)
    cfg = build.transformer_config(model, settings.parallel, device)
    gpt = build._build_gpt(architecture_of(model), cfg, False, None, False)
    own = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gpt(ids % model.vocab_size, ids, None)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def main() -> None:
    compat.apply("megatron-cpu")
    dist.new_group = functools.partial(_without_backend, dist.new_group)
    from megatron_bai.model.architecture import read_architecture

    found = []
    for rank, processes, model, parallel, dtype, kind in json.loads(sys.argv[1]):
        made = read_architecture(model) if isinstance(model, str) else config.Model(**model)
        settings = config.Config(model=made, parallel=config.Parallel(**parallel))
        settings.backend.dtype = dtype
        device = backend.Device("cpu", torch.device("cpu"), backend.DTYPES[dtype], False)
        joined(rank, processes, settings.parallel)
        critic = functools.partial(bare, critic=True)
        asked = {"whole": whole, "layer": layer, "family": family, "actor": bare, "critic": critic}[kind]
        found.append(asked(settings, device))
    print(json.dumps(found))


def _without_backend(new_group: Any, *arguments: Any, backend: Any = None, **others: Any) -> Any:
    """Gloo would look for the other ranks."""
    return new_group(*arguments, **others)


if __name__ == "__main__":
    main()
