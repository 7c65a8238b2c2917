"""Settings of a run, its backend, model and parallel layout."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class Run:
    """Name, directory and seed of a run."""

    name: str = "default"
    dir: str = "runs/${run.name}"  # everything the run writes lies below it
    seed: int = 0


@dataclass
class Backend:
    """Device, dtype and time limit of the training engine."""

    kind: str = "auto"  # cpu (gloo), cuda (NCCL), or auto: cuda where there is a device
    dtype: str = "float32"  # of parameters and activations in training: float32 or bfloat16
    timeout_s: int = 1800  # of one collective, rollouts that ranks wait for included: after it those left behind stop


@dataclass
class Model:
    """A Qwen3-MoE: grouped-query attention with q/k norms, RMSNorm, SwiGLU experts, softmax top-k router."""

    num_layers: int = MISSING
    hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING  # key/value heads
    head_dim: int = MISSING
    num_experts: int = MISSING
    moe_topk: int = MISSING  # experts a token uses
    moe_ffn_hidden_size: int = MISSING  # of one expert
    vocab_size: int = MISSING  # rows of the embedding; the tokenizer's ids lie below it
    max_position_embeddings: int = MISSING  # longest sequence, in tokens
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02


@dataclass
class Parallel:
    """Parallel layout of the training ranks, as Megatron-Core names it."""

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # chunks of layers a pipeline stage holds, run interleaved (Megatron's VPP)
    sequence: bool = False  # sequence parallelism; Megatron-Core needs it for MoE training when tensor > 1
    dispatcher: str = "alltoall"  # or allgather: how tokens travel to the ranks of their experts
    recompute: str = "none"  # of activations in the backward: none, selective (attention), moe (MoE layers) or full


@dataclass
class Cluster:
    """The machines of a training run: `plan` computes for them, and `train` refuses another number of processes."""

    processes: int = 0  # of the training, one a GPU; 0: as many as are started
    per_machine: int = 8  # of them on one machine
    memory_gb: float = 80.0  # of one GPU, in 10⁹ bytes
