"""Every setting of every verb, typed. Hydra fills these from `conf/` and the command line.

One tree serves all verbs, so that one experiment file describes a whole run: what is trained, merged, served and
updated. An unknown key is refused by Hydra; what contradicts another setting is refused by `validate`, by name.
"""

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from omegaconf import MISSING

from megatron_bai.errors import UserError
from megatron_bai.project_files import conf_dir as conf_dir


@dataclass
class Run:
    name: str = "default"
    dir: str = "runs/${run.name}"  # everything the run writes lies below it
    seed: int = 0


@dataclass
class Backend:
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
    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # chunks of layers a pipeline stage holds, run interleaved (Megatron's VPP)
    sequence: bool = False  # sequence parallelism; Megatron-Core needs it for MoE training when tensor > 1
    dispatcher: str = "alltoall"  # or allgather: how tokens travel to the ranks of their experts
    recompute: str = "none"  # of activations in the backward: none, selective (attention), moe (MoE layers) or full


@dataclass
class Cluster:
    """What a training run is meant for: `plan` counts with it, and `train` refuses another number of processes."""

    processes: int = 0  # of the training, one a GPU; 0: as many as are started
    per_machine: int = 8  # of them on one machine
    memory_gb: float = 80.0  # of one GPU, in 10⁹ bytes


@dataclass
class Data:
    """What is asked and taught: `data=NAME` chooses a source with its own settings (docs/data.md)."""

    name: str = MISSING  # set by the choice
    eval_prompts: int = 64  # held out: never trained on


@dataclass
class Arithmetic(Data):
    """The generated arithmetic task (sums of several numbers), its styles of text and the tokenizer trained on them."""

    name: str = "arithmetic"
    style: str = "reasoning"  # of supervised text: pretrained (mixed), instruct (short), reasoning, checked (longest)
    min_terms: int = 3  # numbers in one problem
    max_terms: int = 5
    max_number: int = 9  # numbers are 1 … max_number


@dataclass
class Dataset(Data):
    """Rows on local disk: a .jsonl or .parquet file, or a directory that `datasets.save_to_disk` wrote."""

    name: str = "dataset"
    train: str = ""  # the rows trained on
    eval: str = ""  # the rows evaluated on, which are taken out of train; empty holds some of train out
    hold_out: float = 0.05  # the share of prompts that a hash holds out where data.eval is empty
    prompt: str = "prompt"  # column: a text, which becomes a user's message, or a list of chat messages
    answer: str = "answer"  # column: what the reward compares with; empty where it needs none
    response: str = "response"  # column of objective=sft: what is learned
    system: str = ""  # the system message of prompts that have none
    chat_template: bool = True  # the tokenizer's; false takes the prompts, which must be texts, as they are
    template_options: dict[str, Any] = field(default_factory=dict)  # +data.template_options.enable_thinking=false
    max_prompt_tokens: int = 1024  # rows whose prompt is longer are left out


@dataclass
class Reward:
    """What a response earns: `reward=NAME` chooses one with its own settings (docs/data.md)."""

    name: str = MISSING  # set by the choice


@dataclass
class Exact(Reward):
    """1 for the exact answer, as the data's own check sees it."""

    name: str = "exact"


@dataclass
class PerSample(Reward):
    """Of every reward that is a Python function of one sample, which runs in processes of its own."""

    timeout_s: float = 10.0  # of one sample; a process that takes longer is killed, and the sample has no reward
    workers: int = 2  # processes of each model replica


@dataclass
class MathVerify(PerSample):
    """1 where math-verify finds the answer, LaTeX or plain, equal to the row's."""

    name: str = "math_verify"


@dataclass
class Function(PerSample):
    """A function of yours."""

    name: str = "function"
    function: str = ""  # module:function taking (prompt, response, answer, extra) and returning a number


@dataclass
class RewardModel(Reward):
    """The score of a reward model that SGLang serves (--is-embedding), asked at /classify."""

    name: str = "model"
    url: str = ""  # http://127.0.0.1:30000
    remote: bool = False  # true allows another host than this one: prompts and responses leave the machine
    send: str = "text"  # or ids or chat: prompt and response as text, as the actor's tokens, or in the model's template
    tokenizer: str = ""  # chat: a directory with the reward model's tokenizer
    label: int | None = None  # which of the model's outputs is the reward; unset where it has one
    check: float = 0.0  # added to the score of a response that the data's own check accepts
    concurrency: int = 32  # requests in flight from each model replica
    request_timeout_s: float = 60.0
    retries: int = 3  # of one request, with growing pauses, after a failure that may pass


