"""A training session: the process groups, the actor with its weights, the tokenizer and the task."""

import logging
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bai import config, rewards
from megatron_bai.data import task_factory
from megatron_bai.data.task import Task
from megatron_bai.distributed import backend
from megatron_bai.distributed.hosts import is_loopback, is_multi_host
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.errors import UserError
from megatron_bai.model import build
from megatron_bai.model.build import MegatronModel
from megatron_bai.monitor import loggers
from megatron_bai.monitor.detectors import run_monitor
from megatron_bai.rewards import Scorer
from megatron_bai.rl import init_weights, objectives
from megatron_bai.rl.experience import staleness
from megatron_bai.rl.objectives.objective import policy_settings
from megatron_bai.rl.policy import lr_schedule
from megatron_bai.rl.policy.critic import Critic
from megatron_bai.rl.policy.training_engine import TrainingEngine
from megatron_bai.rollout.client import max_request_tokens
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.servers import auth, fleet
from megatron_bai.routing.missing import validate_missing_policy
from megatron_bai.routing.replay.routing_replay import RoutingReplay
from megatron_bai.routing.routes import RouteSignature
from megatron_bai.routing.store.codec import ENCODINGS
from megatron_bai.routing.store.expert_set_code import MAX_EXPERTS, MAX_TOPK

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """A rank's models, task and position in a run.

    Attributes:
        tokenizer_dir: holds the tokenizer's files, to copy beside every checkpoint.
        signature: of the whole model's routes.
        dp_rank: index of this rank's replica.
        dp_size: number of data-parallel replicas.
        is_replica_leader: whether this rank sends its replica's requests to servers and rewards.
        is_rank_0: whether this is rank 0 of the world, which owns the servers and the files.
        model_group: the ranks of one replica (tensor × pipeline).
        replica_moe_layers: of each rank of the replica, its MoE layers, counted from 0.
        critic: if the objective has one.
        scorer: gives rewards; on a leader, if the objective has rollouts.
    """

    settings: config.Config
    device: backend.Device
    actor: MegatronModel
    engine: TrainingEngine
    task: Task
    tokenizer_dir: Path
    signature: RouteSignature
    dp_rank: int
    dp_size: int
    is_replica_leader: bool
    is_rank_0: bool
    model_group: Any
    replica_moe_layers: list[list[int]]
    critic: Critic | None = None
    scorer: Scorer | None = None

    @property
    def reports_stats(self) -> bool:
        """Whether this rank's statistics are gathered: one rank of each replica's last stage."""
        return self.engine.last_stage and self.engine.tensor_rank == 0

    def send_to_replica(self, samples: list[Sample] | None) -> list[Sample]:
        """Send the leader's samples to every rank of its replica, each with the routes of that rank's own layers.

        The leader sends to one rank after another, so that it never holds more than one copy. Collective over the
        replica.

        Args:
            samples: on the leader, with the routes of all layers; None on other ranks.

        Returns:
            The samples, with the routes of this rank's layers.
        """
        if not self.is_replica_leader:
            received: list[Any] = [None]
            dist.recv_object_list(received, group=self.model_group, group_src=0)
            local_samples: list[Sample] = received[0]
            return local_samples
        assert samples is not None, "the leader has samples"
        for rank, columns in enumerate(self.replica_moe_layers[1:], start=1):
            rank_samples = [sample.select_layers(columns) for sample in samples]
            dist.send_object_list([rank_samples], group=self.model_group, group_dst=rank)
        return [sample.select_layers(self.replica_moe_layers[0]) for sample in samples]


