"""Moonlight and Kimi-K2 by transformers' class of DeepSeek-V3.

Their norms of latents have `rms_norm_eps`, as in SGLang and Megatron-Core. In transformers those have 1e-6 whatever the
file says, which is 1e-5 in Moonlight's.
"""

import json
from pathlib import Path
from typing import Any

import torch


def _configuration(directory: Path) -> Any:
    from transformers import DeepseekV3Config

    raw = json.loads((directory / "config.json").read_text())
    return DeepseekV3Config.from_dict({**raw, "model_type": "deepseek_v3"})


def make(directory: Path) -> None:
    """Write random weights beside a `config.json`."""
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = _configuration(directory)
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor += 0.1 * torch.randn(tensor.shape)
    kept = (directory / "config.json").read_bytes()
    model.save_pretrained(directory)
    (directory / "config.json").write_bytes(kept)
    (directory / "generation_config.json").unlink(missing_ok=True)


def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Compute `[B, T, V]`."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(
        directory, config=_configuration(directory), dtype=torch.float32, attn_implementation="eager"
    )
    for name, module in model.named_modules():
        if name.endswith("_a_layernorm"):
            module.variance_epsilon = model.config.rms_norm_eps
    found: torch.Tensor = model(tokens).logits
    return found
