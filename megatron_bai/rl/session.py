"""What every training run starts with: the world, the actor with its weights, the tokenizer and the task."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bai import backend, config
from megatron_bai.data import Task, build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.model import build, checkpoint, hf, manifest, shards
from megatron_bai.model.build import Actor
from megatron_bai.rl import objectives
from megatron_bai.rl.engine import Engine
from megatron_bai.rollout import fleet
from megatron_bai.rollout.sample import Sample
from megatron_bai.routing.codec import ENCODINGS
from megatron_bai.routing.missing import check_policy
from megatron_bai.routing.replay import RoutingReplay
from megatron_bai.routing.routes import RouteSignature
from megatron_bai.routing.sets import MAX_EXPERTS, MAX_TOPK


@dataclass
class Session:
    """A rank's part of a run.

    Attributes:
        tokenizer_dir: holds the tokenizer's files, to copy beside every checkpoint.
        data_rank, data_size: this rank's place among the data-parallel replicas.
        leader: the rank that speaks for its replica to the outside.
        lead: rank 0 of the world, which owns the server and the files.
        model_group: the ranks of one replica (tensor × pipeline).
        columns: the MoE layers, counted from 0, of each rank of the replica.
    """

    settings: config.Config
    device: backend.Device
    actor: Actor
    engine: Engine
    task: Task
    tokenizer_dir: Path
    signature: RouteSignature
    data_rank: int
    data_size: int
    leader: bool
    lead: bool
    model_group: Any
    columns: list[list[int]]

    @property
    def contributes(self) -> bool:
        """Whether this rank's statistics count: one rank of each replica's last stage."""
        return self.engine.last_stage and self.engine.tensor_rank == 0

    def deliver(self, samples: list[Sample] | None) -> list[Sample]:
        """The leader's samples on every rank of its replica, each with the routes of that rank's own layers.

        One rank is served after another, so that the leader never holds more than one copy. Collective over the replica.
        """
        if not self.leader:
            box = [None]
            dist.recv_object_list(box, group=self.model_group, group_src=0)
            return box[0]
        for rank, columns in enumerate(self.columns[1:], start=1):
            cut = [sample.of_layers(columns) for sample in samples]
            dist.send_object_list([cut], group=self.model_group, group_dst=rank)
        return [sample.of_layers(self.columns[0]) for sample in samples]


@contextmanager
def open_session(settings: config.Config) -> Iterator[Session]:
    """Join the world, build the actor and give it its weights; leave the world at the end.

    Raises:
        UserError: settings that contradict each other or the machine, or a checkpoint that cannot be used.
    """
    validate(settings)
    device = backend.start(settings.backend)
    try:
        build.validate(settings.model, settings.parallel, dist.get_world_size())
        yield _open(settings, device)
    finally:
        backend.stop()


def _open(settings: config.Config, device: backend.Device) -> Session:
    build.init_parallel(settings.parallel, settings.run.seed)
    from megatron.core import parallel_state

    actor = build.build_actor(settings, device)
    tokenizer_dir = _set_weights(actor, settings)
    replay = RoutingReplay(actor.modules)
    group = parallel_state.get_model_parallel_group()
    columns: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(columns, replay.columns, group=group)
    return Session(
        settings=settings,
        device=device,
        actor=actor,
        engine=Engine(actor, replay, device.device, settings.rollout.temperature),
        task=Task(settings.data, _load_tokenizer(tokenizer_dir)),
        tokenizer_dir=tokenizer_dir,
        signature=replay.signature,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        leader=dist.get_rank(group) == 0,
        lead=dist.get_rank() == 0,
        model_group=group,
        columns=columns,
    )


def _set_weights(actor: Actor, settings: config.Config) -> Path:
    """Fill the actor as `init` says; returns the directory of its tokenizer."""
    source = settings.init.checkpoint
    if not source:
        shards.init_random(actor.modules, settings.model, settings.run.seed)
        checkpoint.finish_loading(actor)
        directory = Path(settings.run.dir) / "tokenizer"
        if dist.get_rank() == 0:
            build_tokenizer(settings.data, settings.model.vocab_size).save_pretrained(directory)
        dist.barrier()
        return directory
    manifest.require(source)
    if checkpoint.kind_of(source) == "hf":
        hf.import_hf(actor.modules, settings.model, source)
        checkpoint.finish_loading(actor)
    else:
        checkpoint.load(actor, source)
    return Path(source)


def _load_tokenizer(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} holds no tokenizer.json: copy the model's tokenizer files there")
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from None


def validate(settings: config.Config) -> None:
    """Refuse what contradicts itself, by name, before any work starts.

    Raises:
        UserError: names the settings.
    """
    trainer, model = settings.trainer, settings.model
    if settings.replay.mode not in ("none", "r2", "r3"):
        raise UserError(f"replay.mode is {settings.replay.mode!r}: choose none, r2 or r3")
    check_policy(settings.replay.missing)
    _check_store(settings)
    for name in ("steps", "prompts_per_step", "group_size", "mini_batches", "micro_batch_size"):
        if getattr(trainer, name) < 1:
            raise UserError(f"trainer.{name} is {getattr(trainer, name)}: it must be at least 1")
    if not objectives.check(settings.objective).rollouts:
        return
    if trainer.group_size < 2:
        raise UserError("trainer.group_size is 1: an advantage needs a group of at least 2 samples")
    if trainer.prompts_per_step % trainer.mini_batches:
        raise UserError(
            f"trainer.prompts_per_step ({trainer.prompts_per_step}) is not a multiple of trainer.mini_batches "
            f"({trainer.mini_batches})"
        )
    fleet.validate(settings.rollout)
    if settings.rollout.max_new_tokens >= model.max_position_embeddings:
        raise UserError(
            f"rollout.max_new_tokens ({settings.rollout.max_new_tokens}) leaves no room for a prompt in "
            f"model.max_position_embeddings ({model.max_position_embeddings})"
        )


def _check_store(settings: config.Config) -> None:
    """Refuse a store that nothing would be written to, or not in the way asked for."""
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


def fingerprint(settings: config.Config) -> str:
    """A digest of what determines a supervised checkpoint, and of the one it starts from: equal means the same work."""
    described = {name: asdict(getattr(settings, name)) for name in ("model", "data", "objective", "supervised", "trainer")}
    del described["trainer"]["save"]
    described["seed"] = settings.run.seed
    described["init"] = manifest.require(settings.init.checkpoint) if settings.init.checkpoint else None
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
