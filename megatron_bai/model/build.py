"""Build the Megatron-Core model, its data-parallel wrapper and its optimizer from the settings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_bai import config
from megatron_bai.config.limits import validate_group
from megatron_bai.distributed.backend import Device
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import architecture_of
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.freeze import freeze_parts
from megatron_bai.model.parameter_names import require_known_parameters
from megatron_bai.model.pipeline_stages import chunk_sizes
from megatron_bai.model.router_losses import set_router_losses
from megatron_bai.model.spec_parts import activation, decoder_spec
from megatron_bai.model.value_head import ValueHead

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel


@dataclass
class MegatronModel:
    """A model in chunks on this rank, with its optimizer: the actor, the critic.

    Attributes:
        chunks: the model's stages on this rank, wrapped in Megatron's DistributedDataParallel.
        optimizer: Megatron's, or None for a model that only runs forward.
        architecture: independent of the layout.
    """

    chunks: "list[DistributedDataParallel]"
    optimizer: Any
    architecture: Architecture

    @property
    def modules(self) -> "list[GPTModel]":
        """The bare GPTModel of each chunk."""
        return [chunk.module for chunk in self.chunks]

    @property
    def transformer_config(self) -> Any:
        """Megatron's TransformerConfig, which all chunks share."""
        return self.modules[0].config


def init_parallel(parallel: config.Parallel, seed: int, timeout_s: float = 600.0) -> None:
    """Create Megatron's process groups and seed its generators. *Collective*. Experts are never split.

    Args:
        parallel: the layout.
        seed: of torch's generator; of Megatron's, one more.
        timeout_s: of one collective, `backend.timeout_s`. Megatron's own would be half an hour.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_virtual_stages(parallel),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout_s / 60,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed + 1)


def _virtual_stages(parallel: config.Parallel) -> int | None:
    """Return the chunks of a stage as Megatron wants them: None where the schedule is not interleaved."""
    return parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None


# `parallel.recompute` in Megatron's terms.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

_ROUTER = {
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_router_bias_update_rate": 0.0,  # Megatron-Core's default would move an expert bias in every update
}
_NO_FUSION = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}


def transformer_config(model: config.Model, parallel: config.Parallel, device: Device, replayable: bool = True) -> Any:
    """Return Megatron's TransformerConfig, as the family has it, with every fusion a CPU lacks switched off.

    Args:
        model: the architecture.
        parallel: the layout.
        device: what this process computes on.
        replayable: give the routers handles for routing replay.
    """
    architecture = architecture_of(model)
    arguments: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=architecture.dense_ffn_hidden_size or model.moe_ffn_hidden_size,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.moe_topk,
        moe_token_dispatcher_type=parallel.dispatcher,
        moe_grouped_gemm=device.use_transformer_engine,
        moe_permute_fusion=False,
        moe_enable_routing_replay=replayable,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_virtual_stages(parallel),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.sequence,
        variable_seq_lengths=False,
        params_dtype=device.dtype,
        pipeline_dtype=device.dtype,
        bf16=device.dtype is torch.bfloat16,
        use_cpu_initialization=device.kind == "cpu",
        # The values are overwritten, alike in every layout; but without this Megatron-Core does not mark its
        # parameters as tensor parallel, and the gradient's norm leaves out those of all tensor ranks but the first.
        perform_initialization=True,
        batch_p2p_comm=device.kind == "cuda",
        **_ROUTER,
        **_NO_FUSION,
        **RECOMPUTE[parallel.recompute],
        **_layer_arguments(architecture, parallel),
    )
    arguments |= architecture.family.transformer_arguments(architecture)
    arguments["activation_func"] = activation(arguments["activation_func"])
    made = architecture.family.config_class()(**arguments)
    for name, value in architecture.family.rope_arguments(architecture).config.items():
        setattr(made, name, value)
    return made


def _layer_arguments(model: Architecture, parallel: config.Parallel) -> dict[str, Any]:
    """Return which layers have experts, and which stage has which, where that is not the same for all.

    Where nothing is said Megatron-Core stacks the layers in checkpoints, as those of earlier releases are.
    """
    arguments: dict[str, Any] = {}
    if len(model.moe_layers) < model.num_layers:
        moe = set(model.moe_layers)
        arguments["moe_layer_freq"] = [int(layer in moe) for layer in range(model.num_layers)]
    if parallel.stage_layers:
        stages = [["decoder"] * size for size in chunk_sizes(model.num_layers, parallel)]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        arguments["pipeline_model_parallel_layout"] = stages
    return arguments


def _build_gpt(
    model: Architecture, megatron_config: Any, transformer_engine: bool, vp_stage: int | None, tied: bool
) -> "GPTModel":
    """Build one chunk of the model. `vp_stage`: its index among the stage's chunks; None where there is one."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        megatron_config,
        decoder_spec(megatron_config, transformer_engine, vp_stage, model),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=tied,
        parallel_output=True,
        vp_stage=vp_stage,
        **model.family.rope_arguments(model).gpt,
    )


