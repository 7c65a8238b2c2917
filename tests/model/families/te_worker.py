"""Run as a script with stand-ins for Transformer Engine on the path: its layers in the spec of each family.

Arguments: a directory with `NAME/published` for each family, and names. One process builds each family twice, of local
layers and of Transformer Engine's, and prints as JSON by family: keys of the checkpoint, names of parameters, whether
export and logits are the same, and what is said of parameters that neither table knows.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from model.families.published import tokens_of
from safetensors.torch import load_file

from megatron_bai import config
from megatron_bai.distributed import backend, kernel_packages
from megatron_bai.errors import UserError


def names_of(module: Any) -> tuple[list[str], list[str]]:
    """Return the keys of a model's checkpoint as Megatron-Core writes them, and the merge's names of these."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_bai.merge.tensor_names.canonical_names import canonical_box

    state = module.sharded_state_dict()
    apply_factories(state)
    tensors = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    canonical = {canonical_box(each.key, tuple(each.global_shape)).name for each in tensors}
    return sorted({each.key for each in tensors}), sorted(canonical)


def build_in(device: backend.Device, directory: Path) -> tuple[Any, Any]:
    """Build a family of a device's layers and fill it from its checkpoint; return its architecture and module."""
    from megatron_bai.model import build, hf_checkpoint
    from megatron_bai.model.architecture import read_architecture

    model = read_architecture(directory)
    actor = build.build_actor(config.Config(model=model), device, train=False)
    hf_checkpoint.load_hf(actor.modules, model, directory)
    return model, actor.modules[0]


def logits_of(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return module(tokens, positions, None).float()


def compare(name: str, directory: Path, local: backend.Device, engine: backend.Device) -> dict[str, Any]:
    """Return what is equal between the two builds of a family."""
    from megatron_bai.model import hf_checkpoint

    found: dict[str, Any] = {}
    logits = []
    for label, device in (("local", local), ("engine", engine)):
        model, module = build_in(device, directory)
        found[label], found[f"{label}_canonical"] = names_of(module)
        found[f"{label}_parameters"] = [key for key, _ in module.named_parameters()]
        logits.append(logits_of(module, tokens_of(name)))
    wanted = load_file(directory / "model.safetensors")
    exported = dict(hf_checkpoint.iter_hf_tensors([module], model))
    found["exported"] = all(torch.equal(exported[key], wanted[key]) for key in exported) and len(exported)
    found["difference"] = float((logits[0] - logits[1]).abs().max())
    return found


def refusals(directory: Path, engine: backend.Device) -> dict[str, str]:
    """Return what is said of one more parameter that is saved, of one that is not, and of one of another shape."""
    import transformer_engine.pytorch as te

    said = {}
    cases = {
        "saved": (te.RMSNorm, lambda self: self.add("offset", self.weight.numel())),
        "not saved": (te.DotProductAttention, lambda self: self.add("sink", 4)),
        "shape": (te.RMSNorm, lambda self: self.add("weight", self.weight.numel() + 1)),
    }
    for label, (kind, spoil) in cases.items():
        original = kind.__init__

        def spoiled(self: Any, *args: Any, original: Any = original, spoil: Any = spoil, **named: Any) -> None:
            original(self, *args, **named)
            spoil(self)

        kind.__init__ = spoiled
        try:
            build_in(engine, directory)
            said[label] = "nothing"
        except UserError as error:
            said[label] = str(error)
        finally:
            kind.__init__ = original
    return said


def main(directory: Path, names: list[str]) -> None:
    kernel_packages.hide_package = lambda name: None  # what a CPU hides is what is looked at here
    local = backend.init_backend(config.Backend(kind="cpu", timeout_s=300))
    from megatron_bai.model import build

    build.init_parallel(config.Parallel(), seed=0)
    engine = backend.replace(local, use_transformer_engine=True)
    kernel_packages.require_accepted(kernel_packages.inspect_package("transformer_engine"))
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = compare(name, directory / name / "published", local, engine)
        except UserError as error:
            found[name] = {"refused": str(error)}
    found["refusals"] = refusals(directory / names[0] / "published", engine)
    backend.shutdown_backend()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
