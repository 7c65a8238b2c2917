"""A training session: the process groups, the actor with its weights, the tokenizer and the task."""

import logging
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bai import config, rewards
from megatron_bai.checkpoint import formats
from megatron_bai.data.task import Task
from megatron_bai.distributed import backend
from megatron_bai.distributed.hosts import is_multi_host
from megatron_bai.distributed.kernel_sources import format_kernels
from megatron_bai.distributed.rank_group import current_ranks
from megatron_bai.environments.responder import EnvironmentPool, open_environment
from megatron_bai.errors import UserError
from megatron_bai.model import build
from megatron_bai.model.build import MegatronModel
from megatron_bai.rewards import Scorer
from megatron_bai.rl import init_weights, objectives
from megatron_bai.rl.batches.micro_batches import validate_batches
from megatron_bai.rl.policy.critic import Critic
from megatron_bai.rl.policy.held_back import HeldBack
from megatron_bai.rl.policy.training_engine import TrainingEngine
from megatron_bai.rl.run_architecture import plain_settings, resolve_architecture
from megatron_bai.rl.run_dir import require_usable_run_dir
from megatron_bai.rl.run_task import make_generated_task, make_task
from megatron_bai.rl.validate_settings import require_packages, validate_settings
from megatron_bai.rl.writable_dirs import require_writable_dirs
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.servers import auth, fleet
from megatron_bai.rollout.servers.placement import find_machines, place_servers
from megatron_bai.routing.replay.routing_replay import RoutingReplay
from megatron_bai.routing.routes import RouteSignature

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
        environment: replies to turns of conversations; likewise, and None with `env=none`.
        sources: hashes of what determines samples beside the settings (`sample_sources.py`).
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
    environment: EnvironmentPool | None = None
    sources: dict[str, str] = field(default_factory=dict)

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
    init_weights.validate_init(settings)
    init_weights.require_sources(settings)  # says what a directory is that is no checkpoint
    settings = resolve_architecture(settings)
    validate_settings(settings)
    require_packages(settings)
    require_writable_dirs(settings)
    if settings.rollout.api_key_file:
        auth.read_key(settings.rollout.api_key_file)  # an error before models are built
    has_rollouts = objectives.get(settings.objective.name).rollouts
    if has_rollouts and int(os.environ.get("RANK", 0)) == 0:
        require_usable_run_dir(plain_settings(settings))
        fleet.require_local_addresses(settings.rollout)
    device = backend.init_backend(settings.backend, has_rollouts)
    try:
        _validate_world(settings, dist.get_world_size())
        if has_rollouts and not settings.rollout.urls:
            place_servers(settings.rollout, find_machines(device.kind).machines)
        if dist.get_rank() == 0:
            _log.info("training kernels: %s", format_kernels(device.use_transformer_engine))
        if is_multi_host():
            _require_shared_dir(Path(settings.run.dir))
        init_weights.run_init_merge(settings)
        task = _make_task_of_checkpoint(settings)
        with ExitStack() as stack:
            session = _build_session(settings, device, task)
            if session.is_replica_leader and has_rollouts:
                log = Path(settings.run.dir) / "reward.log"
                session.scorer = stack.enter_context(rewards.open_scorer(settings.reward, session.task, log))
                replies = open_environment(settings.env, settings.data, session.task, log.with_name("environment.log"))
                session.environment = stack.enter_context(replies)
            yield session
    finally:
        backend.shutdown_backend()


def _validate_world(settings: config.Config, world: int) -> None:
    """Refuse a layout or batches that this number of processes does not fit."""
    parallel = settings.parallel
    build.validate_layout(settings.model, parallel, world)
    validate_batches(settings, world // (parallel.tensor * parallel.pipeline))
    _validate_processes(settings.cluster, world)


def _validate_processes(cluster: config.Cluster, world: int) -> None:
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


def _build_session(settings: config.Config, device: backend.Device, task: Task | None) -> Session:
    """Build the actor, the task if there is none yet and, if the objective has one, the critic. Collective."""
    build.init_parallel(settings.parallel, settings.run.seed, settings.backend.timeout_s)
    from megatron.core import parallel_state

    actor = build.build_actor(settings, device)
    if settings.rollout.exact:
        from megatron_bai.model.exact_layers import make_exact

        make_exact(actor.modules, actor.architecture)
    settings = plain_settings(settings)
    tokenizer_dir = init_weights.load_initial_weights(actor, settings)
    with warnings.catch_warnings():
        if not objectives.get(settings.objective.name).rollouts:
            warnings.simplefilter("ignore")  # of losses that contradict replay: nothing is replayed
        replay = RoutingReplay(actor.modules)
    task = task or _make_task(settings, tokenizer_dir)
    group = parallel_state.get_model_parallel_group()
    replica_moe_layers: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(replica_moe_layers, replay.columns, group=group)
    return Session(
        settings=settings,
        device=device,
        actor=actor,
        engine=_make_engine(actor, replay, device, settings, task),
        task=task,
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


def _make_engine(
    actor: MegatronModel, replay: RoutingReplay, device: backend.Device, settings: config.Config, task: Task
) -> TrainingEngine:
    """Make the training engine of the distribution that servers sample from, where there are any."""
    rollout, held_back = settings.rollout, None
    if rollout.min_new_tokens and objectives.get(settings.objective.name).rollouts:
        held_back = HeldBack(rollout.min_new_tokens, task.end_tokens)
    return TrainingEngine(actor, replay, device.device, rollout.temperature, rollout.exact, held_back)


def _make_task_of_checkpoint(settings: config.Config) -> Task | None:
    """Make the task before the model is built, where the tokenizer is a checkpoint's; None elsewhere. Collective."""
    source = config.initial_checkpoint(settings)
    if not source:
        if isinstance(settings.data, config.Generated):  # for its checks; the run's is read from its directory
            make_generated_task(settings, settings.data)
        return None
    tasks = []

    def make() -> None:
        formats.require_complete(source)
        tasks.append(_make_task(settings, Path(source)))

    current_ranks().run_on_all(make)
    return tasks[0]


def _make_task(settings: config.Config, tokenizer_dir: Path) -> Task:
    """Make the task on every rank; the first says what was left out."""
    return make_task(settings, tokenizer_dir, _log.warning if dist.get_rank() == 0 else (lambda line: None))