@dataclass
class Init:
    """Where the first weights come from: `init=NAME` chooses (docs/training.md)."""

    name: str = MISSING  # set by the choice


@dataclass
class RandomInit(Init):
    """Drawn anew, by `run.seed`, with a tokenizer trained on the task's text."""

    name: str = "random"


@dataclass
class CheckpointInit(Init):
    """A complete checkpoint, with its tokenizer."""

    name: str = "checkpoint"
    checkpoint: str = ""  # what `train`, `merge` or `convert` wrote


@dataclass
class MergeInit(Init):
    """The merge that `merge.*` describes: done at the start unless `merge.output` holds it, then read from there."""

    name: str = "merge"


@dataclass
class Merge:
    """Merging checkpoints, by Balanced Actor Initialization unless `method` says otherwise.

    bai              α · pretrained + (1 − α) · Σ wᵢ·Mᵢ                          (arXiv 2509.00309)
    linear           Σ wᵢ·Mᵢ                                                     (arXiv 2203.05482)
    slerp            from the first of two members to the second, on an arc
    task_arithmetic  pretrained + λ · Σ wᵢ·τᵢ with τᵢ = Mᵢ − pretrained          (arXiv 2212.04089)
    ties             … τᵢ trimmed, averaged where they agree with a common sign  (arXiv 2306.01708)
    dare             … τᵢ with a random share dropped and the rest rescaled      (arXiv 2311.03099)

    A setting that the method does not use must be left out.
    """

    method: str = "bai"  # or linear, task_arithmetic, slerp, ties, dare
    pretrained: str = ""  # gives the layout, too; in linear and slerp that alone: empty takes the first member's
    members: list[str] = field(default_factory=list)  # Mᵢ; slerp: two
    weights: list[float] = field(default_factory=list)  # wᵢ; bai, linear: summing to 1; task vectors: 1 each unless given
    normalize: bool = False  # divide the weights by their sum; not for ties, which averages, and slerp
    alpha: float | None = None  # bai: weight of the pretrained checkpoint, 0.5 unless given
    t: float | None = None  # slerp: from 0, the first member, to 1, the second
    scale: float | None = None  # task vectors: λ, 1 unless given
    density: float | None = None  # ties: the share of each parameter's elements that is kept, 0.2 unless given
    drop_rate: float | None = None  # dare: the share that is dropped
    seed: int | None = None  # dare: of what is dropped, 0 unless given
    sweep: list[float] = field(default_factory=list)  # of alpha, t or scale: one output each, the inputs read once
    alpha_for: dict[str, float] = field(default_factory=dict)  # by group (see inspect) or regex; the first that fits
    weights_for: dict[str, list[float]] = field(default_factory=dict)  # likewise
    t_for: dict[str, float] = field(default_factory=dict)  # likewise
    output: str = ""  # with a sweep, the directory of the outputs: alpha-0.1 and so on
    dtype: str = ""  # of the output: bfloat16, float16 or float32; empty: the pretrained checkpoint's
    vocab_size: int = 0  # rows of the embedding that mean a token, the others are padding; 0: as the checkpoints say
    chunk_mib: int = 0  # cut torch_dist tensors anew, into chunks of at most this; 0: the pretrained checkpoint's chunks
    file_mib: int = 0  # fill output files to this; 0: the pretrained's files (safetensors) or 256 (torch_dist)
    memory_mib: int = 512  # of a rank's buffers, whatever the size of the model
    threads: int = 0  # of a rank; 0 shares the cores among the machine's ranks, up to 8 each and as the memory allows
    verify: str = "sample"  # none, sample or all: how much of the output is compared with the formula before it counts
    dry_run: bool = False  # print the plan and stop