def _mark_experts(gpt: torch.nn.Module) -> None:
    """Mark expert parameters so that their gradients are reduced and counted among the right ranks.

    Megatron-Core 0.16.1 gets three layouts wrong, all silently (of the first two Megatron-LM #5916, #6080):

    - TP > 1 with EP 1: the experts are replicated over the tensor ranks and each replica sees another part of the
      sequence, but only with EP > 1 are they put into the expert data-parallel group. Without `allreduce = False`
      their gradients are never summed and the replicas drift apart.
    - TP > 1 with Transformer Engine: a parameter not marked `tensor_model_parallel` counts in the gradient's norm on
      the first tensor rank only, although the other ranks hold other experts (or, at EP 1, other optimizer shards).
    - TP > 1 where experts have biases: the second is marked `sequence_parallel`, which sums its gradient over tensor
      ranks, although they hold other experts (or, at EP 1, are in the expert data-parallel group, which sums it).
    """
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            marked: Any = parameter  # torch's type has no such attributes
            marked.allreduce = False
            marked.tensor_model_parallel = True
            marked.sequence_parallel = False


def _mark_sinks(gpt: torch.nn.Module) -> None:
    """Mark attention sinks, which tensor ranks split as heads: else a gradient's norm has the first rank's alone."""
    for name, parameter in gpt.named_parameters():
        if name.endswith(".softmax_offset"):
            marked: Any = parameter
            marked.tensor_model_parallel = True


def build_actor(settings: config.Config, device: Device, train: bool = True) -> MegatronModel:
    """Build the policy on this rank with unset weights, and its optimizer where it is to be trained.

    `init_parallel` must have run. The optimizer copies its master weights at construction, so who sets the weights
    afterwards calls `megatron_checkpoint.reload_master_weights`.

    Args:
        settings: model, parallel, trainer and supervised are used.
        device: what this process computes on.
        train: build the optimizer, too.
    """
    megatron_config = transformer_config(settings.model, settings.parallel, device)
    megatron_config.moe_router_bias_update_rate = settings.trainer.expert_bias_update_rate
    set_router_losses(megatron_config, settings.supervised)
    return _build(settings, megatron_config, device, train)


def build_critic(settings: config.Config, device: Device) -> MegatronModel:
    """Build a value model as `build_actor` builds the policy: with a `ValueHead` for an output layer, without replay.

    Its expert bias, if there is one, stays what it is. `trainer.freeze` is of the actor.

    Args:
        settings: model, parallel and trainer are used.
        device: what this process computes on.
    """
    megatron_config = transformer_config(settings.model, settings.parallel, device, replayable=False)
    return _build(settings, megatron_config, device, head=ValueHead)


