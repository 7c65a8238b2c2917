"""Settings of rollouts and of Routing Replay (docs/rollout.md, docs/replay.md)."""

from dataclasses import dataclass, field

from megatron_bai.config.limits import LARGEST_PORT, LONGEST_S, choice, number, path


@dataclass
class Rollout:
    """Sampling from SGLang servers, and how weights reach them."""

    temperature: float = number(1.0, above=0)
    max_new_tokens: int = number(64, at_least=1)
    concurrency: int = number(64, at_least=1)  # requests in flight from one client
    request_timeout_s: float = number(120.0, above=0, at_most=LONGEST_S)
    start_timeout_s: float = number(600.0, above=0, at_most=LONGEST_S)  # from launch to the first healthy answer
    retries: int = number(2, at_least=0)  # of one request, after a failure that may pass
    # new tokens a sample gets in a round; the others in later rounds; 0: whole rollouts
    partial_tokens: int = number(0, at_least=0)
    # partial: which a step works on, to train prompts_per_step of them; 0: twice as many
    prompts_in_progress: int = number(0, at_least=0)
    overlap: bool = False  # sample the next step's groups while this one trains, one version behind
    # tokens sampled more versions ago count nowhere in the loss; unset: all count
    max_staleness: int | None = number(None, at_least=0)
    measure_sampled: bool = True  # overlap: a copy of the sampling weights and a forward more; tells discrepancy apart
    # of a step's samples, after all retries: they are left out; more stop the run
    max_failed_fraction: float = number(0.1, at_least=0, below=1)
    # of groups with a failed sample, count the others (keep) or none (drop)
    incomplete_groups: str = choice("keep", "keep", "drop")
    # within a step, of servers that ended, hang or lost their weights; one more stops the run
    restarts: int = number(2, at_least=0)
    deterministic: bool = True  # one seed a sample, so a run can be repeated; costs speed on a GPU
    # both engines compute by the same functions, in float32 on a CPU: their log-probabilities are equal bit for bit, or
    # the run ends; slower (docs/rollout.md)
    exact: bool = False
    servers: int = number(1, at_least=1)  # started by rank 0 on its machine, each with all weights
    tensor: int = number(1, at_least=1)  # tensor-parallel ranks of a server
    urls: list[str] = field(default_factory=list)  # servers that run already, instead of those
    router: str = ""  # URL of an SGLang router in front of `urls`: samples are requested from it
    host: str = "127.0.0.1"  # where servers listen; a run on several machines needs 0.0.0.0, or an address
    api_key_file: str = path("")  # holds the key that servers require; needed where other machines reach them
    # of the first server, the others' follow; 0 takes free ones
    port: int = number(0, at_least=0, at_most=LARGEST_PORT)
    dtype: str = choice("float32", "float32", "bfloat16")  # the servers' weights: float32 or bfloat16
    # fp8 or int8: servers get weights with that format's values, in `dtype`; empty: as trained
    quantize: str = choice("", "fp8", "int8", "")
    # how weights travel: disk (a checkpoint they read), tensors (over HTTP) or group (gloo, NCCL)
    sync: str = choice("disk", "disk", "tensors", "group")
    sync_bucket_mib: int = number(256, at_least=1)  # tensors, group: sent together
    sync_host: str = "127.0.0.1"  # group: an address of rank 0's machine that the servers reach
    # nats: how far the probe's mean log-probability may be off after a weight sync
    sync_tolerance: float = number(0.01, above=0, finite=False)
    max_total_tokens: int = number(16384, at_least=1)  # tokens in a server's key/value cache
    max_running_requests: int = number(64, at_least=1)


@dataclass
class Replay:
    """Routing Replay: whose expert choices training forces (docs/replay.md)."""

    # none, r2 (the training engine's old-policy routes) or r3 (the inference engine's routes)
    mode: str = choice("r3", "none", "r2", "r3")
    # r3 and a token without a route: strict stops, mask drops it from the loss, live routes it
    missing: str = choice("strict", "strict", "mask", "live")
    measure_live: bool = True  # one more forward a step, without replay: the discrepancy that replay removes
    # r3: live, or server for one more forward a step with the server's weights of the experts, too; never trained with
    weights: str = choice("live", "live", "server")
    store: str = path("")  # a directory that keeps the routes each step replays (see inspect); empty keeps none
    # sets within 1.05 of the fewest bits, or plain: one or two bytes an expert
    store_encoding: str = choice("compact", "plain", "compact")
    # r2, experimental: replay the routes that are predicted for a step's later updates (PR²), not the current ones
    predict: bool = False
    predict_learning_rate: float = number(1e-3, above=0)  # of the predictors; the trainer's warm-up and decay scale it
    predict_every: int = number(16, at_least=1)  # one of so many tokens trains them; fewer take more memory