@dataclass
class Rollout:
    temperature: float = 1.0
    max_new_tokens: int = 64
    concurrency: int = 64  # requests in flight from one client
    request_timeout_s: float = 120.0
    start_timeout_s: float = 600.0  # from launch to the first healthy answer
    retries: int = 2  # of one request, after a failure that may pass
    partial_tokens: int = 0  # new tokens a sample gets in one go; the rest in later steps; 0: whole rollouts
    prompts_in_progress: int = 0  # partial: which a step works on, to train prompts_per_step of them; 0: twice as many
    overlap: bool = False  # sample the next step's groups while this one trains, one version behind
    max_staleness: int | None = None  # tokens sampled more versions ago count nowhere in the loss; unset: all count
    measure_sampled: bool = True  # overlap: a copy of the sampling weights and a forward more; tells discrepancy apart
    max_failed_fraction: float = 0.1  # of a step's samples, after all retries: they are left out; more stop the run
    incomplete_groups: str = "keep"  # of groups with a failed sample, count the others (keep) or none (drop)
    restarts: int = 2  # within a step, of servers that ended, hang or lost their weights; one more stops the run
    deterministic: bool = True  # one seed a sample, so a run can be repeated; costs speed on a GPU
    servers: int = 1  # started by rank 0 on its machine, each with all weights
    tensor: int = 1  # tensor-parallel ranks of a server
    urls: list[str] = field(default_factory=list)  # servers that run already, instead of those
    router: str = ""  # URL of an SGLang router in front of `urls`: samples are asked of it
    host: str = "127.0.0.1"  # where servers listen; a run on several machines needs 0.0.0.0, or an address
    api_key_file: str = ""  # holds the key that servers ask for; needed where other machines reach them
    port: int = 0  # of the first server, the others' follow; 0 takes free ones
    dtype: str = "float32"  # the servers' weights: float32 or bfloat16
    quantize: str = ""  # fp8 or int8: servers get weights with that format's values, still in `dtype`; empty: as trained
    sync: str = "disk"  # how weights travel: disk (a checkpoint they read), tensors (over HTTP) or group (gloo, NCCL)
    sync_bucket_mib: int = 256  # tensors, group: sent together
    sync_host: str = "127.0.0.1"  # group: an address of rank 0's machine that the servers reach
    sync_tolerance: float = 0.01  # nats: how far the probe's mean log-probability may be off after a weight sync
    max_total_tokens: int = 16384  # tokens in a server's key/value cache
    max_running_requests: int = 64


@dataclass
class Replay:
    mode: str = "r3"  # none, r2 (the training engine's old-policy routes) or r3 (the inference engine's routes)
    missing: str = "strict"  # r3 and a token without a route: strict stops, mask drops it from the loss, live routes it
    measure_live: bool = True  # one more forward a step, without replay: the discrepancy that replay removes
    store: str = ""  # a directory that keeps the routes each step replays (see inspect); empty keeps none
    store_encoding: str = "compact"  # sets within 1.05 of the fewest bits, or plain: one or two bytes an expert


@dataclass
class Objective:
    """What training maximises: `objective=NAME` chooses one with its own settings (docs/objectives.md)."""

    name: str = MISSING  # set by the choice


@dataclass
class Sft(Objective):
    """Cross-entropy of given text."""

    name: str = "sft"


@dataclass
class Policy(Objective):
    """Of every objective that learns from rollouts."""

    advantage: str = "normalised"  # R − group mean: centred; over the group's deviation: normalised; or leave_one_out
    entropy_bonus: float = 0.0  # weight of the policy's entropy, in the loss of every token
    kl_penalty: float = 0.0  # weight of the KL divergence from the run's initial weights, likewise
    kl_estimator: str = "k3"  # k1, k2 or k3
    drop_uniform_groups: bool = False  # groups whose rewards are all equal count nowhere
    refill_rounds: int = 0  # how often a step asks new prompts in place of dropped groups, until none lack (DAPO)
    mask_overlong: bool = False  # responses cut off at the token limit count nowhere but in their group's mean reward


@dataclass
class Minirl(Policy):
    """MiniRL (arXiv 2512.01374, eq. 7) and its ablations."""

    name: str = "minirl"
    advantage: str = "centred"
    clip_low: float = 0.2  # M_t drops a token with A < 0 once its ratio is under 1 − clip_low
    clip_high: float = 0.27  # … with A > 0 once it is over 1 + clip_high
    is_max: float = 5.0  # the token weight π_θ/μ_old is truncated here; inf: never
    clip: bool = True  # false: M_t = 1
    train_infer_is: bool = True  # false: the token weight is π_θ/π_old
    length_norm: bool = False  # true: 1/|y|