def _build(
    settings: config.Config,
    megatron_config: Any,
    device: Device,
    train: bool = True,
    head: type[ValueHead] | None = None,
) -> MegatronModel:
    """Build a model in chunks that share a TransformerConfig: schedules read it. `head` replaces the output layer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    architecture = architecture_of(settings.model)
    reduction = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunks = []
    for vp_stage in range(settings.parallel.virtual_pipeline) if _virtual_stages(settings.parallel) else [None]:
        tied = architecture.tied and head is None  # a critic has no output layer to share
        gpt = _build_gpt(architecture, megatron_config, device.use_transformer_engine, vp_stage, tied)
        if head and gpt.post_process:
            gpt.output_layer = head(megatron_config)
        gpt = gpt.to(device.device)
        require_known_parameters(gpt, architecture)
        _mark_experts(gpt)
        _mark_sinks(gpt)
        if head is None:
            freeze_parts(gpt, settings.trainer.freeze)
        chunks.append(DistributedDataParallel(megatron_config, reduction, gpt))
    trainer = settings.trainer
    optimizer = None
    if train:
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=trainer.learning_rate,
                min_lr=trainer.min_learning_rate,
                weight_decay=trainer.weight_decay,
                adam_beta2=trainer.adam_beta2,
                clip_grad=trainer.clip_grad,
                use_distributed_optimizer=True,
                bf16=device.dtype is torch.bfloat16,
            ),
            chunks,
        )
    megatron_config.finalize_model_grads_func = finalize_model_grads
    megatron_config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return MegatronModel(chunks, optimizer, architecture)


def validate_layout(model: config.Model, parallel: config.Parallel, world: int) -> None:
    """Refuse an architecture or layout that cannot be built, naming the settings in conflict.

    Args:
        model: the architecture.
        parallel: the layout.
        world: number of processes.

    Raises:
        UserError: a size that does not divide, or a world the layout does not fit.
    """
    validate_group("model", model)
    validate_group("parallel", parallel)
    architecture_of(model)
    stages = parallel.pipeline * parallel.virtual_pipeline
    checks = [
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tensor", parallel.tensor),
        ("model.num_query_groups", model.num_query_groups, "parallel.tensor", parallel.tensor),
        ("model.vocab_size", model.vocab_size, "parallel.tensor", parallel.tensor),
        ("model.num_experts", model.num_experts, "parallel.expert", parallel.expert),
        ("the number of processes", world, "parallel.tensor × parallel.pipeline", parallel.tensor * parallel.pipeline),
        ("the number of processes", world, "parallel.expert × parallel.pipeline", parallel.expert * parallel.pipeline),
    ]
    if not parallel.stage_layers:
        checks += [
            ("model.num_layers", model.num_layers, "parallel.pipeline", parallel.pipeline),
            ("model.num_layers", model.num_layers, "parallel.pipeline × parallel.virtual_pipeline", stages),
        ]
    for name, value, divisor_name, divisor in checks:
        if value % divisor:
            raise UserError(f"{name} ({value}) is not a multiple of {divisor_name} ({divisor})")
    chunk_sizes(model.num_layers, parallel)
    if parallel.tensor > 1 and not parallel.sequence:
        raise UserError("parallel.tensor > 1 needs parallel.sequence=true: Megatron-Core trains an MoE no other way")
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true needs parallel.tensor > 1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1: it interleaves pipeline stages")


def validate_micro_batches(parallel: config.Parallel, count: int) -> None:
    """Refuse a number of micro-batches that Megatron's interleaved schedule does not take.

    Args:
        parallel: the layout.
        count: micro-batches of a rank's mini-batch.

    Raises:
        UserError: names the settings.
    """
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        raise UserError(
            f"{count} micro-batches of a rank's mini-batch are not a multiple of parallel.pipeline "
            f"({parallel.pipeline}), which parallel.virtual_pipeline={parallel.virtual_pipeline} needs: change "
            "trainer.micro_batch_size"
        )
