"""Settings of rollouts and of Routing Replay (docs/rollout.md, docs/replay.md)."""

from dataclasses import dataclass, field


@dataclass
class Rollout:
    """Sampling from SGLang servers, and how weights reach them."""

    temperature: float = 1.0
    max_new_tokens: int = 64
    concurrency: int = 64  # requests in flight from one client
    request_timeout_s: float = 120.0
    start_timeout_s: float = 600.0  # from launch to the first healthy answer
    retries: int = 2  # of one request, after a failure that may pass
    partial_tokens: int = 0  # new tokens a sample gets in a round; the others in later rounds; 0: whole rollouts
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
    router: str = ""  # URL of an SGLang router in front of `urls`: samples are requested from it
    host: str = "127.0.0.1"  # where servers listen; a run on several machines needs 0.0.0.0, or an address
    api_key_file: str = ""  # holds the key that servers require; needed where other machines reach them
    port: int = 0  # of the first server, the others' follow; 0 takes free ones
    dtype: str = "float32"  # the servers' weights: float32 or bfloat16
    quantize: str = ""  # fp8 or int8: servers get weights with that format's values, in `dtype`; empty: as trained
    sync: str = "disk"  # how weights travel: disk (a checkpoint they read), tensors (over HTTP) or group (gloo, NCCL)
    sync_bucket_mib: int = 256  # tensors, group: sent together
    sync_host: str = "127.0.0.1"  # group: an address of rank 0's machine that the servers reach
    sync_tolerance: float = 0.01  # nats: how far the probe's mean log-probability may be off after a weight sync
    max_total_tokens: int = 16384  # tokens in a server's key/value cache
    max_running_requests: int = 64


@dataclass
class Replay:
    """Routing Replay: whose expert choices training forces (docs/replay.md)."""

    mode: str = "r3"  # none, r2 (the training engine's old-policy routes) or r3 (the inference engine's routes)
    missing: str = "strict"  # r3 and a token without a route: strict stops, mask drops it from the loss, live routes it
    measure_live: bool = True  # one more forward a step, without replay: the discrepancy that replay removes
    store: str = ""  # a directory that keeps the routes each step replays (see inspect); empty keeps none
    store_encoding: str = "compact"  # sets within 1.05 of the fewest bits, or plain: one or two bytes an expert