@dataclass
class Sequence(Policy):
    """The sequence-level objective that MiniRL approximates (arXiv 2512.01374)."""

    name: str = "sequence"
    advantage: str = "centred"
    is_max: float = float("inf")  # the response's weight π_θ(y)/μ_old(y) is truncated here


@dataclass
class Corrected(Policy):
    """Of every objective with a ratio to π_old that may be corrected for training–inference discrepancy (TIS)."""

    correction: str = "none"  # weight π_old/μ_old: none, or token_ or sequence_ followed by truncate or mask
    correction_max: float = 2.0  # C: a weight above it becomes C (truncate) or 0 (mask)


@dataclass
class Grpo(Corrected):
    """GRPO (arXiv 2402.03300); a clip_high above clip_low is clip-higher."""

    name: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2


@dataclass
class Dapo(Corrected):
    """GRPO's loss as DAPO averages it, over tokens (arXiv 2503.14476)."""

    name: str = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    token_mean: str = "batch"  # over the mini-batch's tokens, or prompt: over each prompt's, then over prompts


@dataclass
class Cispo(Corrected):
    """CISPO (arXiv 2506.13585): the ratio is clipped, no token is dropped."""

    name: str = "cispo"
    clip_low: float = 1.0  # 1: no lower limit, as in the paper
    clip_high: float = 0.27  # the paper gives no value; this is MiniRL's
    token_mean: str = "batch"  # or prompt


@dataclass
class Gspo(Corrected):
    """GSPO (arXiv 2507.18071): the ratio is the response's, per token."""

    name: str = "gspo"
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass
class Ppo(Corrected):
    """PPO with a critic (arXiv 1707.06347), as BAI's paper trains (arXiv 2509.00309)."""

    name: str = "ppo"
    advantage: str = "gae"  # of each token, from the critic's values (arXiv 1506.02438); nothing else
    clip_low: float = 0.2
    clip_high: float = 0.2
    gamma: float = 1.0  # what a reward one token later is worth
    lam: float = 0.95  # λ of GAE: 1 trusts the rewards alone, 0 the critic
    whiten: bool = False  # advantages less their mean and over their deviation, of all tokens of the step
    value_clip: float = 0.2  # a value gains nothing by moving further than this in a step; inf: no limit
    critic_learning_rate: float | None = None  # trainer.learning_rate unless given, as in BAI's paper
    critic_warmup: int = 0  # steps at the start that update the critic alone
    critic_checkpoint: str = ""  # a critic to start from, as critic_save wrote it; empty: the actor's weights, values 0
    critic_save: str = ""  # where the final critic goes; empty keeps none


@dataclass
class Supervised:
    """Batches of `objective=sft`."""

    rows: int = 32  # packed rows per step, over all data-parallel ranks
    length: int = 64  # tokens in a row


@dataclass
class Trainer:
    steps: int = 10  # global steps
    prompts_per_step: int = 16
    group_size: int = 8  # samples per prompt
    mini_batches: int = 2  # N: updates per global step
    micro_batch_size: int = 16  # samples per forward pass and data-parallel rank, padded to the longest of the step
    tokens_per_micro_batch: int = 0  # or, in place of samples, tokens: as many samples side by side as fit; 0: samples
    learning_rate: float = 1e-3
    warmup_updates: int = 0  # the learning rate rises linearly over these
    decay: str = "constant"  # then it stays, or falls until the last update: linear, cosine, inverse-square-root
    min_learning_rate: float = 0.0  # to this
    weight_decay: float = 0.0  # of all but norms and biases
    adam_beta2: float = 0.999
    clip_grad: float = 1.0
    eval_every: int = 0  # steps between evaluations on held-out prompts; 0 never evaluates
    eval_samples: int = 1  # n of avg@n: samples to each held-out prompt
    eval_temperature: float | None = None  # of these samples; unset: rollout.temperature
    save: str = ""  # where the final checkpoint goes; empty keeps none
    save_every: int = 0  # steps between checkpoints that the same command goes on from, in run.dir; 0 writes none
    save_async: bool = False  # write them in the background, while the next step runs
    keep: int = 2  # of them, the last ones
    grace_s: float = 20.0  # after SIGTERM, to end the step in work and save; then, or with 0 at once, the run stops


