"""Every setting of every verb, typed. Hydra fills these from `conf/` and the command line.

One tree serves all verbs, so that one experiment file describes a whole run: what is trained, merged, served and
updated. An unknown key is refused by Hydra; what contradicts another setting is refused by `validate`, by name.

One file a group; everything is importable from here.
"""

from megatron_bai.config.data import Arithmetic, Data, Dataset, Generated, Tools
from megatron_bai.config.environment import Calculator, Env, NoEnvironment, PerTurn, PythonTool, UserEnvironment
from megatron_bai.config.merge import CheckpointInit, Init, Merge, MergeInit, RandomInit
from megatron_bai.config.monitor import Monitor
from megatron_bai.config.objectives import (
    Cispo,
    Corrected,
    Dapo,
    Dppo,
    Drpo,
    Gmpo,
    Grpo,
    Gspo,
    Minirl,
    Objective,
    Policy,
    Ppo,
    RouterShifted,
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
    PerSample,
    Reward,
    RewardModel,
    Several,
)
from megatron_bai.config.rollout import Replay, Rollout
from megatron_bai.config.run import Backend, Cluster, Model, Parallel, Run
from megatron_bai.config.schema import Config, initial_checkpoint, register_schema
from megatron_bai.config.trainer import Supervised, Trainer
from megatron_bai.config.verbs import Calibrate, Convert, Inspect, Report, Samples, Serve
from megatron_bai.project_files import conf_dir

__all__ = [
    "Arithmetic",
    "Backend",
    "Calculator",
    "Calibrate",
    "CheckpointInit",
    "Cispo",
    "Cluster",
    "Code",
    "Config",
    "Convert",
    "Corrected",
    "Dapo",
    "Data",
    "Dataset",
    "Dppo",
    "Drpo",
    "Env",
    "EnvironmentReward",
    "Exact",
    "Function",
    "Generated",
    "Gmpo",
    "Grpo",
    "Gspo",
    "Init",
    "Inspect",
    "MathVerify",
    "Merge",
    "MergeInit",
    "Minirl",
    "Model",
    "Monitor",
    "NoEnvironment",
    "Objective",
    "Parallel",
    "PerSample",
    "PerTurn",
    "Policy",
    "Ppo",
    "PythonTool",
    "RandomInit",
    "Replay",
    "Report",
    "Reward",
    "RewardModel",
    "Rollout",
    "RouterShifted",
    "Run",
    "Samples",
    "Sapo",
    "Sequence",
    "Serve",
    "Several",
    "Sft",
    "Supervised",
    "Tools",
    "Trainer",
    "UserEnvironment",
    "conf_dir",
    "initial_checkpoint",
    "register_schema",
]
