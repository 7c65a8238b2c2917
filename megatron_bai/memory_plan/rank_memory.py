"""Compute what a training rank holds on its GPU by formulas: nothing is built, so that a laptop can plan for a cluster.

Parameters, and with them weights, gradients and the optimizer's state, are counted exactly, as Megatron-Core builds
them (tests compare with its own modules). Activations are an estimate: what autograd keeps of each operation of a layer,
with attention that keeps no scores and a perfectly balanced router. Megatron-LM prints a report of this kind
(`--report-theoretical-memory`); the package megatron-core does not contain it.

Sizes are bytes; `tokens` are those of one micro-batch.
"""

from dataclasses import dataclass

from megatron_bai.config import Model, Parallel
from megatron_bai.rl.policy.logprobs import WORK_ELEMENTS

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Parameters:
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


def parameters(model: Model, parallel: Parallel | None = None, stage: int = 0, critic: bool = False) -> Parameters:
    """Count the parameters of a rank of a pipeline stage; of the whole model without `parallel`.

    Args:
        model: the architecture.
        parallel: the layout.
        stage: index of the pipeline stage.
        critic: whether a value head takes the place of the output layer.
    """
    parallel = parallel or Parallel()
    h, d, t = model.hidden_size, model.head_dim, parallel.tensor
    layers = model.num_layers // parallel.pipeline
    heads, groups = model.num_attention_heads, model.num_query_groups
    attention = ((heads + 2 * groups) * d * h + heads * d * h) // t
    whole = 2 * h + 2 * d + model.num_experts * h  # norms and the router, which tensor ranks do not split
    dense = layers * (attention + whole)
    vocabulary = model.vocab_size // t * h
    if stage == 0:
        dense += vocabulary
    if stage == parallel.pipeline - 1:
        dense += h + (h if critic else vocabulary)
    experts = layers * (model.num_experts // parallel.expert) * 3 * h * model.moe_ffn_hidden_size
    return Parameters(dense, experts)


@dataclass(frozen=True)
class State:
    """Bytes of a model in training on one rank, which it holds all the time."""

    weights: float
    gradients: float
    optimizer: float


def state(own: Parameters, parallel: Parallel, processes: int, dtype: str) -> State:
    """Compute the bytes of weights, gradients and optimizer state on one rank.

    Megatron's distributed optimizer holds gradients in float32, two moments of Adam, and a master copy of weights in
    less than float32; moments and master weights are split over the ranks that hold the same parameters.

    Args:
        own: parameters of the rank.
        parallel: the layout.
        processes: number of ranks of the run.
        dtype: of weights, a key of `BYTES`.
    """
    dense_ranks = processes // (parallel.tensor * parallel.pipeline)
    expert_ranks = processes // (parallel.expert * parallel.pipeline)
    moments = 8 if dtype == "float32" else 12
    split = own.dense / dense_ranks + own.experts / expert_ranks
    return State(own.total * BYTES[dtype], own.total * 4, split * moments)


def layer_activations(model: Model, parallel: Parallel, tokens: int, dtype: str) -> tuple[float, float, float]:
    """Compute the bytes of one layer's activations on a rank, in three parts.

    Returns:
        What attention keeps for its backward pass, what the MoE layer does, and the layer's input alone.
    """
    h, qkv = model.hidden_size, (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
    q, size = model.num_attention_heads * model.head_dim, BYTES[dtype]
    own = tokens / parallel.tensor  # sequence parallelism, or heads, or balanced experts: each splits by as much
    # The input and its norm; queries, keys and values as projected and as rotated; the result; float32 statistics.
    attention = own * (size * (2 * h + 2 * qkv + q) + 4 * (2 + 2 * model.num_attention_heads))
    # For each of a token's experts: the row it reads; gate and up, the activated gate, the product, and that times the
    # router's weight. Once a token: the input, its norm, and the router's float32 scores, as logits and probabilities.
    routed = model.moe_topk * (h + 5 * model.moe_ffn_hidden_size)
    moe = own * (size * (2 * h + routed) + 4 * 2 * model.num_experts)
    return attention, moe, own * h * size


def activations(model: Model, parallel: Parallel, stage: int, tokens: int, micro_batches: int, dtype: str) -> float:
    """Compute the bytes that the passes of an update need at most on a rank of a stage, without logits.

    Megatron's schedules hold the activations of as many micro-batches as a stage is ahead of its first backward pass;
    of a layer that is recomputed its input alone is held, and while it is, all that it has, and their gradients.
    """
    chunks = parallel.virtual_pipeline
    ahead = parallel.pipeline - stage - 1
    held = min((ahead * 2 + (chunks - 1) * parallel.pipeline if chunks > 1 else ahead) + 1, micro_batches * chunks)
    layers = model.num_layers // parallel.pipeline / chunks
    attention, moe, entry = layer_activations(model, parallel, tokens, dtype)
    kept, again = {
        "none": (attention + moe, 0.0),
        "selective": (attention + moe, 0.0),  # it would save scores, and none are counted
        "moe": (attention + entry, moe),
        "full": (entry, attention + moe),
    }[parallel.recompute]
    return held * layers * kept + again + max(attention, moe)


def logits(model: Model, parallel: Parallel, tokens: int, dtype: str) -> float:
    """Compute the bytes on the last stage: the logits, their gradient, and the three float32 buffers of `rl/policy/logprobs.py`."""
    elements = tokens * model.vocab_size / parallel.tensor
    return 2 * elements * BYTES[dtype] + 3 * 4 * min(WORK_ELEMENTS, elements)


def served(model: Model, tensor: int, cached_tokens: int, dtype: str) -> tuple[float, float]:
    """Compute the bytes of SGLang on each of a server's `tensor` GPUs: weights, and keys and values of `cached_tokens`.

    Where there are more ranks than key/value heads, each rank holds one head.
    """
    own = parameters(model)
    heads = max(1, model.num_query_groups // tensor)
    cache = cached_tokens * model.num_layers * 2 * heads * model.head_dim
    return own.total / tensor * BYTES[dtype], cache * BYTES[dtype]
