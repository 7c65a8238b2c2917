"""Settings of a run, its backend, model and parallel layout."""

from dataclasses import dataclass

from megatron_bai.config.limits import LARGEST_SEED, LONGEST_S, choice, number, path


@dataclass
class Run:
    """Name, directory and seed of a run."""

    name: str = "default"
    dir: str = path("runs/${run.name}")  # everything the run writes lies below it
    seed: int = number(0, at_least=0, at_most=LARGEST_SEED)


@dataclass
class Backend:
    """Device, dtype and time limit of the training engine."""

    kind: str = choice("auto", "auto", "cpu", "cuda")  # cpu (gloo), cuda (NCCL), or auto: cuda where there is a device
    # of parameters and activations in training: float32 or bfloat16
    dtype: str = choice("float32", "float32", "bfloat16")
    # of one collective, rollouts that ranks wait for included: after it those left behind stop
    timeout_s: int = number(1800, at_least=1, at_most=LONGEST_S)
    # whose layers: transformer_engine, or local: Megatron-Core's, which compute one expert after another. auto: on cuda
    # Transformer Engine's, without which the run is refused; on a CPU local
    transformer_impl: str = choice("auto", "auto", "transformer_engine", "local")
    require: list[str] = choice(list, "transformer_engine", "apex")  # packages without which a run with CUDA is refused
    # take releases of Megatron-Core and SGLang that are not in the table, if the run finds them right (docs/replay.md,
    # docs/sglang.md)
    untested: bool = False


@dataclass
class Model:
    """The sizes of the model: the initial checkpoint's, and only with random weights those given here.

    0 and null stand for the checkpoint's; another value that is not the checkpoint's is refused. Random weights are a
    Qwen3-MoE's, of the sizes in conf/model/tiny.yaml where nothing is given.
    """

    num_layers: int = number(0, at_least=0)
    hidden_size: int = number(0, at_least=0)
    num_attention_heads: int = number(0, at_least=0)
    num_query_groups: int = number(0, at_least=0)  # key/value heads
    head_dim: int = number(0, at_least=0)
    num_experts: int = number(0, at_least=0)
    moe_topk: int = number(0, at_least=0)  # experts a token uses
    moe_ffn_hidden_size: int = number(0, at_least=0)  # of one expert
    vocab_size: int = number(0, at_least=0)  # rows of the embedding; the tokenizer's ids lie below it
    max_position_embeddings: int = number(0, at_least=0)  # longest sequence, in tokens
    rope_theta: float | None = number(None, above=0)
    norm_epsilon: float | None = number(None, at_least=0)
    init_std: float = number(0.02, at_least=0)


@dataclass
class Parallel:
    """Parallel layout of the training ranks, as Megatron-Core names it."""

    tensor: int = number(1, at_least=1)
    expert: int = number(1, at_least=1)
    pipeline: int = number(1, at_least=1)
    # decoder layers of each stage, in order; with virtual_pipeline of each chunk, in the model's order. Empty: alike
    stage_layers: list[int] = number(list, at_least=0)
    # chunks of layers a pipeline stage holds, run interleaved (Megatron's VPP)
    virtual_pipeline: int = number(1, at_least=1)
    sequence: bool = False  # sequence parallelism; Megatron-Core needs it for MoE training when tensor > 1
    # or allgather: how tokens travel to the ranks of their experts
    dispatcher: str = choice("alltoall", "alltoall", "allgather")
    # of activations in the backward: none, selective (attention), moe (MoE layers) or full
    recompute: str = choice("none", "none", "selective", "moe", "full")


@dataclass
class Cluster:
    """The machines of a training run: `plan` computes for them, and `train` refuses another number of processes."""

    processes: int = number(0, at_least=0)  # of the training, one a GPU; 0: as many as are started
    per_machine: int = number(8, at_least=1)  # of them on one machine
    memory_gb: float = number(80.0, above=0, finite=False)  # of one GPU, in 10⁹ bytes
