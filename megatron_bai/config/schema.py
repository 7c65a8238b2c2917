"""The whole tree of settings, and its registration with Hydra."""

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from omegaconf import MISSING

from megatron_bai.config.data import Arithmetic, Data, Dataset, Tools
from megatron_bai.config.environment import Calculator, Env, NoEnvironment, PythonTool, UserEnvironment
from megatron_bai.config.merge import CheckpointInit, Init, Merge, MergeInit, RandomInit
from megatron_bai.config.monitor import Monitor
from megatron_bai.config.objectives import (
    Cispo,
    Dapo,
    Dppo,
    Drpo,
    Gmpo,
    Grpo,
    Gspo,
    Minirl,
    Objective,
    Ppo,
    Sapo,
    Sequence,
    Sft,
)
from megatron_bai.config.rewards import (
    Code,
    EnvironmentReward,
    Exact,
    Function,
    MathVerify,
    Reward,
    RewardModel,
    Several,
)
from megatron_bai.config.rollout import Replay, Rollout
from megatron_bai.config.run import Backend, Cluster, Model, Parallel, Run
from megatron_bai.config.trainer import Supervised, Trainer
from megatron_bai.config.verbs import Calibrate, Convert, Inspect, Report, Samples, Serve
from megatron_bai.errors import UserError


@dataclass
class Config:
    """All settings; each verb reads its groups."""

    run: Run = field(default_factory=Run)
    backend: Backend = field(default_factory=Backend)
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    cluster: Cluster = field(default_factory=Cluster)
    data: Data = field(default_factory=Arithmetic)
    reward: Reward = field(default_factory=Exact)
    env: Env = field(default_factory=NoEnvironment)
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
    calibrate: Calibrate = field(default_factory=Calibrate)
    samples: Samples = field(default_factory=Samples)
    report: Report = field(default_factory=Report)


def register_schema() -> None:
    """Register the tree with Hydra under the name that `conf/config.yaml` uses, and load what packages add to it."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config(data=MISSING, reward=MISSING, env=MISSING, init=MISSING, objective=MISSING))
    choices: dict[str, tuple[type[Any], ...]] = {
        "data": (Arithmetic, Tools, Dataset),
        "init": (RandomInit, CheckpointInit, MergeInit),
        "reward": (Exact, MathVerify, Function, RewardModel, EnvironmentReward, Code, Several),
        "env": (NoEnvironment, UserEnvironment, Calculator, PythonTool),
        "objective": (Sft, Minirl, Sequence, Dppo, Drpo, Grpo, Dapo, Cispo, Gspo, Gmpo, Sapo, Ppo),
    }
    for group, kinds in choices.items():
        for kind in kinds:
            store.store(group=f"{group}/settings", name=kind.name, node=kind)
    for what in ("objective", "reward", "environment"):
        for point in entry_points(group=f"megatron_bai.{what}s"):
            try:
                point.load()
            except Exception as error:  # whatever it is, it is the plugin's
                raise UserError(
                    f"the {what} plugin {point.name} = {point.value} cannot be loaded: {error!r}"
                ) from error


def initial_checkpoint(settings: Config) -> str:
    """Return the directory that the first weights of a run are read from; empty for random ones."""
    init = settings.init
    return settings.merge.output if isinstance(init, MergeInit) else getattr(init, "checkpoint", "")
