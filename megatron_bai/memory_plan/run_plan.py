"""Compute what a training run will do and need of each GPU, from its settings alone."""

import math

from megatron_bai import config
from megatron_bai.config import Config
from megatron_bai.errors import UserError
from megatron_bai.memory_plan import rank_memory
from megatron_bai.model import build
from megatron_bai.rl import objectives, session
from megatron_bai.rl.batches import micro_batches
from megatron_bai.rollout.client import max_request_tokens

GB = 1e9
# Of each process on a GPU: CUDA's context, NCCL's buffers, workspaces, what the allocator cannot use. An allowance.
RUNTIME = 2 * GB


def check(settings: Config) -> int:
    """Refuse what `train` would refuse, and what it could find only later. Returns the number of processes.

    Raises:
        UserError: names the settings.
    """
    if not objectives.check(settings.objective).rollouts:
        raise UserError("plan is for reinforcement learning: choose another objective than sft")
    session.validate_settings(settings)
    parallel, cluster, rollout = settings.parallel, settings.cluster, settings.rollout
    fewest = math.lcm(parallel.tensor, parallel.expert) * parallel.pipeline
    processes = cluster.processes or fewest
    build.validate_layout(settings.model, parallel, processes)
    micro_batches.validate_batches(settings, processes // (parallel.tensor * parallel.pipeline))
    row, longest = settings.trainer.tokens_per_micro_batch, longest_sample(settings)
    if 0 < row < longest:
        raise UserError(
            f"a sample may have {longest} tokens, more than trainer.tokens_per_micro_batch ({row}): raise it, or lower "
            "rollout.max_new_tokens or data.max_prompt_tokens"
        )
    first = min(cluster.per_machine, processes)
    if not rollout.urls and rollout.tensor > first:
        raise UserError(
            f"rollout.tensor ({rollout.tensor}) is more than the GPUs of the first machine ({first}), where a run's "
            "own servers are"
        )
    if not rollout.urls and rollout.servers > 1 and settings.backend.kind == "cuda":
        raise UserError(
            f"rollout.servers is {rollout.servers}: on GPUs a run's own servers would all begin at the first one; "
            "start them yourself (rollout.urls)"
        )
    if not rollout.urls and rollout.sync == "group" and settings.backend.kind == "cuda":
        raise UserError(
            "rollout.sync=group needs servers on GPUs of their own (rollout.urls): NCCL takes no two ranks on one GPU"
        )
    return processes


def longest_sample(settings: Config) -> int:
    """Return the most tokens that a prompt and its response have."""
    most = max_request_tokens(settings.rollout, settings.model.max_position_embeddings)
    return min(most, getattr(settings.data, "max_prompt_tokens", most) + settings.rollout.max_new_tokens)


def batches(settings: Config, processes: int) -> dict[str, str]:
    """Describe what is trained in which layout, and what a step consists of, as text by name."""
    parallel, trainer, rollout = settings.parallel, settings.trainer, settings.rollout
    whole = rank_memory.parameters(settings.model)
    stages = parallel.pipeline
    replicas, holders = processes // (parallel.tensor * stages), processes // (parallel.expert * stages)
    prompts, group = trainer.prompts_per_step, trainer.group_size
    samples, longest = prompts * group, longest_sample(settings)
    row = trainer.tokens_per_micro_batch
    routes = samples // replicas * longest * settings.model.num_layers * settings.model.moe_topk / GB
    kept = f"up to {routes:.1f} GB in a replica's host memory" if settings.replay.mode != "none" else "not replayed"
    micro = f"a row of {row} tokens" if row else f"{trainer.micro_batch_size} samples of up to {longest} tokens"
    return {
        "model": f"{whole.total:,} parameters, {whole.active(settings.model):,.0f} of them a token's",
        "processes": f"{processes}: pipeline {stages} × tensor {parallel.tensor} × {replicas} replicas; of experts, "
        f"{parallel.expert} parts × {holders}",
        "step": f"{prompts} prompts × {group} = {samples} responses, {prompts // replicas} prompts to a replica",
        "updates": f"{trainer.mini_batches} a step, on {samples // trainer.mini_batches} responses each",
        "micro-batch": micro,
        "responses": f"up to {rollout.max_new_tokens} tokens, {rollout.concurrency * replicas} asked for at once",
        "servers": ", ".join(rollout.urls) or f"{rollout.servers} on {rollout.tensor} GPUs each, beside the trainer",
        "routes": kept,
    }


def gpu_memory(settings: Config, processes: int) -> dict[str, float]:
    """Compute the bytes of the fullest GPU, by what holds them. On the first machine that includes the servers started there."""
    parallel = settings.parallel
    stages = [_of_rank(settings, processes, stage) for stage in range(parallel.pipeline)]
    fullest = max(stages, key=lambda found: sum(found.values()))
    return fullest | ({} if settings.rollout.urls else _of_server(settings.model, settings.rollout))


def _of_rank(settings: Config, processes: int, stage: int) -> dict[str, float]:
    """Compute the trainer's bytes on a GPU of a pipeline stage."""
    model, parallel, trainer, dtype = settings.model, settings.parallel, settings.trainer, settings.backend.dtype
    found: dict[str, float] = {}
    for name in ("actor", "critic") if isinstance(settings.objective, config.Ppo) else ("actor",):
        own = rank_memory.parameters(model, parallel, stage, critic=name == "critic")
        found |= {
            f"{name}: {part}": size for part, size in vars(rank_memory.state(own, parallel, processes, dtype)).items()
        }
    if isinstance(settings.objective, config.Policy) and settings.objective.kl_penalty:
        found["reference: weights"] = rank_memory.parameters(model, parallel, stage).total * rank_memory.BYTES[dtype]
    tokens = trainer.tokens_per_micro_batch or trainer.micro_batch_size * longest_sample(settings)
    micros = _micro_batches(settings, processes)
    found["activations (estimate)"] = rank_memory.activations(model, parallel, stage, tokens, micros, dtype)
    if stage == parallel.pipeline - 1:
        found["logits"] = rank_memory.logits(model, parallel, tokens, dtype)
    return found | {"trainer's runtime (allowance)": RUNTIME}


def _micro_batches(settings: Config, processes: int) -> int:
    """Count the micro-batches of an update on a rank, at least as many as its longest samples need."""
    parallel, trainer = settings.parallel, settings.trainer
    replicas = processes // (parallel.tensor * parallel.pipeline)
    samples = trainer.prompts_per_step // trainer.mini_batches // replicas * trainer.group_size
    row = trainer.tokens_per_micro_batch
    return samples if row else samples // trainer.micro_batch_size


def _of_server(model: config.Model, rollout: config.Rollout) -> dict[str, float]:
    """Compute a server's bytes on a GPU."""
    weights, cache = rank_memory.served(model, rollout.tensor, rollout.max_total_tokens, rollout.dtype)
    return {"server: weights": weights, "server: keys and values": cache, "server's runtime (allowance)": RUNTIME}
