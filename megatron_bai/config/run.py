"""Settings of a run, its backend, model and parallel layout."""

from dataclasses import dataclass

from megatron_bai.config.limits import LARGEST_SEED, LONGEST_S, number, path, setting


@dataclass
class Run:
    """Name, directory and seed of a run."""

    name: str = setting("default", "what the run is called in reports")
    dir: str = path("runs/${run.name}", "everything the run writes lies below it")
    seed: int = number(0, "of random weights, data and samples", at_least=0, at_most=LARGEST_SEED)


@dataclass
class Backend:
    """Device, dtype and time limit of the training engine."""

    kind: str = setting(
        "auto", "cpu (gloo), cuda (NCCL), or auto: cuda where there is a device", choices=("auto", "cpu", "cuda")
    )
    dtype: str = setting(
        "float32", "of parameters and activations in training: float32 or bfloat16", choices=("float32", "bfloat16")
    )
    timeout_s: int = number(
        1800,
        "of one collective, rollouts that ranks wait for included: after it those left behind stop",
        at_least=1,
        at_most=LONGEST_S,
    )
    transformer_impl: str = setting(
        "auto",
        "whose layers: transformer_engine, or local: Megatron-Core's, which compute one expert after another. "
        "auto: on cuda Transformer Engine's, without which the run is refused; on a CPU local",
        choices=("auto", "transformer_engine", "local"),
    )
    require: list[str] = setting(
        list, "packages without which a run with CUDA is refused", choices=("transformer_engine", "apex")
    )
    untested: bool = setting(
        False,
        "take releases of Megatron-Core and SGLang that are not in the table, if the run finds them right "
        "(docs/replay.md, docs/sglang.md)",
    )


@dataclass
class Model:
    """The sizes of the model: the initial checkpoint's, and only with random weights those given here.

    0 and null stand for the checkpoint's; another value that is not the checkpoint's is refused. Random weights are a
    Qwen3-MoE's, of the sizes in conf/model/tiny.yaml where nothing is given.
    """

    num_layers: int = number(0, "decoder layers", at_least=0)
    hidden_size: int = number(0, "width of the residual stream", at_least=0)
    num_attention_heads: int = number(0, "query heads", at_least=0)
    num_query_groups: int = number(0, "key/value heads", at_least=0)
    head_dim: int = number(0, "of one head", at_least=0)
    num_experts: int = number(0, "of each MoE layer", at_least=0)
    moe_topk: int = number(0, "experts a token uses", at_least=0)
    moe_ffn_hidden_size: int = number(0, "of one expert", at_least=0)
    vocab_size: int = number(0, "rows of the embedding; the tokenizer's ids lie below it", at_least=0)
    max_position_embeddings: int = number(0, "longest sequence, in tokens", at_least=0)
    rope_theta: float | None = number(None, "base of the rotary positions", above=0)
    norm_epsilon: float | None = number(None, "of the norms", at_least=0)
    init_std: float = number(0.02, "standard deviation of random weights", at_least=0)


@dataclass
class Parallel:
    """Parallel layout of the training ranks, as Megatron-Core names it."""

    tensor: int = number(1, "tensor-parallel ranks", at_least=1)
    expert: int = number(1, "ranks among which a layer's experts are divided", at_least=1)
    pipeline: int = number(1, "stages of layers", at_least=1)
    stage_layers: list[int] = number(
        list,
        "decoder layers of each stage, in order; with virtual_pipeline of each chunk, in the model's order. Empty: "
        "alike",
        at_least=0,
    )
    virtual_pipeline: int = number(
        1, "chunks of layers a pipeline stage holds, run interleaved (Megatron's VPP)", at_least=1
    )
    sequence: bool = setting(False, "sequence parallelism; Megatron-Core needs it for MoE training when tensor > 1")
    dispatcher: str = setting(
        "alltoall", "or allgather: how tokens travel to the ranks of their experts", choices=("alltoall", "allgather")
    )
    recompute: str = setting(
        "none",
        "of activations in the backward: none, selective (attention), moe (MoE layers) or full",
        choices=("none", "selective", "moe", "full"),
    )


@dataclass
class Cluster:
    """The machines of a training run: `plan` computes for them, and `train` refuses another number of processes."""

    processes: int = number(0, "of the training, one a GPU; 0: as many as are started", at_least=0)
    per_machine: int = number(8, "of them on one machine", at_least=1)
    gpus_per_machine: int = number(
        0, "of a machine, for `plan`; 0: as many as processes. Servers may have the others", at_least=0
    )
    memory_gb: float = number(80.0, "of one GPU, in 10⁹ bytes", above=0, finite=False)
