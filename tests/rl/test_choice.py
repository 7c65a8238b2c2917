"""An objective is chosen and set by Hydra alone, and one from outside like those that are built in."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from outside import install

from megatron_bai import config
from megatron_bai.cli import entry_point
from megatron_bai.cli.help_text import verb_help
from megatron_bai.cli.verbs import VERBS
from megatron_bai.errors import UserError
from megatron_bai.rl import objectives
from megatron_bai.rl.objectives import Objective, minirl


def chosen(*overrides: str) -> config.Objective:
    """The objective's settings as `train` gets them."""
    config.register_schema()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())):
        return OmegaConf.to_object(hydra.compose("config", overrides=list(overrides))).objective


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], config.Minirl()),
        (["experiment=demo"], config.Minirl()),
        (["experiment=demo_instruct"], config.Sft()),
        (["objective=sft"], config.Sft()),
        (["objective.length_norm=true"], config.Minirl(length_norm=True)),
        (["objective.train_infer_is=false", "objective.clip=false"], config.Minirl(train_infer_is=False, clip=False)),
        (["objective=sequence"], config.Sequence()),
        (["objective=sequence", "objective.is_max=10"], config.Sequence(is_max=10.0)),
        (["objective=grpo", "objective.clip_high=0.28"], config.Grpo(clip_high=0.28)),
        (["objective=grpo", "objective.kl_penalty=0.04"], config.Grpo(kl_penalty=0.04)),
        (["objective=tis"], config.Grpo(correction="token_truncate")),
        (["objective=tis", "objective.correction=sequence_mask"], config.Grpo(correction="sequence_mask")),
        (["objective=dapo", "objective.token_mean=prompt"], config.Dapo(token_mean="prompt")),
        (["objective=cispo"], config.Cispo()),
        (["objective=gspo", "experiment=demo"], config.Gspo()),
        (["objective=dppo"], config.Dppo()),
        (["objective=dppo", "objective.divergence=kl", "objective.delta=0.1"], config.Dppo(divergence="kl", delta=0.1)),
        (["objective=drpo"], config.Drpo()),
        (["objective=sapo", "objective.correction=token_kpop"], config.Sapo(correction="token_kpop")),
        (["objective=gmpo", "objective.clip_low=0.3"], config.Gmpo(clip_low=0.3)),
        (
            ["objective=icepop"],
            config.Grpo(correction="token_mask", correction_min=0.5, correction_max=5.0),
        ),
        (["objective=kpop"], config.Grpo(correction="token_kpop")),
        (["objective=gmpo", "objective.router_shift=true"], config.Gmpo(router_shift=True)),
        (
            ["objective.router_shift=true", "objective.router_shift_min=0"],
            config.Minirl(router_shift=True, router_shift_min=0.0),
        ),
        (["objective=ppo", "objective.value_clip=inf"], config.Ppo(value_clip=float("inf"))),
        (["objective=ppo", "objective.critic_learning_rate=1e-6"], config.Ppo(critic_learning_rate=1e-6)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_overrides_choose_and_set(overrides: list[str], wanted: config.Objective) -> None:
    found = chosen(*overrides)
    assert type(found) is type(wanted) and found == wanted
    assert objectives.check(found).settings is type(wanted)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["objective=reinforce"], ["objective/reinforce"]),
        (["objective=gspo", "objective.is_max=5"], ["objective.is_max", "Key 'is_max' not in 'Gspo'"]),
        (["objective=sft", "objective.clip_low=0.1"], ["objective.clip_low", "not in 'Sft'"]),
        (["objective.name=grpo"], ["objective.name is 'grpo'", "those of 'minirl'", "objective=grpo"]),
        (["objective.name=sft"], ["objective.name is 'sft'", "those of 'minirl'", "objective=sft"]),
        (["objective.name=none"], ["objective.name is 'none'", "cispo, dapo"]),
        (["objective.clip=false", "objective.clip_high=0.5"], ["objective.clip_high is 0.5", "objective.clip=false"]),
        (["objective=grpo", "objective.correction_max=3"], ["objective.correction_max is 3", "correction=none"]),
        (["objective.kl_estimator=k2"], ["objective.kl_estimator is k2", "objective.kl_penalty=0"]),
        (["objective.kl_penalty=0.1", "objective.kl_estimator=k4"], ["objective.kl_estimator is 'k4'", "k1, k2 or k3"]),
        (["objective.advantage=gae"], ["objective.advantage is 'gae'", "centred, normalised or leave_one_out"]),
        (["objective.gamma=1"], ["objective.gamma", "Key 'gamma' not in 'Minirl'"]),
        (["objective=ppo", "objective.advantage=centred"], ["objective.advantage is 'centred'", "choose gae"]),
        (["objective=ppo", "objective.token_mean=prompt"], ["objective.token_mean", "not in 'Ppo'"]),
        (["objective=ppo", "objective.gamma=1.01"], ["objective.gamma is 1.01", "from 0 to 1"]),
        (["objective=ppo", "objective.lam=-0.1"], ["objective.lam is -0.1", "from 0 to 1"]),
        (["objective=ppo", "objective.value_clip=0"], ["objective.value_clip is 0", "above 0"]),
        (["objective=ppo", "objective.critic_learning_rate=0"], ["objective.critic_learning_rate is 0", "above 0"]),
        (["objective=ppo", "objective.critic_warmup=-1"], ["objective.critic_warmup is -1", "at least 0"]),
        (["objective=ppo", "objective.critic_warmup=11"], ["objective.critic_warmup (11)", "trainer.steps (10)"]),
        (
            ["objective=ppo", "objective.critic_save=c", "objective.critic_checkpoint=c"],
            ["objective.critic_save and objective.critic_checkpoint are both c"],
        ),
        (
            ["objective=ppo", "trainer.save=${run.dir}/c", "objective.critic_save=${run.dir}/c"],
            ["objective.critic_save and trainer.save are both runs/default/c"],
        ),
        (
            ["objective=ppo", "objective.drop_uniform_groups=true", "trainer.group_size=1"],
            ["objective.drop_uniform_groups", "trainer.group_size=1 drops every sample"],
        ),
        (["objective=dapo", "objective.token_mean=group"], ["objective.token_mean is 'group'", "batch or prompt"]),
        (["objective=tis", "objective.correction_min=0.5"], ["objective.correction_min is 0.5", "=token_truncate"]),
        (["objective=icepop", "objective.correction_min=6"], ["objective.correction_min (6", "correction_max (5"]),
        (["objective=kpop", "objective.correction_max=3"], ["objective.correction_max is 3", "correction=token_kpop"]),
        (["objective=icepop", "objective.correction_kl=1"], ["objective.correction_kl is 1", "correction=token_mask"]),
        (["objective=grpo", "objective.correction_kl=1"], ["objective.correction_kl is 1", "correction=none"]),
        (["objective.router_shift_min=0.5"], ["objective.router_shift_min is 0.5", "objective.router_shift=false"]),
        (["objective.router_shift=true", "objective.router_shift_min=1.1"], ["router_shift_min is 1.1", "from 0 to 1"]),
        (["objective=sft", "objective.router_shift=true"], ["objective.router_shift", "not in 'Sft'"]),
        (["trainer.freeze=[gate]"], ["trainer.freeze[0] is 'gate'", "router or shared_experts"]),
        (["trainer.freeze=[shared_experts]"], ["trainer.freeze names shared_experts", "the model has none"]),
        (["objective=dppo", "objective.divergence=js"], ["objective.divergence is 'js'", "tv or kl"]),
        (["objective=drpo", "objective.delta=0"], ["objective.delta is 0", "above 0"]),
        (["objective=sapo", "objective.tau_positive=0"], ["objective.tau_positive is 0", "above 0"]),
        (["objective=tis", "objective.correction=truncate"], ["objective.correction is 'truncate'", "token_mask"]),
        (["objective=tis", "objective.correction_max=0"], ["objective.correction_max is 0", "above 0"]),
        (["objective.clip_low=1.5"], ["objective.clip_low is 1.5", "from 0 to 1"]),
        (["objective.clip_high=-0.1"], ["objective.clip_high is -0.1", "at least 0"]),
        (["objective.is_max=nan"], ["objective.is_max is nan"]),
        (["objective.entropy_bonus=-1"], ["objective.entropy_bonus is -1"]),
        (["objective.clip=maybe"], ["objective.clip", "maybe"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_contradicts_itself_or_is_never_read_is_refused_by_name(
    overrides: list[str],
    named: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megatron-bai", "train", *overrides])
    monkeypatch.setattr(entry_point.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as end:
        entry_point.main()
    out, err = capfd.readouterr()
    assert (end.value.code, out, len(err.splitlines())) == (2, "", 1), err
    assert all(part in err for part in named), err
    assert list(tmp_path.iterdir()) == []


def test_help_has_the_settings_of_every_objective() -> None:
    text = verb_help("train", VERBS["train"])
    for kind in (module.OBJECTIVE.settings for module in objectives._BUILT_IN):
        assert f'objective.name="{kind.name}"' in text
    assert "objective.is_max=inf" in text and text.count("objective.kl_penalty=") == 1


@dataclass
class Mine(config.Minirl):
    name: str = "mine"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(objectives, "_REGISTRY", dict(objectives._REGISTRY))
    yield
    ConfigStore.instance().repo["objective"].pop("mine.yaml", None)


def test_a_registered_objective_is_chosen_by_its_settings_name(registry: None) -> None:
    mine = Objective(minirl.loss, Mine, minirl.mean, minirl.check)
    objectives.register(mine)
    objectives.register(mine)  # importing a module twice does no harm
    assert objectives.check(chosen("objective=mine", "objective.is_max=2")) is mine


def test_a_name_that_is_taken_is_refused(registry: None) -> None:
    with pytest.raises(UserError, match="an objective 'grpo' already"):
        objectives.register(Objective(minirl.loss, config.Grpo, minirl.mean))


def test_settings_without_those_of_a_policy_are_refused(registry: None) -> None:
    @dataclass
    class Bare(config.Objective):
        name: str = "bare"

    with pytest.raises(UserError, match="derive its .*Bare from Policy"):
        objectives.register(Objective(minirl.loss, Bare, minirl.mean))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip leaves it, whose entry point names the module that registers."""
    place = install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(place), prepend=":")
    return place


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_bai", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.distributed
def test_an_installed_package_brings_its_objective(installed: Path, tmp_path: Path) -> None:
    done = command("train", "objective=reinforce", "objective.scale=2", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0 and "name: reinforce" in done.stdout and "scale: 2.0" in done.stdout, done.stderr
    done = command("train", "objective=reinforce", "objective.scala=2", cwd=tmp_path)
    assert done.returncode == 2 and "no setting objective.scala: did you mean objective.scale?" in done.stderr


def test_a_package_that_cannot_be_loaded_is_named(installed: Path, tmp_path: Path) -> None:
    (installed / "outside.py").write_text("import nothing_of_this_name")
    done = command("train", "--cfg", "job", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "the objective plugin reinforce = outside cannot be loaded" in done.stderr
    assert "nothing_of_this_name" in done.stderr


def test_the_documented_name_of_the_loss_remains() -> None:
    assert objectives.total is objectives.batch_loss and {"total", "batch_loss"} <= set(objectives.__all__)
