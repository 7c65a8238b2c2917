"""Run as a script: random configurations of a family, here and in its reference. Arguments: a directory, a seed, names.

Leaves `NAME.json`: for each configuration its `changes`, and `difference`, the largest of log-probabilities, or how it
was `refused`, or `failed`. Those that the reference does not build are drawn again.
"""

import json
import random
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from distributed.worker import join
from model.families import published
from processes import free_port, prepare

from megatron_bai import config
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError

CASES, CHANGES = 30, 4
DEVICE: list[Any] = []  # of this process, once it has one
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Of each key that a configuration may have some values: such as are published, and such as nobody builds
VALUES: dict[str, list[Any]] = {
    "attention_bias": [True, False],
    "attn_logit_softcapping": [30.0],
    "clip_qkv": [0.05, 8.0],
    "decoder_sparse_step": [1, 2, 3],
    "first_k_dense_replace": [0, 1, 2, 3],
    "final_logit_softcapping": [5.0],
    "head_dim": [8, 12, 16, 24, None],
    "hidden_act": ["silu", "gelu"],
    "interleave_rope": [True, False],
    "kv_lora_rank": [16, 24],
    "layer_types": [["full_attention"] * 4, ["full_attention", "sliding_attention"] * 2],
    "max_position_embeddings": [32, 64],
    "max_window_layers": [0, 2],
    "mlp_bias": [True, False],
    "mlp_layer_types": [["dense", "sparse"] * 2],
    "mlp_only_layers": [[], [0], [1, 3]],
    "n_group": [1, 2, 4],
    "n_shared_experts": [1, 2],
    "norm_topk_prob": [True, False],
    "num_experts_per_tok": [1, 2, 4],
    "num_key_value_heads": [1, 2, 4],
    "num_nextn_predict_layers": [0, 1],
    "partial_rotary_factor": [0.25, 0.5, 1.0],
    "q_lora_rank": [None, 24],
    "qkv_bias": [True, False],
    "rms_norm_eps": [1e-6, 1e-2],
    "rope_interleave": [True, False],
    "rope_scaling": [
        None,
        YARN,
        YARN | {"attention_factor": 1.3},
        YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
        YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1},
        {"rope_type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    "rope_theta": [100, 10000.5, 1e6],
    "routed_scaling_factor": [0.5, 1.0, 2.5],
    "scoring_func": ["sigmoid", "softmax"],
    "sliding_window": [None, 8, 4096],
    "shared_expert_intermediate_size": [24, 64],
    "tie_word_embeddings": [True, False],
    "topk_group": [1, 2],
    "topk_method": ["noaux_tc", "greedy", "group_limited_greedy"],
    "use_qk_norm": [True, False],
    "use_sliding_window": [True, False],
    "v_head_dim": [16, 24],
}  # fmt: skip


def draw(base: dict[str, Any], known: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """Some keys with other values, of those that the model type has: a flag may be turned over."""
    flags = {key: [not value] for key, value in known.items() if isinstance(value, bool)}
    others = {key: [v for v in values if v != known.get(key)] for key, values in (flags | VALUES).items()}
    keys = [key for key in sorted(known) if others.get(key)]
    return {key: generator.choice(others[key]) for key in generator.sample(keys, generator.randint(1, CHANGES))}


def known_values(base: dict[str, Any]) -> dict[str, Any]:
    """The keys that a configuration may have, with their values: its own, and those of transformers for its type."""
    from transformers import CONFIG_MAPPING

    if base["model_type"] not in CONFIG_MAPPING:  # plain references scale no positions
        return {key: value for key, value in base.items() if key != "rope_scaling"}
    rope = {"rope_scaling": None, "rope_theta": None, "partial_rotary_factor": None}
    defaults = CONFIG_MAPPING[base["model_type"]]().to_dict()
    return {**rope, **{key: value for key, value in defaults.items() if not key.startswith("_")}, **base}


def log_probabilities(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Megatron-Core's `[B, T - 1]` for a checkpoint."""
    from megatron_bai.model import build, hf_checkpoint
    from megatron_bai.model.architecture import read_architecture

    model = read_architecture(directory)
    settings = config.Config(model=model, trainer=config.Trainer())
    actor = build.build_actor(settings, DEVICE[0], train=False)
    hf_checkpoint.load_hf(actor.modules, model, directory)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = actor.modules[0](tokens, positions, None)
    return next_tokens(logits, tokens)


def next_tokens(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[B, T - 1]` of the tokens that come."""
    return logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def fill(name: str, directory: Path) -> Any:
    """Write random weights as the reference has them; return its logits, a function of tokens."""
    if reference := published.own_reference(name):
        reference.make(directory)
        return lambda tokens: reference.logits(directory, tokens)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    described = AutoConfig.from_pretrained(directory, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(described, dtype=torch.float32).eval()
    for module in model.modules():  # transformers' norms of latents have 1e-6 whatever is configured; SGLang's have not
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = described.rms_norm_eps
    published.vary(model)
    content = (directory / "config.json").read_bytes()
    model.save_pretrained(directory)
    (directory / "config.json").write_bytes(content)
    return lambda tokens: model(tokens).logits


def case(name: str, directory: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """What became of one configuration; None where the reference does not build it."""
    (directory / "config.json").write_text(json.dumps(described))
    tokens = published.tokens_of(name)
    try:
        wanted = next_tokens(fill(name, directory)(tokens), tokens)
    except Exception:
        return None
    try:
        found = log_probabilities(directory, tokens)
    except UserError as error:
        return {"refused": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()[-300:]}
    return {"difference": float((found - wanted).abs().max())}


def rank_main(rank: int, port: int, directory: Path, seed: int, names: list[str]) -> None:
    join(rank, 1, port)
    DEVICE.append(backend.init_backend(config.Backend(kind="cpu", timeout_s=300)))
    from megatron_bai.model import build

    build.init_parallel(config.Parallel(), seed=0)
    for name in names:
        generator, base, found = random.Random(seed), published.read(name), []
        known = known_values(base)
        while len(found) < CASES:
            changes = draw(base, known, generator)
            with tempfile.TemporaryDirectory() as fresh:
                if result := case(name, Path(fresh), base | changes):
                    found.append({"changes": changes, **result})
        (directory / f"{name}.json").write_text(json.dumps(found, indent=1))
    backend.shutdown_backend()


def main() -> None:
    directory, seed, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    prepare("megatron.core.models.gpt", "megatron_bai.rl.policy.training_engine")
    torch.multiprocessing.start_processes(
        rank_main, (free_port(), directory, seed, names), nprocs=1, start_method="fork"
    )


if __name__ == "__main__":
    main()