@dataclass
class Monitor:
    """What is watched, who is told, and what an alarm does (docs/monitoring.md)."""

    bucket: int = 100  # tokens: width of a response-length bucket
    smooth: int = 5  # steps whose median is a metric's level
    horizon: int = 100  # steps that a baseline looks back
    deviations: float = 5.0  # standard errors that a change must have for an alarm
    length_fall: float = 0.3  # of the mean response length within the horizon, as a share: length_collapse
    discrepancy_rise: float = 2.0  # of kl_k3 or F(2), as a factor: discrepancy_divergence
    entropy_fall: float = 0.5  # of the policy's entropy, as a share: entropy_collapse
    router_rise: float = 2.0  # of route_mismatch, as a factor: router_drift
    experts_fall: float = 0.3  # of the effective number of experts, as a share: router_drift
    reward_drop: float = 0.1  # in a length bucket, in units of reward: reward_hockey_stick
    reward_recovery: float = 0.8  # the share of a drop that must be made up
    reward_smooth: int = 9  # pools whose median is a bucket's level
    reward_responses: int = 64  # responses that make a pool
    actions: dict[str, str] = field(default_factory=dict)  # by detector: warn (unless said), checkpoint or stop
    tensorboard: bool = True  # event files in run.dir/tensorboard
    wandb: str = ""  # a W&B project; the key is W&B's own affair (wandb login); empty: not used
    wandb_mode: str = "online"  # or offline: files in run.dir/wandb, for wandb sync
    mlflow: str = ""  # an MLflow experiment; empty: not used
    mlflow_uri: str = ""  # of its server, without credentials; empty: run.dir/mlflow.db


@dataclass
class Serve:
    checkpoint: str = ""  # a Hugging Face or Megatron checkpoint; empty serves merge.output


@dataclass
class Convert:
    source: str = ""
    target: str = ""
    to: str = "hf"  # hf or megatron


@dataclass
class Inspect:
    path: str = ""  # a checkpoint, or a directory that replay.store named
    other: str = ""  # a second one of the same kind to compare with
    verify: bool = True  # read every byte against the checksums; false trusts sizes, which is quick


@dataclass
class Report:
    runs: list[str] = field(default_factory=list)  # run directories; empty reports run.dir
    output: str = ""  # empty writes report.html into the first run


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    backend: Backend = field(default_factory=Backend)
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    cluster: Cluster = field(default_factory=Cluster)
    data: Data = field(default_factory=Arithmetic)
    reward: Reward = field(default_factory=Exact)
    init: Init = field(default_factory=RandomInit)
    merge: Merge = field(default_factory=Merge)
    rollout: Rollout = field(default_factory=Rollout)
    replay: Replay = field(default_factory=Replay)
    objective: Objective = field(default_factory=Minirl)
    supervised: Supervised = field(default_factory=Supervised)
    trainer: Trainer = field(default_factory=Trainer)
    monitor: Monitor = field(default_factory=Monitor)
    serve: Serve = field(default_factory=Serve)
    convert: Convert = field(default_factory=Convert)
    inspect: Inspect = field(default_factory=Inspect)
    report: Report = field(default_factory=Report)


def register() -> None:
    """Make the tree known to Hydra under the name `conf/config.yaml` starts from, and load what packages add to it."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config(data=MISSING, reward=MISSING, init=MISSING, objective=MISSING))
    choices = {
        "data": (Arithmetic, Dataset),
        "init": (RandomInit, CheckpointInit, MergeInit),
        "reward": (Exact, MathVerify, Function, RewardModel),
        "objective": (Sft, Minirl, Sequence, Grpo, Dapo, Cispo, Gspo, Ppo),
    }
    for group, kinds in choices.items():
        for kind in kinds:
            store.store(group=f"{group}/settings", name=kind.name, node=kind)
    for what in ("objective", "reward"):
        for point in entry_points(group=f"megatron_bai.{what}s"):
            try:
                point.load()
            except Exception as error:  # whatever it is, it is the plugin's
                raise UserError(f"the {what} plugin {point.name} = {point.value} cannot be loaded: {error!r}") from error


def initial_checkpoint(settings: Config) -> str:
    """The directory that the first weights of a run are read from; empty for random ones."""
    init = settings.init
    return settings.merge.output if isinstance(init, MergeInit) else getattr(init, "checkpoint", "")
