"""Started by torchrun: real Megatron-Core models saved in its several spellings, merged, and loaded again.

Argument: a directory. Two ranks hold a model in TP 2 × EP 2. Every weight is seeded by what it is, so each rank can
compute the parts it must find. The embeddings have 61 tokens and are padded to 64 and 68 rows.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_bai.cli import merge as merge_verb
from megatron_bai.config import Backend, Config, Merge, Model, Parallel
from megatron_bai.distributed import backend
from megatron_bai.model import build, spec_parts
from megatron_bai.model.families.layer_parts import has_experts
from megatron_bai.model.param_shards import Shard, fill_parameters, local_shards

TOKENS = 61
PARALLEL = Parallel(tensor=2, expert=2, sequence=True)
MODEL = Model(
    num_layers=3, hidden_size=16, num_attention_heads=4, num_query_groups=2, head_dim=4, num_experts=4, moe_topk=2,
    moe_ffn_hidden_size=6, vocab_size=TOKENS, max_position_embeddings=32,
)  # fmt: skip
STACKED: dict = {}
BY_LAYER = {"non_homogeneous_layers": True}
SINGLETON = {"singleton_local_shards": True}
WEIGHTS, ALPHA = [0.25, 0.75], 0.5


def gpt(rows: int, dense: int, local_names: bool, device: backend.Device) -> torch.nn.Module:
    """A model whose first `dense` layers have no experts.

    Args:
        local_names: the norms' names of Megatron's local layers; else those of Transformer Engine's.
    """
    config = build.transformer_config(MODEL, PARALLEL, device)
    config.moe_router_enable_expert_bias, config.moe_router_score_function = True, "sigmoid"
    if dense:
        config.moe_layer_freq = [int(layer >= dense) for layer in range(MODEL.num_layers)]
    spec = spec_parts.decoder_spec(config, False, None)
    for layer in spec.layer_specs:
        # a norm fused into a dense MLP has this name under Transformer Engine, too
        if local_names or not has_experts(layer):
            layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return GPTModel(
        config, spec, vocab_size=rows, max_sequence_length=MODEL.max_position_embeddings, parallel_output=True,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip


def value(shard: Shard, seed: int) -> torch.Tensor:
    """The weight that a shard is cut from, by what it means."""
    key, index = shard.key, list(shard.index)
    if found := re.search(r"layers\.(\d+)\.", key):
        key, index = key.replace(found[0], "layers."), [int(found[1]), *index]
    key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {key} {index}".encode()).digest()[:7], "big"))
    if "embedding" in key or "output_layer" in key:
        rows = torch.full(shard.shape, float(seed))
        rows[:TOKENS] = torch.randn(TOKENS, *shard.shape[1:], generator=generator)
        return rows
    return torch.randn(shard.shape, generator=generator)


def expected(shard: Shard) -> torch.Tensor:
    """The merge in float64, rounded once; the padding is the base's."""
    coefficients = [ALPHA, *((1 - ALPHA) * weight for weight in WEIGHTS)]
    parts = [value(shard, seed) for seed in range(3)]
    total = parts[0].double() * coefficients[0]
    for part, coefficient in zip(parts[1:], coefficients[1:]):
        total += part.double() * coefficient
    if "embedding" in shard.key or "output_layer" in shard.key:
        total[TOKENS:] = parts[0][TOKENS:]
    return total.float()


def save(path: Path, model: torch.nn.Module, metadata: dict) -> None:
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=dict(metadata)), str(path))
    if dist.get_rank() == 0:
        (path / "config.json").write_text(json.dumps({"vocab_size": TOKENS}))
    dist.barrier()


def check(path: Path, model: torch.nn.Module, metadata: dict) -> None:
    """Megatron-Core loads the output, with every key accounted for, and each part is what it should be."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(-1)
    state = model.sharded_state_dict(metadata=dict(metadata))
    loaded = dist_checkpointing.load(state, str(path), strict="raise_all")
    model.load_state_dict(loaded)
    shards = local_shards([model])
    assert len({shard.key for shard in shards}) > 12
    for shard in shards:
        assert torch.equal(shard.data, shard.local_part(expected(shard))), (path.name, shard.key, shard.index)


def main() -> None:
    directory = Path(sys.argv[1])
    device = backend.init_backend(Backend(kind="cpu"))
    build.init_parallel(PARALLEL, 0)
    cases = {  # the spelling, the padded rows and whether names are the local ones, of base and members
        "homogeneous": (0, [(STACKED, 64, False), (SINGLETON, 68, True), (BY_LAYER, 62, False)]),
        "reversed": (0, [(SINGLETON, 68, True), (BY_LAYER, 64, False), (STACKED, 64, True)]),
        "dense first": (1, [(BY_LAYER, 64, False), (SINGLETON, 64, False), (BY_LAYER, 68, True)]),
    }
    for name, (dense, spellings) in cases.items():
        paths = []
        for seed, (metadata, rows, local_names) in enumerate(spellings):
            model = gpt(rows, dense, local_names, device)
            fill_parameters([model], lambda shard, seed=seed: value(shard, seed))
            paths.append(directory / name / str(seed))
            save(paths[-1], model, metadata)
        base, *members = map(str, paths)
        out = directory / name / "out"
        merge = Merge(pretrained=base, members=members, weights=WEIGHTS, alpha=ALPHA, output=str(out), verify="all")
        merge_verb.run(Config(merge=merge))
        metadata, rows, local_names = spellings[0]
        check(out, gpt(rows, dense, local_names, device), metadata)
    backend.shutdown_backend()


if __name__ == "__main__":  # Megatron-Core's save spawns a process that imports this file
    main()
