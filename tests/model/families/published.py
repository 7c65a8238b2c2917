"""Checkpoints of each family as it is published: `configs/NAME.json` is its `config.json`, shrunk; the weights random.

The plain reference is transformers' model. A family that transformers lacks has `references/NAME.py` in its place, with
`make(directory)`, which writes `model.safetensors` beside the `config.json` that is there, and
`logits(directory, tokens)`.
"""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in (HERE / "configs").glob("*.json"))
BATCH, LENGTH = 4, 24
# Checkpoints that are published with frequencies of rotary positions, for heads of another size than their own.
WITH_FREQUENCIES, FREQUENCIES = ("moonlight", "kimi_k2"), "self_attn.rotary_emb.inv_freq"


def config_file(name: str) -> Path:
    """Return the file of a family's configuration: one of this package's, or of a package from outside."""
    files = (HERE / folder / f"{name}.json" for folder in ("configs", "outside"))
    return next(file for file in files if file.is_file())


def read(name: str) -> dict[str, Any]:
    """Return a family's configuration."""
    return json.loads(config_file(name).read_text())


def tokens_of(name: str) -> torch.Tensor:
    """Return `[BATCH, LENGTH]` random tokens."""
    return torch.randint(0, read(name)["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def make(name: str, directory: Path) -> Path:
    """Write a checkpoint of random weights as the family publishes it; norms and biases are no ones and zeros."""
    directory.mkdir(parents=True)
    shutil.copy(config_file(name), directory / "config.json")
    if reference := own_reference(name):
        reference.make(directory)
    else:
        _make_with_transformers(directory)
        shutil.copy(config_file(name), directory / "config.json")
    file = directory / "model.safetensors"
    if predicting := predicting_layer(name):
        _add_predicting_layer(file, predicting)
    if name in WITH_FREQUENCIES:
        _add_frequencies(file, read(name))
    return directory


def _make_with_transformers(directory: Path) -> None:
    """Save transformers' model of a `config.json`, which it replaces."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    vary(model)
    model.save_pretrained(directory)
    for path in directory.glob("generation_config.json"):
        path.unlink()


def vary(model: torch.nn.Module) -> None:
    """Make norms no ones and biases no zeros; those of gpt-oss's gates so large that its experts' limit matters."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if (tensor.dim() == 1 or name.endswith("_proj_bias")) and not name.endswith("inv_freq"):
                scale = 4.0 if name.endswith("gate_up_proj_bias") else 0.1
                tensor += scale * torch.randn(tensor.shape)


def predicting_layer(name: str) -> str:
    """Return what the names begin with of a layer for multi-token prediction; empty where there is none.

    transformers has no such layers.
    """
    described = read(name)
    return f"model.layers.{described['num_hidden_layers']}." if described.get("num_nextn_predict_layers") else ""


def _add_predicting_layer(file: Path, name: str) -> None:
    """Add to a checkpoint a layer behind the last: a copy of it, with what DeepSeek-V3's and others have besides."""
    tensors = load_file(file)
    last = f"model.layers.{int(name.split('.')[2]) - 1}."
    added = {name + key.removeprefix(last): tensor.clone() for key, tensor in tensors.items() if key.startswith(last)}
    hidden = tensors["model.norm.weight"].numel()
    added |= {f"{name}{norm}.weight": torch.ones(hidden) for norm in ("enorm", "hnorm", "shared_head.norm")}
    save_file({**tensors, **added, f"{name}eh_proj.weight": torch.ones(hidden, 2 * hidden)}, file, {"format": "pt"})


def _add_frequencies(file: Path, described: dict[str, Any]) -> None:
    """Add to a checkpoint what older code saved with the weights, and every reader computes for itself."""
    half = torch.ones(described["hidden_size"] // described["num_attention_heads"] // 2)
    layers = range(described["num_hidden_layers"])
    added = {f"model.layers.{layer}.{FREQUENCIES}": half.clone() for layer in layers}
    save_file({**load_file(file), **added}, file, {"format": "pt"})


class Routers(TorchFunctionMode):
    """Watches the choices of experts in a reference's routers, or replaces them, layer by layer.

    A router's choice is the `topk` of as many as a token has of all experts of its layer, `[B·T, experts]`.

    Attributes:
        own: `[B·T, topk]` of each MoE layer, in order: what its router chose.
        chosen: the same, or what it was given.
    """

    def __init__(self, experts: int, topk: int, forced: torch.Tensor | None = None):
        super().__init__()
        self.size, self.forced, self.own, self.chosen = (experts, topk), forced, [], []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), named: Any = None) -> Any:
        found = function(*args, **(named or {}))
        if function not in (torch.topk, torch.Tensor.topk):
            return found
        values, k = args[0], named["k"] if named and "k" in named else args[1]
        if values.dim() != 2 or (values.shape[-1], k) != self.size:  # of three axes are the scores of groups
            return found
        indices = found[1].reshape(-1, k)
        self.own.append(indices)
        if self.forced is not None:
            indices = self.forced[:, len(self.chosen)].to(torch.int64)
        self.chosen.append(indices)
        indices = indices.view(found[1].shape)
        return type(found)((values.gather(-1, indices), indices))


def logprobs(
    name: str, directory: Path, forced: torch.Tensor | None = None, tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute with the reference the log-probability of each next token, and the routes.

    Args:
        name: of the family.
        directory: of its checkpoint.
        forced: `[B, T, MoE layers, topk]` experts to choose; None lets the routers choose.
        tokens: `[B, T]`; None: `tokens_of`.

    Returns:
        `[B, T]` float32, 0 for the last, and `[B, T, MoE layers, topk]`.
    """
    tokens = tokens_of(name) if tokens is None else tokens
    logits, routers = _run(name, directory, tokens, forced)
    found = torch.zeros(tokens.shape)
    found[:, :-1] = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return found, torch.stack(routers.chosen, 1).unflatten(0, tokens.shape)


def own_choices(name: str, directory: Path, forced: torch.Tensor | None) -> torch.Tensor:
    """Return what the reference's routers choose where it is given other experts, `[B, T, MoE layers, topk]`.

    Args:
        name: of the family.
        directory: of its checkpoint.
        forced: as in `logprobs`.
    """
    return torch.stack(_run(name, directory, tokens_of(name), forced)[1].own, 1).unflatten(0, (BATCH, LENGTH))


def _run(name: str, directory: Path, tokens: torch.Tensor, forced: torch.Tensor | None) -> tuple[torch.Tensor, Routers]:
    """Run the reference; return its logits, `[B, T, vocabulary]`, and its routers."""
    from megatron_bai.model.architecture import read_architecture

    model = read_architecture(directory)
    rows = None if forced is None else forced.flatten(0, 1)
    with torch.no_grad(), Routers(model.num_experts, model.moe_topk, rows) as routers:
        if reference := own_reference(name):
            logits = reference.logits(directory, tokens)
        else:
            from transformers import AutoModelForCausalLM

            theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
            logits = theirs(tokens).logits
    return logits, routers


def is_dropped(name: str, tensor: str) -> bool:
    """Whether a family leaves a tensor out at import: of a layer for multi-token prediction, or of frequencies."""
    predicting = predicting_layer(name)
    return bool(predicting) and tensor.startswith(predicting) or tensor.endswith(FREQUENCIES)


def own_reference(name: str) -> Any:
    """Return the module of a family that transformers lacks; None for others."""
    if (HERE / "references" / f"{name}.py").is_file():
        return importlib.import_module(f"model.families.references.{name}")
    return None
