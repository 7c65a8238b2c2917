"""Validation of a training run's settings, before any work starts."""

from megatron_bai import config, environments, rewards
from megatron_bai.config.limits import validate_group, validate_ranges
from megatron_bai.data import task_factory
from megatron_bai.distributed.hosts import is_loopback, is_multi_host
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import architecture_of, require_served
from megatron_bai.model.families.architecture import Architecture
from megatron_bai.model.families.param_mapping import EXPERT_BIAS
from megatron_bai.model.freeze import validate_freeze
from megatron_bai.monitor import loggers
from megatron_bai.monitor.detectors import run_monitor
from megatron_bai.rl import init_weights, objectives
from megatron_bai.rl.objectives.objective import policy_settings
from megatron_bai.rl.policy import lr_schedule
from megatron_bai.rl.policy.exactness import validate_exact
from megatron_bai.rollout.client import max_request_tokens
from megatron_bai.rollout.sampling_params import validate_sampling
from megatron_bai.rollout.servers import fleet
from megatron_bai.routing.store.expert_set_code import MAX_EXPERTS, MAX_TOPK


def validate_settings(settings: config.Config) -> None:
    """Refuse settings that contradict each other, by name, before any work starts.

    Raises:
        UserError: names the settings.
    """
    trainer, model = settings.trainer, settings.model
    validate_ranges(settings)
    architecture = architecture_of(model)
    if trainer.expert_bias_update_rate and EXPERT_BIAS not in architecture.mappings:
        raise UserError(
            f"trainer.expert_bias_update_rate is {trainer.expert_bias_update_rate:g}, and the model's routers have no"
            " expert bias: leave it out"
        )
    validate_freeze(trainer, architecture)
    init_weights.validate_init(settings)
    lr_schedule.validate(settings)
    _validate_store(settings)
    _validate_route_weights(settings)
    run_monitor.validate(settings.monitor)
    loggers.validate(settings)
    rollouts = objectives.check(settings.objective).rollouts
    _validate_packing(settings, rollouts)
    _validate_prediction(settings, architecture, rollouts)
    task_factory.validate_data(settings.data, not rollouts, config.initial_checkpoint(settings))
    rewards.resolve_reward(settings.reward)
    _validate_environment(settings, rollouts)
    _validate_router_losses(settings.supervised, rollouts)
    if not rollouts:
        if trainer.save_every:
            raise UserError("trainer.save_every is for reinforcement learning: supervised training is not resumed")
        _validate_rows(settings.supervised.length, model.max_position_embeddings)
        return
    require_served(architecture, 1 if settings.rollout.urls else settings.rollout.tensor)
    if isinstance(settings.data, config.Generated) and not settings.data.eval_prompts:
        raise UserError(
            "data.eval_prompts is 0: it must be at least 1, since evaluations and the check of each weight sync take "
            "held-out prompts"
        )
    _validate_groups(settings)
    if isinstance(settings.objective, config.Ppo):
        _validate_critic(settings.objective, settings.trainer)
    if is_multi_host() and not settings.rollout.urls and is_loopback(settings.rollout.host):
        raise UserError(
            f"rollout.host={settings.rollout.host} is reached from the server's machine alone, and the run has others: "
            "set rollout.host=0.0.0.0 and rollout.api_key_file"
        )
    if trainer.prompts_per_step % trainer.mini_batches:
        raise UserError(
            f"trainer.prompts_per_step ({trainer.prompts_per_step}) is not a multiple of trainer.mini_batches "
            f"({trainer.mini_batches})"
        )
    fleet.validate(settings.rollout)
    validate_sampling(settings.rollout, model.vocab_size)
    validate_stale_rollouts(settings)
    validate_exact(settings, architecture)
    _validate_lengths(settings)


def require_packages(settings: config.Config) -> None:
    """Refuse a run whose settings need a package that is not installed, before any work starts.

    Raises:
        UserError: names the setting and the package.
    """
    loggers.require(settings.monitor)
    if objectives.get(settings.objective.name).rollouts:
        rewards.require(settings.reward)
        environments.require(settings.env)


def _validate_environment(settings: config.Config, rollouts: bool) -> None:
    """Refuse an environment where nothing converses, and one whose prompts are no chats."""
    environments.resolve_environment(settings.env)
    of_rewards = rewards.list_reward_settings(settings.reward)
    if not isinstance(settings.env, config.PerTurn):
        if any(isinstance(reward, config.EnvironmentReward) for reward in of_rewards.values()):
            raise UserError("reward=environment is what an environment pays, and env=none: choose one with env=NAME")
        return
    name = settings.env.name
    for label, reward in of_rewards.items():
        if not isinstance(reward, config.RewardModel) or reward.send == "chat":
            continue
        raise UserError(
            f"{label}.send is {reward.send}, and env={name} makes conversations, which a reward model reads in its own "
            f"template: set {label}.send=chat"
        )
    if not rollouts:
        raise UserError(f"env={name} answers rollouts, and objective={settings.objective.name} has none: leave it out")
    if not getattr(settings.data, "chat_template", False):
        raise UserError(
            f"env={name} continues chats, and data={settings.data.name} as set has none: choose data=tools, or "
            "data=dataset with data.chat_template=true"
        )
    if settings.env.max_turn_tokens > settings.rollout.max_new_tokens:
        raise UserError(
            f"env.max_turn_tokens ({settings.env.max_turn_tokens}) is more than rollout.max_new_tokens "
            f"({settings.rollout.max_new_tokens}), which bounds all turns and replies of a sample"
        )


