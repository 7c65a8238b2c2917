"""Compute by formulas what a training rank holds on its GPU: nothing is built, so that a laptop can plan for a cluster.

Parameters, and with them weights, gradients and the optimizer's state, are counted exactly, as Megatron-Core builds
them (tests compare with its own modules). Activations are an estimate: what autograd keeps of each operation of a
layer, with attention that keeps no scores and a perfectly balanced router. Megatron-LM prints a report of this kind
(`--report-theoretical-memory`); the package megatron-core does not contain it.

All sizes are in bytes; `tokens` are those of one micro-batch.
"""

import math
from dataclasses import dataclass

from megatron_bai.config import Model, Parallel
from megatron_bai.model.architecture import Architecture, architecture_of
from megatron_bai.model.families.param_mapping import EMBEDDING, OUTPUT_LAYER
from megatron_bai.model.hf_mapping import VALUE_HEAD
from megatron_bai.model.pipeline_stages import stage_layers
from megatron_bai.rl.policy.logprobs import WORK_ELEMENTS

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ParamCounts:
    """Numbers of parameters, of a rank or a model.

    Attributes:
        dense: those that every token passes.
        experts: those of experts.
    """

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.dense + self.experts

    def active(self, model: Model) -> float:
        """Return the number of parameters that one token passes."""
        return self.dense + self.experts * model.moe_topk / model.num_experts