@contextmanager
def open_session(settings: config.Config) -> Iterator[Session]:
    """Initialise the process groups, build the actor and load its first weights; shut down at the end of the block.

    Yields:
        The session.

    Raises:
        UserError: settings that contradict each other or the machine, or a checkpoint or a merge that cannot be used.
    """
    validate_settings(settings)
    require_packages(settings)
    if settings.rollout.api_key_file:
        auth.read_key(settings.rollout.api_key_file)  # an error before models are built
    device = backend.init_backend(settings.backend)
    try:
        build.validate_layout(settings.model, settings.parallel, dist.get_world_size())
        _check_processes(settings.cluster, dist.get_world_size())
        if is_multi_host():
            _require_shared_dir(Path(settings.run.dir))
        init_weights.run_init_merge(settings)
        with ExitStack() as stack:
            session = _build_session(settings, device)
            if session.is_replica_leader and objectives.get(settings.objective.name).rollouts:
                log = Path(settings.run.dir) / "reward.log"
                session.scorer = stack.enter_context(rewards.open_scorer(settings.reward, session.task, log))
            yield session
    finally:
        backend.shutdown_backend()


def _check_processes(cluster: config.Cluster, world: int) -> None:
    """Raise a UserError unless as many processes run as `cluster.processes` says."""
    if cluster.processes not in (0, world):
        raise UserError(
            f"cluster.processes is {cluster.processes}, and {world} were started: start as many, or choose another "
            "cluster"
        )


def _require_shared_dir(directory: Path) -> None:
    """Refuse a `run.dir` that machines do not share: each would have only its own files of every checkpoint."""
    group = current_ranks()

    def require_visible(mark: Path) -> None:
        if not mark.exists():
            raise UserError(
                f"{socket.gethostname()} does not see what rank 0 writes to run.dir={directory}: give a directory that "
                "all machines of the run share"
            )

    def make_mark() -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".seen-", dir=directory))

    mark = group.run_on_first(make_mark, directory)
    try:
        group.run_on_all(lambda: require_visible(mark))
    finally:
        if group.rank == 0:
            mark.rmdir()


def _build_session(settings: config.Config, device: backend.Device) -> Session:
    """Build the actor, the task and, if the objective has one, the critic. Collective."""
    build.init_parallel(settings.parallel, settings.run.seed, settings.backend.timeout_s)
    from megatron.core import parallel_state

    actor = build.build_actor(settings, device)
    tokenizer_dir = init_weights.load_initial_weights(actor, settings)
    replay = RoutingReplay(actor.modules)
    group = parallel_state.get_model_parallel_group()
    replica_moe_layers: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(replica_moe_layers, replay.columns, group=group)
    return Session(
        settings=settings,
        device=device,
        actor=actor,
        engine=TrainingEngine(actor, replay, device.device, settings.rollout.temperature),
        task=_make_task(settings, tokenizer_dir),
        tokenizer_dir=tokenizer_dir,
        signature=replay.signature,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        is_replica_leader=dist.get_rank(group) == 0,
        is_rank_0=dist.get_rank() == 0,
        model_group=group,
        replica_moe_layers=replica_moe_layers,
        critic=Critic(actor, settings, device) if isinstance(settings.objective, config.Ppo) else None,
    )


def _make_task(settings: config.Config, tokenizer_dir: Path) -> Task:
    """Make the task, whose prompts leave room for a response."""
    supervised = not objectives.get(settings.objective.name).rollouts
    length = max_request_tokens(settings.rollout, settings.model.max_position_embeddings) - settings.rollout.max_new_tokens
    if supervised:
        length = settings.supervised.length
    log = _log.warning if dist.get_rank() == 0 else (lambda line: None)
    return task_factory.make_task(settings.data, _load_tokenizer(tokenizer_dir), length, supervised, log)