def _validate_lengths(settings: config.Config) -> None:
    """Refuse responses that leave no room for a prompt, and servers that the model cannot be divided among."""
    rollout, model = settings.rollout, settings.model
    for name, limit in (
        ("model.max_position_embeddings", model.max_position_embeddings),
        ("rollout.max_total_tokens", rollout.max_total_tokens),
    ):
        if rollout.max_new_tokens >= max_request_tokens(rollout, limit) and rollout.max_total_tokens >= limit:
            raise UserError(
                f"rollout.max_new_tokens ({rollout.max_new_tokens}) leaves no room for a prompt in {name} ({limit})"
            )
    for name, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.moe_ffn_hidden_size", model.moe_ffn_hidden_size),
    ):
        if not rollout.urls and size % rollout.tensor:
            raise UserError(f"{name} ({size}) is not a multiple of rollout.tensor ({rollout.tensor})")


def _validate_rows(length: int, positions: int) -> None:
    """Refuse supervised rows beyond the model's positions, where it is another function (windows) or none."""
    if length > positions:
        raise UserError(f"supervised.length ({length}) is more than model.max_position_embeddings ({positions})")


def _validate_router_losses(supervised: config.Supervised, rollouts: bool) -> None:
    """Refuse losses of the routers that contradict each other, and all of them in reinforcement learning."""
    balancing, coefficient = supervised.load_balancing, supervised.aux_loss_coeff
    given = f"supervised.load_balancing={balancing}" if balancing != "none" else ""
    given = given or next((f"supervised.{n}" for n in ("aux_loss_coeff", "z_loss_coeff") if getattr(supervised, n)), "")
    if rollouts and given:
        raise UserError(
            f"{given} is for objective=sft: in reinforcement learning a token's experts are replayed, or those that "
            "sampled it, and a gradient that moves the routers elsewhere is no part of the objective: leave it out"
        )
    if balancing != "none" and not coefficient:
        raise UserError(f"{given} has no effect while supervised.aux_loss_coeff is 0: set it (Qwen3 has 0.001)")
    if balancing == "none" and coefficient:
        raise UserError(
            f"supervised.aux_loss_coeff is {coefficient:g} and supervised.load_balancing=none: choose global_aux_loss, "
            "aux_loss or seq_aux_loss"
        )


def _validate_groups(settings: config.Config) -> None:
    """Refuse groups that are too small for the objective."""
    objective, trainer = policy_settings(settings.objective), settings.trainer
    if trainer.group_size == 1 and not isinstance(objective, config.Ppo):
        raise UserError("trainer.group_size is 1: an advantage needs a group of at least 2 samples")
    if trainer.group_size == 1 and objective.drop_uniform_groups:
        raise UserError("objective.drop_uniform_groups with trainer.group_size=1 drops every sample")


def _validate_critic(objective: config.Ppo, trainer: config.Trainer) -> None:
    """Refuse a critic that contradicts the trainer's settings."""
    if objective.critic_warmup > trainer.steps:
        raise UserError(
            f"objective.critic_warmup ({objective.critic_warmup}) is more than trainer.steps ({trainer.steps})"
        )
    if objective.critic_save and objective.critic_save == trainer.save:
        raise UserError(f"objective.critic_save and trainer.save are both {trainer.save}: they are two models")


def _validate_packing(settings: config.Config, rollouts: bool) -> None:
    """Refuse rows that samples cannot be packed into."""
    row, parallel, longest = settings.trainer.tokens_per_micro_batch, settings.parallel, settings.rollout.max_new_tokens
    if not row:
        return
    if not rollouts:
        raise UserError(
            "trainer.tokens_per_micro_batch is for rollouts: supervised.length is the length of packed rows"
        )
    if row % parallel.tensor:
        raise UserError(
            f"trainer.tokens_per_micro_batch ({row}) is not a multiple of parallel.tensor ({parallel.tensor}), whose "
            "ranks share a row"
        )
    if longest >= row:
        raise UserError(
            f"rollout.max_new_tokens ({longest}) leaves no room for a prompt in trainer.tokens_per_micro_batch ({row})"
        )


