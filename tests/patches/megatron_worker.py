"""Whether Megatron-Core does what each diff of `patches/megatron-core-0.16.1` is for. Run as a script, it prints a JSON
object: of each check, by the diff's name and its own, what went wrong; empty if nothing did.

With `upstream` the fix of training on a CPU is applied at run time for the checks of the other diffs. Without, no
runtime fix is. Experts are never marked by this package.
"""

import functools
import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from moe import MODEL
from outcomes import outcome
from processes import free_port

from megatron_bai import compat, config
from megatron_bai.distributed import backend
from megatron_bai.model import build, megatron_checkpoint, param_shards

SAMPLES, LENGTH, SCALE = 4, 16, 1e3


def work(asked: Callable[[int], Any], rank: int, size: int, port: int, theirs: Any) -> None:
    """Be one rank of a world: send what was found, or why there is nothing to send."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        theirs.send(asked(size))
    except BaseException as error:
        theirs.send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def step(world: int) -> dict[str, Any]:
    """Train one step at TP `world`, the experts whole on every rank: what was added to each expert's weights."""
    device = backend.init_backend(config.Backend(kind="cpu", timeout_s=120))
    settings = config.Config(
        model=MODEL,
        parallel=config.Parallel(tensor=world, sequence=world > 1),
        trainer=config.Trainer(clip_grad=1e9),
    )
    build.init_parallel(settings.parallel, seed=0)
    actor = build.build_actor(settings, device)
    param_shards.init_random(actor.modules, MODEL, seed=0)
    megatron_checkpoint.reload_master_weights(actor)
    for group in actor.optimizer.param_groups:  # Adam's first step is then −SCALE · gradient
        group["eps"], group["lr"] = 1e6, 1e6 * SCALE
    experts = {name: value for name, value in actor.modules[0].named_parameters() if ".experts." in name}
    before = {name: value.detach().clone() for name, value in experts.items()}
    from megatron.core.pipeline_parallel import get_forward_backward_func

    draw = torch.Generator().manual_seed(1)
    micros = iter(torch.randint(MODEL.vocab_size, (2, SAMPLES // 2, LENGTH), generator=draw))

    def forward(data: Any, model: Any) -> tuple[torch.Tensor, Callable]:
        logits = model(next(data), torch.arange(LENGTH).expand(SAMPLES // 2, -1), None)
        return logits, lambda found: (found.square().sum() / (LENGTH * MODEL.vocab_size), {})

    for chunk in actor.chunks:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward, data_iterator=micros, model=actor.chunks, num_microbatches=2, seq_length=LENGTH,
        micro_batch_size=SAMPLES // 2, forward_only=False,
    )  # fmt: skip
    done, norm, _ = actor.optimizer.step()
    assert done
    moved = {name: (before[name] - value.detach()).numpy() / SCALE for name, value in experts.items()}
    return moved | {"norm": float(norm)}


def world(size: int, asked: Callable[[int], Any]) -> list[Any]:
    """What each rank of a world finds.

    Raises:
        RuntimeError: what went wrong on the first rank where something did.
    """
    fork, port = multiprocessing.get_context("fork"), free_port()
    ends, ranks = [], []
    for rank in range(size):
        ours, theirs = fork.Pipe(duplex=False)
        ranks.append(fork.Process(target=work, args=(asked, rank, size, port, theirs), daemon=True))
        ranks[-1].start()
        theirs.close()
        ends.append(ours)
    found = [end.recv() for end in ends]
    for process in ranks:
        process.join()
    if failed := [each for each in found if isinstance(each, str)]:
        raise RuntimeError(failed[0])
    return found


@functools.cache
def alone() -> dict[str, Any]:
    return world(1, step)[0]


def trains() -> None:
    """One rank trains on a CPU: every weight of an expert that was chosen moves."""
    found = alone()
    assert len(found) > MODEL.num_experts and any(each.any() for name, each in found.items() if name != "norm")


def experts_agree() -> None:
    """Two tensor ranks, with half of a sequence each and all experts, update them as one rank does."""
    known, ranks = alone(), world(2, step)
    apart = [name for name in known if name != "norm" and not np.array_equal(ranks[0][name], ranks[1][name])]
    assert not apart, f"{len(apart)} of {len(known) - 1} weights of experts differ between tensor ranks"
    largest = max(float(np.abs(known[name]).max()) for name in known if name != "norm")
    off = max(float(np.abs(known[name] - ranks[0][name]).max()) for name in known if name != "norm")
    assert off < 1e-4 * largest, f"updates of experts are off by {off / largest:.1%} of the largest"
    assert abs(ranks[0]["norm"] / known["norm"] - 1) < 1e-4


def latent(size: int) -> None:
    """A model with multi-latent attention, whose values have heads of another size than its keys, learns; and this
    attention is torch's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    backend.init_backend(config.Backend(kind="cpu", timeout_s=120))
    build.init_parallel(config.Parallel(), seed=0)
    settings = MLATransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, normalization="RMSNorm",
        q_lora_rank=16, kv_lora_rank=12, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=6, qk_layernorm=True,
        rope_type="rope", add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True,
        apply_rope_fusion=False, masked_softmax_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=True, normalization="RMSNorm")
    model = GPTModel(settings, spec, vocab_size=64, max_sequence_length=64, position_embedding_type="rope")
    model(torch.arange(20).view(2, 10), torch.arange(10).expand(2, -1), None).square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in model.parameters())
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(10, 2, 4, dim, generator=draw) for dim in (12, 12, 6))
    found = model.decoder.layers[0].self_attention.core_attention(query, key, value, None)
    heads = (each.permute(1, 2, 0, 3) for each in (query, key, value))
    known = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    assert (found - known.permute(2, 0, 1, 3).flatten(2)).abs().max() < 1e-5


def latent_attention() -> None:
    world(1, latent)


def transformer_engine_is_absent() -> None:
    from importlib.util import find_spec

    from megatron.core.transformer import multi_latent_attention

    assert multi_latent_attention.HAVE_TE == bool(find_spec("transformer_engine")), "taken for present"


CHECKS: dict[str, dict[str, Callable[[], None]]] = {
    "cpu-training": {"trains": trains},
    "expert-gradients": {"agree": experts_agree},
    "mla-local-spec": {"model": latent_attention, "absent": transformer_engine_is_absent},
}


def main(upstream: bool) -> None:
    gc.disable()  # nothing here outlives the process
    build._mark_experts = lambda model: None
    fixes, compat.PATCHES = compat.PATCHES, ()
    import megatron.core.models.gpt
    import megatron.core.pipeline_parallel  # noqa: F401  (once, for all forks)

    found = {}
    for diff, checks in CHECKS.items():
        if upstream and diff != "cpu-training":
            compat.PATCHES = fixes
            alone.cache_clear()
        for name, check in checks.items():
            found[f"{diff} {name}"] = outcome(check)
    print(json.dumps(found))


if __name__ == "__main__":
    main("upstream" in sys.argv[1:])
