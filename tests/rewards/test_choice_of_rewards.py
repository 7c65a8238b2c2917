"""Data and rewards are chosen by Hydra alone, and a reward from outside like those that are built in."""

import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf
from outside import DOCS, install

from megatron_bai import config, rewards
from megatron_bai.data import task_factory
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rewards import Item, Score


def chosen(*overrides: str) -> config.Config:
    """The settings as `train` gets them."""
    config.register_schema()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())):
        return OmegaConf.to_object(hydra.compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], config.Exact()),
        (["experiment=demo"], config.Exact()),
        (["reward=math_verify", "reward.timeout_s=3"], config.MathVerify(timeout_s=3.0)),
        (
            ["reward=function", "reward.function=a.b:c", "reward.workers=8"],
            config.Function(function="a.b:c", workers=8),
        ),
        (
            ["reward=model", "reward.url=http://localhost", "reward.label=2"],
            config.RewardModel(url="http://localhost", label=2),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_overrides_choose_and_set_rewards(overrides: list[str], wanted: config.Reward) -> None:
    found = chosen(*overrides).reward
    assert type(found) is type(wanted) and found == wanted
    assert rewards.resolve_reward(found).settings is type(wanted)


def test_overrides_choose_and_set_data() -> None:
    assert chosen().data == config.Arithmetic() and chosen("experiment=demo").data == config.Arithmetic()
    found = chosen("data=dataset", "data.train=t.jsonl", "+data.template_options.enable_thinking=false").data
    assert found == config.Dataset(train="t.jsonl", template_options={"enable_thinking": False})
    task_factory.validate_data(found, False, "actor")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (config.Function(), "reward.function is ''"),
        (config.Function(function="a.b.c"), "reward.function is 'a.b.c'"),
        (config.Function(function="a:b", timeout_s=0.0), "reward.timeout_s is 0"),
        (config.Function(function="a:b", timeout_s=float("inf")), "reward.timeout_s is inf"),
        (config.Function(function="a:b", workers=0), "reward.workers is 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(settings: config.Reward, named: str) -> None:
    with pytest.raises(UserError, match=named):
        rewards.resolve_reward(settings)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rewards.resolve_reward(config.MathVerify())  # settings that `plan` takes
    with pytest.raises(UserError, match=r"reward=math_verify needs .* pip install 'megatron-bai\[math\]'"):
        rewards.require(config.MathVerify())
    with (
        pytest.raises(UserError, match=r"reward=math_verify needs"),
        rewards.open_scorer(config.MathVerify(), None, Path()),
    ):
        pass


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match="a reward 'exact' already"):
        rewards.register(rewards.Reward(config.Exact, lambda settings, task, log: None))


def test_the_documented_package_brings_its_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the entry point: chosen on the command line, and scored in worker processes."""
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path / "site", "data.md")), prepend=":")
    script = """
import sys
from pathlib import Path
from megatron_bai import config, rewards
config.register_schema()
from types import SimpleNamespace as Prompt
settings = rewards._REGISTRY["contains"].settings(bonus=0.5, workers=1)
with rewards.open_scorer(settings, None, Path("reward.log")) as scorer:
    prompt = Prompt(text="1+2", answer="3", extra={})
    print([score.value for score in scorer([rewards.Item(prompt, text, []) for text in ("3", "4")])])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[1.5, 0.5]\n"), done.stderr
    command = [sys.executable, "-m", "megatron_bai", "train", "reward=contains", "reward.bonus=2", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "name: contains" in done.stdout and "bonus: 2.0" in done.stdout, done.stderr


def test_the_documented_function_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (DOCS / "data.md").read_text().partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    settings = config.Function(function="my_rewards:shorter", workers=1)
    items = [Item(Prompt([], "7+8", "15", extra={"source": source}), "it is 15", []) for source in ("", "unchecked")]
    with rewards.open_scorer(settings, None, tmp_path / "reward.log") as scorer:
        found = scorer(items)
    assert found == [Score(pytest.approx(0.92)), Score(None, "ValueError: the answer is unknown")]