def _validate_store(settings: config.Config) -> None:
    """Refuse a store that nothing would be written to, and an encoding that cannot hold the model's routes."""
    replay, model = settings.replay, settings.model
    if not replay.store:
        return
    if replay.mode == "none" or not objectives.get(settings.objective.name).rollouts:
        raise UserError(f"replay.store={replay.store} keeps replayed routes, and nothing is replayed: leave it empty")
    if replay.store_encoding == "compact" and (model.num_experts > MAX_EXPERTS or model.moe_topk > MAX_TOPK):
        raise UserError(
            f"replay.store_encoding=compact knows up to {MAX_TOPK} of {MAX_EXPERTS} experts, the model uses "
            f"{model.moe_topk} of {model.num_experts}: choose plain"
        )


def _validate_route_weights(settings: config.Config) -> None:
    """Refuse to measure with the servers' weights of experts where there are none, or no token that they are of."""
    if settings.replay.weights == "live":
        return
    rollout, fault = settings.rollout, ""
    if settings.replay.mode != "r3" or not objectives.get(settings.objective.name).rollouts:
        fault = "it replaces the weights of the experts that replay.mode=r3 forces, and they are not forced"
    elif rollout.urls:
        fault = "servers at rollout.urls return no weights: those that a run starts itself do"
    elif rollout.overlap:
        fault = "with rollout.overlap every token is of weights before the step's, under which it is not measured"
    if fault:
        raise UserError(f"replay.weights is server: {fault}; leave it at live")


def _validate_prediction(settings: config.Config, architecture: Architecture, rollouts: bool) -> None:
    """Refuse predicted routes where nothing is recorded, nothing can be predicted, or the router is of another kind."""
    replay, num_updates = settings.replay, settings.trainer.mini_batches
    if not replay.predict:
        for name in ("predict_learning_rate", "predict_every"):
            if getattr(replay, name) != getattr(type(replay), name):
                raise UserError(f"replay.{name} is {getattr(replay, name):g} and replay.predict=false: set it to true")
        return
    if not rollouts or replay.mode != "r2":
        mode = f"replay.mode={replay.mode}" if rollouts else f"objective={settings.objective.name}"
        raise UserError(
            f"replay.predict=true with {mode}: it predicts the routes that replay.mode=r2 records in reinforcement "
            "learning; set that, or leave it out"
        )
    if num_updates < 2:
        raise UserError(
            "replay.predict=true with trainer.mini_batches=1: no router moves between the recorded routes and the one "
            "update that replays them; set at least 2, or leave it out"
        )
    router = architecture.family.transformer_arguments(architecture)
    kind = "sigmoid scores" if router.get("moe_router_score_function", "softmax") != "softmax" else ""
    if kind or router.get("moe_router_num_groups"):
        raise UserError(
            f"replay.predict=true and the model's routers have {kind or 'groups of experts'}: it is for routers that "
            "choose the top-k of a softmax over all experts; leave it out"
        )


def validate_stale_rollouts(settings: config.Config) -> None:
    """Refuse settings of stale rollouts that contradict each other or the objective.

    Raises:
        UserError: names the settings.
    """
    rollout, trainer, objective = settings.rollout, settings.trainer, policy_settings(settings.objective)
    tokens, limit = rollout.partial_tokens, rollout.max_staleness
    validate_group("rollout", rollout)
    if tokens >= rollout.max_new_tokens:
        raise UserError(
            f"rollout.partial_tokens is {tokens}: it must be less than rollout.max_new_tokens "
            f"({rollout.max_new_tokens}), or 0 for whole rollouts"
        )
    if rollout.prompts_in_progress and not tokens:
        raise UserError("rollout.prompts_in_progress is for partial rollouts: set rollout.partial_tokens")
    if tokens and 0 != rollout.prompts_in_progress <= trainer.prompts_per_step:
        raise UserError(
            f"rollout.prompts_in_progress ({rollout.prompts_in_progress}) is not more than trainer.prompts_per_step "
            f"({trainer.prompts_per_step}): every sample would be waited for, and none be partial"
        )
    if not tokens and not rollout.overlap:
        if limit is not None:
            raise UserError("rollout.max_staleness is for partial or overlapping rollouts: others are never stale")
        return
    if objective.refill_rounds:
        raise UserError(
            "objective.refill_rounds asks for groups within a step: it goes with neither rollout.partial_tokens nor "
            "rollout.overlap"
        )
    if limit is not None and limit < rollout.overlap:
        raise UserError(
            f"rollout.max_staleness is {limit}: it must be at least 1 with rollout.overlap, whose tokens all are, or "
            "unset for no limit"
        )
    if limit != 0 and not _corrects(objective):
        how = "objective.train_infer_is=true" if isinstance(objective, config.Minirl) else "objective.correction"
        only = "" if rollout.overlap else ", or rollout.max_staleness=0 to leave stale tokens out"
        raise UserError(
            f"objective={objective.name} as set gives stale tokens the weight of fresh ones: set {how}{only}"
        )


def _corrects(objective: config.Objective) -> bool:
    """Return whether the loss has the weight π_old/μ_old; an objective from outside is trusted to have it."""
    if isinstance(objective, config.Minirl):
        return objective.train_infer_is
    return not isinstance(objective, config.Corrected) or objective.correction != "none"