def count_params(model: Model, parallel: Parallel | None = None, stage: int = 0, critic: bool = False) -> ParamCounts:
    """Count the parameters of a rank of a pipeline stage; of the whole model without `parallel`.

    Args:
        model: the architecture.
        parallel: the layout.
        stage: index of the pipeline stage.
        critic: whether a value head takes the place of the output layer.
    """
    parallel = parallel or Parallel()
    architecture = architecture_of(model)
    layers = set(stage_layers(model.num_layers, parallel, stage))
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    mappings = {key: kind for key, kind in architecture.mappings.items() if kind.trained}
    kinds = [kind for key, kind in mappings.items() if not (critic and key == OUTPUT_LAYER)]
    kinds += [VALUE_HEAD] if critic else []
    dense = experts = 0
    for kind in kinds:
        size = math.prod(kind.shape(architecture)) // (parallel.tensor if kind.tensor_parallel else 1)
        if kind.num_stacked_axes == 2:
            held = len(layers.intersection(architecture.layers(kind.layers))) * model.num_experts // parallel.expert
            experts += held * size
        elif kind.num_stacked_axes == 1:
            dense += len(layers.intersection(architecture.layers(kind.layers))) * size
        elif is_first if kind.megatron == EMBEDDING else is_last:
            dense += size
        elif is_last and architecture.tied and not critic and kind.megatron == EMBEDDING:
            dense += size  # the output layer's copy
    return ParamCounts(dense, experts)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a model in training on one rank, which it holds all the time."""

    weights: float
    gradients: float
    optimizer: float


def state_bytes(params: ParamCounts, parallel: Parallel, processes: int, dtype: str) -> StateBytes:
    """Compute the bytes of weights, gradients and optimizer state on one rank.

    Megatron's distributed optimizer holds gradients in float32, two moments of Adam, and a master copy of weights in
    less than float32; moments and master weights are split over the ranks that hold the same parameters.

    Args:
        params: parameters of the rank.
        parallel: the layout.
        processes: number of ranks of the run.
        dtype: of weights, a key of `DTYPE_BYTES`.
    """
    dense_ranks = processes // (parallel.tensor * parallel.pipeline)
    expert_ranks = processes // (parallel.expert * parallel.pipeline)
    moments = 8 if dtype == "float32" else 12
    split = params.dense / dense_ranks + params.experts / expert_ranks
    return StateBytes(params.total * DTYPE_BYTES[dtype], params.total * 4, split * moments)


def layer_activation_bytes(model: Model, parallel: Parallel, tokens: int, dtype: str) -> tuple[float, float, float]:
    """Compute the bytes of one layer's activations on a rank, in three parts.

    Args:
        model: the architecture.
        parallel: the layout.
        tokens: of one micro-batch, over all tensor ranks.
        dtype: of activations, a key of `DTYPE_BYTES`.

    Returns:
        What attention keeps for its backward pass, what the MoE layer does, and the layer's input alone.
    """
    h, item_bytes, architecture = model.hidden_size, DTYPE_BYTES[dtype], architecture_of(model)
    kept = architecture.family.attention_values_per_token(architecture)
    local_tokens = tokens / parallel.tensor  # sequence parallelism, heads or balanced experts: all split alike
    # The input and its norm; queries, keys and values as projected and as rotated; the result; float32 statistics.
    attention = local_tokens * (item_bytes * (2 * h + kept) + 4 * (2 + 2 * model.num_attention_heads))
    # For each of a token's experts: the row it reads; gate and up, the activated gate, the product, and that times the
    # router's weight. Once a token: the input, its norm, and the router's float32 scores, as logits and probabilities.
    routed = model.moe_topk * (h + 5 * model.moe_ffn_hidden_size)
    shared = shared_expert_values(architecture)
    moe = local_tokens * (item_bytes * (2 * h + routed + shared) + 4 * 2 * model.num_experts)
    return attention, moe, local_tokens * h * item_bytes


def shared_expert_values(architecture: Architecture) -> int:
    """Return how many numbers of a token autograd keeps of the experts that all tokens pass; 0 where there are none.

    Their input is the MoE layer's. Tensor ranks split them as they split an MLP: each has all tokens and a part of the
    width.
    """
    arguments = architecture.family.transformer_arguments(architecture)
    width = arguments.get("moe_shared_expert_intermediate_size") or 0
    # Gate and up, the activated gate, and the product; what a gate of the whole output scales, and by what.
    gated = architecture.hidden_size + 1 if arguments.get("moe_shared_expert_gate") else 0
    return int(4 * width + gated)


def dense_activation_bytes(architecture: Architecture, parallel: Parallel, tokens: int, dtype: str) -> float:
    """Compute the bytes that the MLP of a layer without experts keeps on a rank for its backward pass.

    Args:
        architecture: of the model.
        parallel: the layout.
        tokens: of one micro-batch, over all tensor ranks.
        dtype: of activations, a key of `DTYPE_BYTES`.
    """
    # The input and its norm; gate and up, the activated gate, and the product.
    values = 2 * architecture.hidden_size + 4 * architecture.dense_ffn_hidden_size
    return tokens / parallel.tensor * values * DTYPE_BYTES[dtype]


def activation_bytes(
    model: Model, parallel: Parallel, stage: int, tokens: int, micro_batches: int, dtype: str
) -> float:
    """Compute the bytes that the passes of an update need at most on a rank of a stage, without logits.

    Megatron's schedules hold the activations of all micro-batches that a stage runs forward before its first backward
    pass. A layer that is recomputed holds its input alone, and while it is recomputed all its activations and their
    gradients.

    Args:
        model: the architecture.
        parallel: the layout.
        stage: index of the pipeline stage.
        tokens: of one micro-batch.
        micro_batches: number of micro-batches of the update on this rank.
        dtype: of activations, a key of `DTYPE_BYTES`.
    """
    chunks = parallel.virtual_pipeline
    stages_after = parallel.pipeline - stage - 1
    forward_first = stages_after * 2 + (chunks - 1) * parallel.pipeline if chunks > 1 else stages_after
    live_micro_batches = min(forward_first + 1, micro_batches * chunks)
    architecture, layers = architecture_of(model), set(stage_layers(model.num_layers, parallel, stage))
    attention, moe, layer_input = layer_activation_bytes(model, parallel, tokens, dtype)
    dense = dense_activation_bytes(architecture, parallel, tokens, dtype)
    num_moe, num_dense = (len(layers.intersection(architecture.layers(kind))) / chunks for kind in ("moe", "dense"))
    largest = max(moe if num_moe else 0.0, dense if num_dense else 0.0)
    everything = (num_moe + num_dense) * attention + num_moe * moe + num_dense * dense
    kept, recomputed = {
        "none": (everything, 0.0),
        "selective": (everything, 0.0),  # it would save scores, and none are counted
        "moe": (everything - num_moe * (moe - layer_input), moe if num_moe else 0.0),
        "full": ((num_moe + num_dense) * layer_input, attention + largest),
    }[parallel.recompute]
    return live_micro_batches * kept + recomputed + max(attention, largest)


def logits_bytes(model: Model, parallel: Parallel, tokens: int, dtype: str) -> float:
    """Compute the bytes of logits, their gradient, and the three float32 buffers of `rl/policy/logprobs.py`.

    Args:
        model: the architecture, for the size of its vocabulary.
        parallel: the layout; tensor ranks split the vocabulary.
        tokens: of one micro-batch.
        dtype: of logits and their gradient, a key of `DTYPE_BYTES`.

    Returns:
        Bytes on one rank of the last pipeline stage.
    """
    elements = tokens * model.vocab_size / parallel.tensor
    return 2 * elements * DTYPE_BYTES[dtype] + 3 * 4 * min(WORK_ELEMENTS, elements)


def server_bytes(model: Model, tensor: int, cached_tokens: int, dtype: str) -> tuple[float, float]:
    """Compute the bytes of SGLang on each GPU of a server: weights, and the key/value cache.

    Where there are more ranks than key/value heads, each rank holds one head.

    Args:
        model: the architecture.
        tensor: number of the server's GPUs.
        cached_tokens: tokens that the cache has room for.
        dtype: of weights and cache, a key of `DTYPE_BYTES`.
    """
    params = count_params(model)
    architecture = architecture_of(model)
    cache = cached_tokens * model.num_layers * architecture.family.cached_values_per_token(architecture, tensor)
    return params.total / tensor * DTYPE_BYTES[dtype], cache * DTYPE_BYTES[dtype]
