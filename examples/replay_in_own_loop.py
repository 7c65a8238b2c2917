"""R3 in a training loop of your own, where the forward step reads tokens and routes: the two lines marked `# replay`.

    torchrun --nproc-per-node 2 examples/replay_in_own_loop.py     (pipeline parallel; or plain python)

So are Megatron-LM's `pretrain_gpt.py`, verl and slime built. The rollouts here are random.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_bai.config import Backend
from megatron_bai.distributed.backend import init_backend, shutdown_backend

LENGTH, VOCABULARY, EXPERTS, TOPK, LAYERS, MICRO_BATCHES = 16, 64, 8, 2, 4, 3


def build_model(recompute: bool = True) -> tuple[torch.nn.Module, Any]:
    """Build this stage's part of a small MoE, with a router's replay handle in each layer, and R3 for it."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_bai.routing.replay import ForwardStepRoutes

    recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        ffn_hidden_size=48,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_enable_routing_replay=True,  # without it routers have no handle
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
        **(recomputed if recompute else {}),
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )
    return model, ForwardStepRoutes([model])


def rollouts(step: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro-batches; every pipeline stage reads the same ones, since each needs its layers' routes."""
    random = torch.Generator().manual_seed(step)
    for _ in range(MICRO_BATCHES):
        scores = torch.rand(2, LENGTH, LAYERS, EXPERTS, generator=random)
        routed = torch.arange(LENGTH) < torch.tensor([[LENGTH - 1], [LENGTH // 2]])  # not the last token, nor padding
        routes = torch.where(routed[:, :, None, None], scores.topk(TOPK).indices, 0)
        yield {
            "tokens": torch.randint(VOCABULARY, (2, LENGTH), generator=random),
            "routes": routes,
            "routed": routed,
        }


def train_step(model: torch.nn.Module, optimizer: Any, replay: Any, batches: Iterator[dict[str, torch.Tensor]]) -> list:
    """Take one step; return the losses of the micro-batches, on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def to_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return output.float().mean(), {"loss": output.detach().float().mean()}

    def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        replay.install(model, batch["routes"], batch["routed"])  # replay
        tokens = batch["tokens"]
        positions = torch.arange(LENGTH).expand_as(tokens)
        return model(tokens, positions, None, labels=tokens.roll(-1, dims=1)), to_loss

    optimizer.zero_grad()
    forward_backward_func = replay.wrap(get_forward_backward_func())  # replay
    losses: list = forward_backward_func(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=model,
        num_microbatches=MICRO_BATCHES,
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=False,
    )
    optimizer.step()
    return losses


def main() -> None:
    """Train for three steps."""
    init_backend(Backend(kind="cpu"))  # on a GPU: torch.distributed.init_process_group
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=int(os.environ.get("WORLD_SIZE", 1)))
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, replay = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(3):
        losses = train_step(model, optimizer, replay, rollouts(step))
        if losses:
            print(step, float(sum(loss["loss"] for loss in losses)) / len(losses))
        print("replayed", replay.replay.rows, "recomputed", replay.replay.recomputed)  # (token, layer) rows so far
    shutdown_backend()


if __name__ == "__main__":
    main()
