"""The files beside the weights of a merge whose base is in another format than its output."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_bai.checkpoint.carried_files import CONFIG
from megatron_bai.checkpoint.common_state import COMMON
from megatron_bai.merge.recipe.regions import OutputTensor
from megatron_bai.merge.tensor_names.translated_reader import TranslatedReader
from megatron_bai.model.hf_config_file import hf_config
from megatron_bai.model.megatron_lm import megatron_lm_state


def write_translated_files(base: TranslatedReader, stage: Path, outputs: Mapping[str, OutputTensor]) -> None:
    """Write what `convert` would: `config.json` where none was carried, and Megatron-LM's arguments.

    Args:
        base: the pretrained checkpoint.
        stage: the directory in which the result is written, with the carried files.
        outputs: every tensor of the result, by key.

    Raises:
        OSError: a file cannot be written.
    """
    model, path = base.architecture, stage / CONFIG
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        changes = model.family.exported_values(model, content)
        if any(content.get(key) != value for key, value in changes.items()):
            path.write_text(json.dumps(content | changes, indent=2) + "\n", encoding="utf-8")
    else:
        dtype = next(output.dtype for output in outputs.values() if len(output.shape) > 1)
        path.write_text(json.dumps(hf_config(model, dtype), indent=1), encoding="utf-8")
    if base.format_name == "megatron":
        torch.save(megatron_lm_state(model, stage), stage / COMMON)
