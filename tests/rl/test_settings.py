"""Contradictory settings are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from model.families import published

from megatron_bai import config
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.model import build
from megatron_bai.model.architecture import read_architecture
from megatron_bai.rl import session
from megatron_bai.rl.policy import lr_schedule
from megatron_bai.rl.validate_settings import require_packages, validate_settings

MODEL = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16,
    "num_experts": 8, "moe_topk": 2, "moe_ffn_hidden_size": 64, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
MERGE = config.Merge(pretrained="p", members=["m"], weights=[1.0], output="b")
TOY = config.UserEnvironment(environment="a.b:C")
CHATS = {"data": config.Dataset(train="rows.jsonl"), "init": config.CheckpointInit(checkpoint="somewhere")}


def changed(**values: Any) -> config.Config:
    """A valid configuration but for `group__key=value`, or a whole `group=value`."""
    settings = config.Config(model=config.Model(**MODEL))
    for name, value in values.items():
        group, _, key = name.partition("__")
        if not key:
            setattr(settings, group, value)
            continue
        assert hasattr(getattr(settings, group), key)
        setattr(getattr(settings, group), key, value)
    return settings


def test_the_defaults_are_valid() -> None:
    validate_settings(changed())
    build.validate_layout(changed().model, config.Parallel(), world=1)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("moonlight", {}, "sigmoid scores"),
        (
            "bailing_moe",
            {"n_group": 4, "topk_group": 2, "num_experts": 8, "num_experts_per_tok": 4},
            "groups of experts",
        ),
    ],
)
def test_routes_of_other_routers_are_not_predicted(
    name: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.read(name) | changes))
    settings = changed(replay=config.Replay(mode="r2", predict=True), model=read_architecture(tmp_path))
    with pytest.raises(UserError, match=f"replay.predict=true and the model's routers have {named}"):
        validate_settings(settings)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replay__mode": "r4"}, ["replay.mode", "'r4'", "none, r2 or r3"]),
        ({"replay__store": "s", "replay__mode": "none"}, ["replay.store=s", "nothing is replayed"]),
        ({"replay__store": "s", "objective__name": "sft"}, ["replay.store=s", "nothing is replayed"]),
        ({"replay__weights": "both"}, ["replay.weights is 'both'", "live or server"]),
        ({"replay__weights": "server", "replay__mode": "r2"}, ["replay.weights is server", "replay.mode=r3", "live"]),
        ({"replay__weights": "server", "objective__name": "sft"}, ["replay.weights is server", "replay.mode=r3"]),
        ({"replay__weights": "server", "rollout__urls": ["http://a:1"]}, ["replay.weights is server", "rollout.urls"]),
        ({"replay__weights": "server", "rollout__overlap": True}, ["replay.weights is server", "rollout.overlap"]),
        (
            {"replay__store": "s", "replay__store_encoding": "zip"},
            ["replay.store_encoding is 'zip'", "plain or compact"],
        ),
        (
            {"replay__store": "s", "model__num_experts": 2048},
            ["replay.store_encoding=compact", "2 of 2048: choose plain"],
        ),
        ({"replay__predict": True}, ["replay.predict=true with replay.mode=r3", "replay.mode=r2 records"]),
        (
            {"replay__predict": True, "replay__mode": "r2", "objective": config.Sft()},
            ["replay.predict=true with objective=sft", "in reinforcement learning"],
        ),
        (
            {"replay__predict": True, "replay__mode": "r2", "trainer__mini_batches": 1},
            ["replay.predict=true with trainer.mini_batches=1", "at least 2"],
        ),
        ({"replay__predict_every": 4}, ["replay.predict_every is 4", "replay.predict=false"]),
        ({"replay__predict_learning_rate": 0.5}, ["replay.predict_learning_rate is 0.5", "replay.predict=false"]),
        ({"replay__predict_every": 0}, ["replay.predict_every is 0", "at least 1"]),
        ({"model__moe_topk": 1}, ["model.moe_topk (1) is not supported", "always 1"]),
        ({"model__moe_topk": 9}, ["model.moe_topk (9) is more than model.num_experts (8)"]),
        ({"model__num_query_groups": 3}, ["model.num_attention_heads (4) is not a multiple of model.num_query_groups"]),
        ({"model__head_dim": 7}, ["model.head_dim (7) is odd"]),
        ({"replay__missing": "drop"}, ["replay.missing", "'drop'", "strict, mask or live"]),
        ({"trainer__steps": 0}, ["trainer.steps is 0"]),
        ({"trainer__prompts_per_step": 0}, ["trainer.prompts_per_step is 0"]),
        ({"trainer__group_size": -1}, ["trainer.group_size is -1"]),
        ({"trainer__group_size": 1}, ["trainer.group_size is 1", "advantage"]),
        ({"trainer__eval_samples": 0}, ["trainer.eval_samples is 0"]),
        ({"data__name": "dataset"}, ["data.name is 'dataset'", "data=dataset"]),
        ({"data__min_terms": 2}, ["data.min_terms is 2"]),
        ({"data__eval_prompts": 0}, ["data.eval_prompts is 0", "held-out prompts"]),
        ({"reward__name": "model"}, ["reward.name is 'model'", "reward=model"]),
        ({"reward__name": "bleu"}, ["reward.name is 'bleu'", "exact, function, math_verify, model"]),
        ({"objective__refill_rounds": 2}, ["objective.refill_rounds is 2", "objective.drop_uniform_groups=false"]),
        ({"trainer__mini_batches": 0}, ["trainer.mini_batches is 0"]),
        ({"trainer__micro_batch_size": 0}, ["trainer.micro_batch_size is 0"]),
        ({"trainer__mini_batches": 3}, ["trainer.prompts_per_step (16)", "trainer.mini_batches (3)"]),
        ({"objective__name": "a2c"}, ["objective.name is 'a2c'", "minirl, ppo, sapo, sequence, sft"]),
        ({"init": config.CheckpointInit()}, ["init.checkpoint is empty", "init=random or init=merge"]),
        ({"init": config.MergeInit()}, ["merge.output is empty"]),
        ({"init": config.MergeInit(), "merge": config.Merge(output="o")}, ["merge.pretrained is empty"]),
        ({"init": config.MergeInit(), "merge__dry_run": True}, ["merge.dry_run=true", "init=merge"]),
        ({"init": config.MergeInit(), "merge__sweep": [0.1]}, ["merge.sweep", "init=merge"]),
        (
            {"init": config.MergeInit(), "merge": MERGE, "trainer__save": "./a/../b"},
            ["trainer.save and merge.output are both", "/b"],
        ),
        ({"trainer__tokens_per_micro_batch": -8}, ["trainer.tokens_per_micro_batch is -8"]),
        (
            {"trainer__tokens_per_micro_batch": 257, "parallel__tensor": 2},
            ["trainer.tokens_per_micro_batch (257)", "parallel.tensor (2)"],
        ),
        (
            {"trainer__tokens_per_micro_batch": 64, "rollout__max_new_tokens": 64},
            ["rollout.max_new_tokens (64)", "no room for a prompt in trainer.tokens_per_micro_batch (64)"],
        ),
        (
            {"trainer__tokens_per_micro_batch": 64, "objective": config.Sft()},
            ["trainer.tokens_per_micro_batch is for rollouts", "supervised.length"],
        ),
        (
            {"supervised__load_balancing": "aux_loss", "supervised__aux_loss_coeff": 0.01},
            ["supervised.load_balancing=aux_loss is for objective=sft", "no part of the objective"],
        ),
        ({"supervised__z_loss_coeff": 0.01}, ["supervised.z_loss_coeff is for objective=sft"]),
        (
            {"supervised__load_balancing": "aux_loss", "objective": config.Sft()},
            ["supervised.load_balancing=aux_loss has no effect", "supervised.aux_loss_coeff is 0"],
        ),
        (
            {"supervised__aux_loss_coeff": 0.01, "objective": config.Sft()},
            ["supervised.aux_loss_coeff is 0.01", "supervised.load_balancing=none", "global_aux_loss"],
        ),
        ({"rollout__max_new_tokens": 256}, ["rollout.max_new_tokens (256)", "model.max_position_embeddings (256)"]),
        ({"env": TOY}, ["env=class continues chats", "data=arithmetic"]),
        ({"env": config.UserEnvironment()}, ["env.environment is ''", "module:Class"]),
        ({"env": config.UserEnvironment(environment="a:B", max_turns=0)}, ["env.max_turns is 0"]),
        ({"env": config.UserEnvironment(name="judge")}, ["env.name is 'judge'", "none, calculator, class, python"]),
        ({"env": config.UserEnvironment(name="none")}, ["env.name is 'none'", "choose with env=none"]),
        ({"env": TOY, "objective": config.Sft(), "reward": config.Exact()}, ["objective=sft has none"]),
        (
            {"env": TOY, **CHATS, "reward": config.RewardModel(url="http://127.0.0.1:1")},
            ["reward.send is text", "reward.send=chat"],
        ),
        (
            {"env": config.UserEnvironment(environment="a:B", max_turn_tokens=65), **CHATS},
            ["env.max_turn_tokens (65)", "rollout.max_new_tokens (64)"],
        ),
        ({"reward": config.EnvironmentReward()}, ["reward=environment", "env=none"]),
    ],
)
def test_a_run_that_contradicts_itself_is_refused_by_name(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        validate_settings(changed(**values))
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"reward": config.MathVerify()}, r"pip install .megatron-bai\[math\]"),
        ({"monitor__wandb": "x"}, "pip install wandb"),
    ],
)
def test_a_package_that_is_missing_is_named_before_any_work(
    values: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run. What its settings say, for `plan`, is valid without."""
    monkeypatch.setattr(backend, "init_backend", lambda *args: pytest.fail("the run was started"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("megatron_bai.monitor.loggers.find_spec", lambda name: None)
    validate_settings(changed(**values))
    with pytest.raises(UserError, match=named), session.open_session(changed(**values)):
        pass


def test_supervised_training_needs_no_rewards_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_packages(changed(reward=config.MathVerify(), objective=config.Sft()))


def test_supervised_training_does_not_ask_for_rollouts_settings() -> None:
    settings = changed(trainer__group_size=1, trainer__mini_batches=3)
    settings.objective = config.Sft()
    validate_settings(settings)


def test_a_critic_needs_no_groups() -> None:
    settings = changed(trainer__group_size=1)
    settings.objective = config.Ppo()
    validate_settings(settings)


@pytest.mark.parametrize(
    ("model", "parallel", "world", "named"),
    [
        ({"num_attention_heads": 3}, {}, 1, ["model.num_attention_heads (3)", "model.num_query_groups (2)"]),
        ({}, {"tensor": 4, "sequence": True}, 4, ["model.num_query_groups (2)", "parallel.tensor (4)"]),
        ({"vocab_size": 65}, {"tensor": 2, "sequence": True}, 2, ["model.vocab_size (65)", "parallel.tensor (2)"]),
        ({}, {"expert": 3}, 3, ["model.num_experts (8)", "parallel.expert (3)"]),
        ({}, {"pipeline": 3}, 3, ["model.num_layers (4)", "parallel.pipeline (3)"]),
        ({}, {"tensor": 2, "sequence": True}, 1, ["processes (1)", "parallel.tensor × parallel.pipeline (2)"]),
        ({}, {"expert": 2, "pipeline": 2}, 2, ["processes (2)", "parallel.expert × parallel.pipeline (4)"]),
        ({}, {"pipeline": 2, "virtual_pipeline": 3}, 2, ["parallel.pipeline × parallel.virtual_pipeline (6)"]),
        ({}, {"virtual_pipeline": 2}, 1, ["parallel.virtual_pipeline > 1 needs parallel.pipeline > 1"]),
        ({}, {"virtual_pipeline": 0}, 1, ["parallel.virtual_pipeline is 0"]),
        ({}, {"recompute": "some"}, 1, ["parallel.recompute is 'some'", "none, selective, moe or full"]),
        ({"moe_topk": 9}, {}, 1, ["model.moe_topk (9)", "model.num_experts (8)"]),
        ({}, {"tensor": 0}, 1, ["parallel.tensor is 0"]),
        ({}, {"tensor": 2}, 2, ["parallel.sequence=true"]),
        ({}, {"sequence": True}, 1, ["parallel.sequence=true needs parallel.tensor > 1"]),
        ({}, {"dispatcher": "flex"}, 1, ["parallel.dispatcher is 'flex'", "alltoall or allgather"]),
    ],
)
def test_a_layout_that_cannot_be_built_is_refused_by_name(
    model: dict[str, Any], parallel: dict[str, Any], world: int, named: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        build.validate_layout(config.Model(**MODEL | model), config.Parallel(**parallel), world)
    assert all(part in str(error.value) for part in named), error.value


def test_an_interleaved_schedule_needs_micro_batches_for_every_stage() -> None:
    interleaved = config.Parallel(pipeline=2, virtual_pipeline=2)
    build.validate_micro_batches(interleaved, 4)
    build.validate_micro_batches(config.Parallel(pipeline=2), 1)
    with pytest.raises(UserError, match=r"3 micro-batches .* parallel.pipeline \(2\)"):
        build.validate_micro_batches(interleaved, 3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (config.Backend(kind="tpu"), "backend.kind is 'tpu'"),
        (config.Backend(kind="cpu", dtype="float16"), "backend.dtype is 'float16'"),
    ],
)
def test_an_unknown_backend_is_refused_by_name(settings: config.Backend, named: str) -> None:
    with pytest.raises(UserError, match=named):
        backend.select_device(settings)


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="backend.kind is cuda"):
        backend.select_device(config.Backend(kind="cuda"))
    assert backend.select_device(config.Backend(kind="auto")).kind == "cpu"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"learning_rate": -1.0}, "trainer.learning_rate is -1"),
        ({"weight_decay": float("nan")}, "trainer.weight_decay is nan"),
        ({"decay": "cosin"}, "trainer.decay is 'cosin': choose constant, linear, cosine or inverse"),
        ({"min_learning_rate": 1e-5}, "constant never falls"),
        ({"decay": "linear", "min_learning_rate": 1.0}, r"min_learning_rate \(1.0\) is above trainer.learning_rate"),
    ],
)
def test_schedules_that_cannot_be_followed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        lr_schedule.validate(config.Config(trainer=config.Trainer(**changes)))


def test_a_key_that_cannot_be_read_is_refused_before_anything_begins(tmp_path: Path) -> None:
    """Unlike `validate`, which plans and presets go through where no key is."""
    settings = changed(rollout__host="0.0.0.0", rollout__api_key_file=str(tmp_path / "key"))
    validate_settings(settings)
    with pytest.raises(UserError, match="rollout.api_key_file=.*/key cannot be read"), session.open_session(settings):
        raise AssertionError