def _load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a checkpoint."""
    from transformers import PreTrainedTokenizerFast

    init_weights.require_tokenizer(directory)
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from None


def validate_settings(settings: config.Config) -> None:
    """Refuse settings that contradict each other, by name, before any work starts.

    Raises:
        UserError: names the settings.
    """
    trainer, model = settings.trainer, settings.model
    if settings.replay.mode not in ("none", "r2", "r3"):
        raise UserError(f"replay.mode is {settings.replay.mode!r}: choose none, r2 or r3")
    validate_missing_policy(settings.replay.missing)
    init_weights.validate_init(settings)
    lr_schedule.validate(settings)
    _check_store(settings)
    run_monitor.validate(settings.monitor)
    loggers.validate(settings)
    for name in ("steps", "prompts_per_step", "group_size", "mini_batches", "micro_batch_size"):
        if getattr(trainer, name) < 1:
            raise UserError(f"trainer.{name} is {getattr(trainer, name)}: it must be at least 1")
    if trainer.save_every < 0 or trainer.keep < 1:
        raise UserError(
            f"trainer.save_every is {trainer.save_every} and trainer.keep {trainer.keep}: at least 0 and 1 are needed"
        )
    rollouts = objectives.check(settings.objective).rollouts
    _check_packing(settings, rollouts)
    task_factory.validate_data(settings.data, not rollouts, config.initial_checkpoint(settings))
    rewards.resolve_reward(settings.reward)
    if not rollouts:
        if trainer.save_every:
            raise UserError("trainer.save_every is for reinforcement learning: supervised training is not resumed")
        return
    if trainer.eval_samples < 1:
        raise UserError(f"trainer.eval_samples is {trainer.eval_samples}: it must be at least 1")
    _check_groups(settings)
    if isinstance(settings.objective, config.Ppo):
        _check_critic(settings.objective, settings.trainer)
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
    staleness.validate(settings)
    if settings.rollout.max_new_tokens >= model.max_position_embeddings:
        raise UserError(
            f"rollout.max_new_tokens ({settings.rollout.max_new_tokens}) leaves no room for a prompt in "
            f"model.max_position_embeddings ({model.max_position_embeddings})"
        )


def require_packages(settings: config.Config) -> None:
    """Refuse a run whose settings need a package that is not installed, before any work starts.

    Raises:
        UserError: names the setting and the package.
    """
    loggers.require(settings.monitor)
    if objectives.get(settings.objective.name).rollouts:
        rewards.require(settings.reward)


def _check_groups(settings: config.Config) -> None:
    """Refuse groups that are too small for the objective."""
    objective, trainer = policy_settings(settings.objective), settings.trainer
    if trainer.group_size == 1 and not isinstance(objective, config.Ppo):
        raise UserError("trainer.group_size is 1: an advantage needs a group of at least 2 samples")
    if trainer.group_size == 1 and objective.drop_uniform_groups:
        raise UserError("objective.drop_uniform_groups with trainer.group_size=1 drops every sample")


def _check_critic(objective: config.Ppo, trainer: config.Trainer) -> None:
    """Refuse a critic that contradicts the trainer's settings."""
    if objective.critic_warmup > trainer.steps:
        raise UserError(
            f"objective.critic_warmup ({objective.critic_warmup}) is more than trainer.steps ({trainer.steps})"
        )
    if objective.critic_save and objective.critic_save == trainer.save:
        raise UserError(f"objective.critic_save and trainer.save are both {trainer.save}: they are two models")


def _check_packing(settings: config.Config, rollouts: bool) -> None:
    """Refuse rows that samples cannot be packed into."""
    row, parallel, longest = settings.trainer.tokens_per_micro_batch, settings.parallel, settings.rollout.max_new_tokens
    if not row:
        return
    if row < 0:
        raise UserError(f"trainer.tokens_per_micro_batch is {row}: it must be at least 1, or 0 to count samples")
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


def _check_store(settings: config.Config) -> None:
    """Refuse a store that nothing would be written to, and an encoding that cannot hold the model's routes."""
    replay, model = settings.replay, settings.model
    if not replay.store:
        return
    if replay.mode == "none" or not objectives.get(settings.objective.name).rollouts:
        raise UserError(f"replay.store={replay.store} keeps replayed routes, and nothing is replayed: leave it empty")
    if replay.store_encoding not in ENCODINGS:
        raise UserError(f"replay.store_encoding is {replay.store_encoding!r}: choose {' or '.join(ENCODINGS)}")
    if replay.store_encoding == "compact" and (model.num_experts > MAX_EXPERTS or model.moe_topk > MAX_TOPK):
        raise UserError(
            f"replay.store_encoding=compact knows up to {MAX_TOPK} of {MAX_EXPERTS} experts, the model uses "
            f"{model.moe_topk} of {model.num_experts}: choose plain"
        )
