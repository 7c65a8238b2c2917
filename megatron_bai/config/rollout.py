"""Settings of rollouts and of Routing Replay (docs/rollout.md, docs/replay.md)."""

from dataclasses import dataclass

from megatron_bai.config.limits import LARGEST_PORT, LONGEST_S, number, path, setting

LARGEST_TOP_K = 1000  # each token of a response keeps so many ids, in every rank's memory


@dataclass
class Rollout:
    """Sampling from SGLang servers, and how weights reach them."""

    temperature: float = number(1.0, "of samples", above=0)
    top_k: int = number(
        0,
        "sample from the K likeliest tokens, which training renormalises over as well; 0: from all",
        at_least=0,
        at_most=LARGEST_TOP_K,
    )
    top_p: float = number(1.0, "within top_k: from the likeliest tokens up to this probability", above=0, at_most=1)
    min_p: float = number(
        0.0, "within top_k: from tokens of at least this share of the likeliest one's probability", at_least=0, below=1
    )
    max_new_tokens: int = number(64, "longest response, in tokens", at_least=1)
    min_new_tokens: int = number(
        0, "tokens of a response before which no end token is sampled, or counted in the policy", at_least=0
    )
    stop: list[str] = setting(list, "texts that end a response, and belong to it")
    stop_token_ids: list[int] = number(
        list, "ids that end a response, beside the model's own, and belong to it", at_least=0
    )
    concurrency: int = number(64, "requests in flight from one client", at_least=1)
    request_timeout_s: float = number(120.0, "of one request", above=0, at_most=LONGEST_S)
    start_timeout_s: float = number(600.0, "from launch to the first healthy answer", above=0, at_most=LONGEST_S)
    retries: int = number(2, "of one request, after a failure that may pass", at_least=0)
    partial_tokens: int = number(
        0, "new tokens a sample gets in a round; the others in later rounds; 0: whole rollouts", at_least=0
    )
    prompts_in_progress: int = number(
        0, "partial: which a step works on, to train prompts_per_step of them; 0: twice as many", at_least=0
    )
    overlap: bool = setting(False, "sample the next step's groups while this one trains, one version behind")
    max_staleness: int | None = number(
        None, "tokens sampled more versions ago count nowhere in the loss; unset: all count", at_least=0
    )
    measure_sampled: bool = setting(
        True, "overlap: a copy of the sampling weights and a forward more; tells discrepancy apart"
    )
    max_failed_fraction: float = number(
        0.1, "of a step's samples, after all retries: they are left out; more stop the run", at_least=0, below=1
    )
    incomplete_groups: str = setting(
        "keep", "of groups with a failed sample, count the others (keep) or none (drop)", choices=("keep", "drop")
    )
    restarts: int = number(
        2, "within a step, of servers that ended, hang or lost their weights; one more stops the run", at_least=0
    )
    deterministic: bool = setting(True, "one seed a sample, so a run can be repeated; costs speed on a GPU")
    exact: bool = setting(
        False,
        "both engines compute by the same functions, in float32 on a CPU: their log-probabilities are equal bit "
        "for bit, or the run ends; slower (docs/rollout.md)",
    )
    servers: int = number(1, "started by rank 0 on its machine, each with all weights", at_least=1)
    tensor: int = number(1, "tensor-parallel ranks of a server", at_least=1)
    urls: list[str] = setting(list, "servers that run already, instead of those")
    router: str = setting("", "URL of an SGLang router in front of `urls`: samples are requested from it")
    host: str = setting("127.0.0.1", "where servers listen; a run on several machines needs 0.0.0.0, or an address")
    api_key_file: str = path("", "holds the key that servers require; needed where other machines reach them")
    port: int = number(
        0, "of the first server, the others' follow; 0 takes free ones", at_least=0, at_most=LARGEST_PORT
    )
    dtype: str = setting("float32", "the servers' weights: float32 or bfloat16", choices=("float32", "bfloat16"))
    quantize: str = setting(
        "",
        "fp8 or int8: servers get weights with that format's values, in `dtype`; empty: as trained",
        choices=("fp8", "int8", ""),
    )
    sync: str = setting(
        "disk",
        "how weights travel: disk (a checkpoint they read), tensors (over HTTP) or group (gloo, NCCL)",
        choices=("disk", "tensors", "group"),
    )
    sync_bucket_mib: int = number(256, "tensors, group: gathered and sent together", at_least=1)
    sync_senders: int = number(
        8, "group: ranks that send in turn what they gathered from those next to them, at most", at_least=1
    )
    sync_host: str = setting("127.0.0.1", "group: an address of rank 0's machine that the servers reach")
    sync_tolerance: float = number(
        0.01, "nats: how far the probe's mean log-probability may be off after a weight sync", above=0, finite=False
    )
    max_total_tokens: int = number(16384, "tokens in a server's key/value cache", at_least=1)
    max_running_requests: int = number(64, "requests that a server works on at a time; others wait", at_least=1)


@dataclass
class Replay:
    """Routing Replay: whose expert choices training forces (docs/replay.md)."""

    mode: str = setting(
        "r3",
        "none, r2 (the training engine's old-policy routes) or r3 (the inference engine's routes)",
        choices=("none", "r2", "r3"),
    )
    missing: str = setting(
        "strict",
        "r3 and a token without a route: strict stops, mask drops it from the loss, live routes it",
        choices=("strict", "mask", "live"),
    )
    measure_live: bool = setting(True, "one more forward a step, without replay: the discrepancy that replay removes")
    weights: str = setting(
        "live",
        "r3: live, or server for one more forward a step with the server's weights of the experts, too; never "
        "trained with",
        choices=("live", "server"),
    )
    store: str = path("", "a directory that keeps the routes each step replays (see inspect); empty keeps none")
    store_encoding: str = setting(
        "compact",
        "sets within 1.05 of the fewest bits, or plain: one or two bytes an expert",
        choices=("plain", "compact"),
    )
    predict: bool = setting(
        False,
        "r2, experimental: replay the routes that are predicted for a step's later updates (PR²), not the current ones",
    )
    predict_learning_rate: float = number(1e-3, "of the predictors; the trainer's warm-up and decay scale it", above=0)
    predict_every: int = number(16, "one of so many tokens trains them; fewer take more memory", at_least=1)
