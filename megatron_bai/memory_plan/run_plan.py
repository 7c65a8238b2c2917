"""Compute what a training run will do and need of each GPU, from its settings alone."""

import math

from megatron_bai import config
from megatron_bai.config import Config
from megatron_bai.distributed.backend import resolve_kind
from megatron_bai.errors import UserError
from megatron_bai.memory_plan import rank_memory
from megatron_bai.model import build
from megatron_bai.rl import objectives
from megatron_bai.rl.batches import micro_batches
from megatron_bai.rl.validate_settings import validate_settings
from megatron_bai.rollout.client import max_request_tokens
from megatron_bai.rollout.servers.placement import Machine, describe_placements, place_servers

GB = 1e9
# Of each process on a GPU: CUDA's context, NCCL's buffers, workspaces, what the allocator cannot use. An allowance.
RUNTIME_BYTES = 2 * GB


def require_rollouts(settings: Config) -> None:
    """Refuse supervised training, which is not planned."""
    if not objectives.check(settings.objective).rollouts:
        raise UserError("plan is for reinforcement learning: choose another objective than sft")


def validate_plan(settings: Config) -> int:
    """Refuse what `train` would refuse, and what it could find only later.

    Returns:
        The number of processes.

    Raises:
        UserError: names the settings.
    """
    require_rollouts(settings)
    validate_settings(settings)
    parallel, cluster = settings.parallel, settings.cluster
    fewest = math.lcm(parallel.tensor, parallel.expert) * parallel.pipeline
    processes = cluster.processes or fewest
    build.validate_layout(settings.model, parallel, processes)
    micro_batches.validate_batches(settings, processes // (parallel.tensor * parallel.pipeline))
    row, longest = settings.trainer.tokens_per_micro_batch, max_sample_tokens(settings)
    if 0 < row < longest:
        raise UserError(
            f"a sample may have {longest} tokens, more than trainer.tokens_per_micro_batch ({row}): raise it, or lower "
            "rollout.max_new_tokens or data.max_prompt_tokens"
        )
    if not settings.rollout.urls:
        place_servers(settings.rollout, _list_machines(settings, processes))
        _validate_memory_fraction(settings)
    return processes


def _list_machines(settings: Config, processes: int) -> list[Machine]:
    """List the machines that the processes are started on."""
    cluster = settings.cluster
    if 0 < cluster.gpus_per_machine < cluster.per_machine:
        raise UserError(
            f"cluster.gpus_per_machine ({cluster.gpus_per_machine}) is less than cluster.per_machine "
            f"({cluster.per_machine}), of which each has a GPU"
        )
    on_gpus = resolve_kind(settings.backend) == "cuda"
    sizes = [min(cluster.per_machine, processes - first) for first in range(0, processes, cluster.per_machine)]
    return [Machine(size, (cluster.gpus_per_machine or size) if on_gpus else None) for size in sizes]


def _validate_memory_fraction(settings: Config) -> None:
    """Refuse a share of a GPU's memory that a server does not fit into: SGLang would make its cache smaller."""
    rollout, memory_gb = settings.rollout, settings.cluster.memory_gb
    if rollout.mem_fraction_static is None:
        return
    sizes = rank_memory.server_bytes(settings.model, rollout.tensor, rollout.max_total_tokens, rollout.dtype)
    if (needed := sum(sizes) / GB) > rollout.mem_fraction_static * memory_gb:
        raise UserError(
            f"rollout.mem_fraction_static is {rollout.mem_fraction_static:g}: of {memory_gb:g} GB (cluster.memory_gb) "
            f"less than the {needed:.1f} GB of a server's weights and cache: raise it, or lower "
            "rollout.max_total_tokens"
        )


def max_sample_tokens(settings: Config) -> int:
    """Return the most tokens that a prompt and its response can have."""
    most = max_request_tokens(settings.rollout, settings.model.max_position_embeddings)
    return min(most, getattr(settings.data, "max_prompt_tokens", most) + settings.rollout.max_new_tokens)


def describe_batches(settings: Config, processes: int) -> dict[str, str]:
    """Describe what is trained in which layout, and what a step consists of, as text by name.

    Args:
        settings: that `validate_plan` has accepted.
        processes: number of the run's, from `validate_plan`.
    """
    parallel, trainer, rollout = settings.parallel, settings.trainer, settings.rollout
    params = rank_memory.count_params(settings.model)
    stages = parallel.pipeline
    replicas, holders = processes // (parallel.tensor * stages), processes // (parallel.expert * stages)
    prompts, group = trainer.prompts_per_step, trainer.group_size
    samples, longest = prompts * group, max_sample_tokens(settings)
    row = trainer.tokens_per_micro_batch
    slot = 5 if settings.replay.weights == "server" else 1  # bytes of an expert: its id, and a float32 weight
    routes = samples // replicas * longest * settings.model.num_layers * settings.model.moe_topk * slot / GB
    kept = f"up to {routes:.1f} GB in a replica's host memory" if settings.replay.mode != "none" else "not replayed"
    micro = f"a row of {row} tokens" if row else f"{trainer.micro_batch_size} samples of up to {longest} tokens"
    return {
        "model": f"{params.total:,} parameters, {params.active(settings.model):,.0f} of them a token's",
        "processes": f"{processes}: pipeline {stages} × tensor {parallel.tensor} × {replicas} replicas; of experts, "
        f"{parallel.expert} parts × {holders}",
        "step": f"{prompts} prompts × {group} = {samples} responses, {prompts // replicas} prompts to a replica",
        "updates": f"{trainer.mini_batches} a step, on {samples // trainer.mini_batches} responses each",
        "micro-batch": micro,
        "responses": f"up to {rollout.max_new_tokens} tokens, {rollout.concurrency * replicas} asked for at once",
        "servers": ", ".join(rollout.urls) or _describe_servers(settings, processes),
        "routes": kept,
    }


def _describe_servers(settings: Config, processes: int) -> str:
    """Describe which GPUs of which machine each of a run's own servers has."""
    machines = _list_machines(settings, processes)
    return describe_placements(place_servers(settings.rollout, machines), settings.rollout, machines)


def gpu_bytes(settings: Config, processes: int) -> dict[str, float]:
    """Compute the bytes of the fullest GPU, by what holds them.

    That is one of a machine with servers of the run's own, if they are on GPUs of the training; if they have others, a
    server's where that holds more.

    Args:
        settings: that `validate_plan` has accepted.
        processes: number of the run's, from `validate_plan`.

    Returns:
        Bytes by a description of their holder, such as `actor: weights`, on the pipeline stage that needs most.
    """
    parallel = settings.parallel
    stages = [_rank_bytes(settings, processes, stage) for stage in range(parallel.pipeline)]
    fullest = max(stages, key=lambda held: sum(held.values()))
    if settings.rollout.urls:
        return fullest
    server = _server_bytes(settings.model, settings.rollout)
    machines = _list_machines(settings, processes)
    on_gpus = machines[0].num_gpus is not None
    if on_gpus and not any(each.with_trainer for each in place_servers(settings.rollout, machines)):
        return max(fullest, server, key=lambda held: sum(held.values()))
    return fullest | server


def _rank_bytes(settings: Config, processes: int, stage: int) -> dict[str, float]:
    """Compute the trainer's bytes on a GPU of a pipeline stage."""
    model, parallel, trainer, dtype = settings.model, settings.parallel, settings.trainer, settings.backend.dtype
    held: dict[str, float] = {}
    for name in ("actor", "critic") if isinstance(settings.objective, config.Ppo) else ("actor",):
        params = rank_memory.count_params(model, parallel, stage, critic=name == "critic")
        state = rank_memory.state_bytes(params, parallel, processes, dtype)
        held |= {f"{name}: {part}": size for part, size in vars(state).items()}
    if isinstance(settings.objective, config.Policy) and settings.objective.kl_penalty:
        params = rank_memory.count_params(model, parallel, stage)
        held["reference: weights"] = params.total * rank_memory.DTYPE_BYTES[dtype]
    tokens = trainer.tokens_per_micro_batch or trainer.micro_batch_size * max_sample_tokens(settings)
    count = _count_micro_batches(settings, processes)
    held["activations (estimate)"] = rank_memory.activation_bytes(model, parallel, stage, tokens, count, dtype)
    if stage == parallel.pipeline - 1:
        held["logits"] = rank_memory.logits_bytes(model, parallel, tokens, dtype)
    return held | {"trainer's runtime (allowance)": RUNTIME_BYTES}


def _count_micro_batches(settings: Config, processes: int) -> int:
    """Count the micro-batches of an update on a rank, at least as many as its longest samples need."""
    parallel, trainer = settings.parallel, settings.trainer
    replicas = processes // (parallel.tensor * parallel.pipeline)
    samples = trainer.prompts_per_step // trainer.mini_batches // replicas * trainer.group_size
    row = trainer.tokens_per_micro_batch
    return samples if row else samples // trainer.micro_batch_size


def _server_bytes(model: config.Model, rollout: config.Rollout) -> dict[str, float]:
    """Compute a server's bytes on a GPU."""
    weights, cache = rank_memory.server_bytes(model, rollout.tensor, rollout.max_total_tokens, rollout.dtype)
    return {"server: weights": weights, "server: keys and values": cache, "server's runtime (allowance)": RUNTIME_BYTES}
