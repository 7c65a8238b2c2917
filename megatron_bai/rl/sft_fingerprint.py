"""Tell whether a supervised checkpoint is what the present settings would make.

Its manifest has the settings (`made_with`). Checkpoints of the first releases have a hash alone (`made_by`), which is
still written: a setting that came later enters it only where it does not have its default.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from megatron_bai import config
from megatron_bai.data import task_factory
from megatron_bai.rl import init_weights
from megatron_bai.rl.saved_settings import list_changes
from megatron_bai.utils.dataclass_defaults import drop_later_defaults
from megatron_bai.utils.flatten import flatten

_GROUPS = ("model", "objective", "supervised", "trainer", "data")
_FREE = ("save", "save_every", "save_async", "keep", "grace_s")  # of the trainer: they change no weight
# The settings of which `made_by` was computed when manifests had nothing else.
_ORIGINAL: dict[type, tuple[str, ...]] = {
    config.Model: (
        "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "num_experts", "moe_topk",
        "moe_ffn_hidden_size", "vocab_size", "max_position_embeddings", "rope_theta", "norm_epsilon", "init_std",
    ),
    config.Sft: ("name",),
    config.Supervised: ("rows", "length"),
    config.Trainer: (
        "steps", "prompts_per_step", "group_size", "mini_batches", "micro_batch_size", "tokens_per_micro_batch",
        "learning_rate", "warmup_updates", "decay", "min_learning_rate", "weight_decay", "adam_beta2", "clip_grad",
        "eval_every", "eval_samples", "eval_temperature",
    ),
    config.Arithmetic: ("name", "eval_prompts", "style", "min_terms", "max_terms", "max_number"),
    config.Tools: ("name", "eval_prompts", "max_number", "call_fraction"),
    config.Dataset: (
        "name", "eval_prompts", "train", "eval", "hold_out", "prompt", "answer", "response", "system", "chat_template",
        "template_options", "max_prompt_tokens",
    ),
}  # fmt: skip


def describe_sft(settings: config.Config) -> dict[str, Any]:
    """Return what determines a supervised checkpoint, for its manifest.

    Raises:
        UserError: the checkpoint that training starts from, or a file of rows, cannot be used.
    """
    files = task_factory.describe_data(settings.data).items()
    return {
        "settings": {name: text for name, text in flatten(asdict(settings)).items() if _matters(name)},
        "files": {name: digest for name, digest in files if name.endswith("_sha256")},
        "init": _hash(init_weights.weights_fingerprint(settings)),
    }


def list_differences(info: dict[str, Any], settings: config.Config) -> list[str]:
    """Return in words what a checkpoint was made with otherwise than the present settings say; empty for the same.

    Args:
        info: of its manifest.
        settings: the present ones.

    Raises:
        UserError: as `describe_sft`.
    """
    saved = info.get("made_with")
    if saved is None:
        return [] if info.get("made_by") == sft_fingerprint(settings) else ["its manifest does not say which"]
    now = describe_sft(settings)
    changes = list_changes(saved["settings"], settings, lambda name: not _matters(name))
    changes += ["the rows in data.train or data.eval have changed"] * (saved["files"] != now["files"])
    return changes + ["training started from other weights"] * (saved["init"] != now["init"])


def sft_fingerprint(settings: config.Config) -> str:
    """Return a hash of what determines a supervised checkpoint: equal means the same work."""
    described: dict[str, Any] = {name: asdict(getattr(settings, name)) for name in _GROUPS}
    described["data"] = task_factory.describe_data(settings.data)
    for name in _FREE:
        del described["trainer"][name]
    for name in _GROUPS:
        kind = type(getattr(settings, name))
        if kind in _ORIGINAL:
            described[name] = drop_later_defaults(described[name], kind, _ORIGINAL[kind])
    described["seed"] = settings.run.seed
    described["init"] = init_weights.weights_fingerprint(settings)
    return _hash(described)[:16]


def _matters(name: str) -> bool:
    group, _, setting = name.partition(".")
    return name == "run.seed" or group in _GROUPS and not (group == "trainer" and setting in _FREE)


def _hash(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
