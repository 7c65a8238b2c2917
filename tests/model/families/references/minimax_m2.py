"""MiniMax-M2 in transformers 5.12, which knows of `rotary_dim` only as `partial_rotary_factor`."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def configuration(directory: Path) -> Any:
    found = AutoConfig.from_pretrained(directory)
    found.rope_parameters["partial_rotary_factor"] = found.rotary_dim / found.head_dim
    return found


def make(directory: Path) -> None:
    kept = (directory / "config.json").read_bytes()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(directory), dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor += 0.1 * torch.randn(tensor.shape)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "config.json").write_bytes(kept)


def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    settings = configuration(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=settings, dtype=torch.float32, attn_implementation="eager"
    )
    return model(tokens).logits
