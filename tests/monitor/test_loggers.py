"""Loggers write real files, and read back what was logged; what fails during a run is left out; secrets are refused."""

import json
from pathlib import Path

import pytest
from monitor.kept import NASTY, kept

from megatron_bai import config
from megatron_bai.config.limits import validate_ranges
from megatron_bai.errors import UserError
from megatron_bai.monitor import loggers
from megatron_bai.monitor.detectors.alarm import Alarm
from megatron_bai.monitor.loggers import Loggers, validate
from megatron_bai.monitor.run_log import RunLog
from megatron_bai.utils import terminal_logging

ALARM = Alarm(2, "entropy_collapse", "entropy", 7.0, "entropy fell", "read the paper", 1, "warn", {"level": 0.1})
RECORDS = [
    {
        "step": 1,
        "reward_mean": 0.5,
        "route_mismatch/0": 0.25,
        "route_coverage": None,
        "kl_k3": float("nan"),
        "no_float": 10**400,
    },
    {"step": 2, "reward_mean": 0.75, "route_mismatch/0": 0.5, "alarms": [ALARM.json()]},
]
NUMBERS = {"reward_mean": [(1, 0.5), (2, 0.75)], "route_mismatch/0": [(1, 0.25), (2, 0.5)]}


@pytest.fixture(autouse=True)
def terminal() -> None:
    terminal_logging.setup()


def settings(**monitor: object) -> config.Config:
    return config.Config(run=config.Run(name="here"), monitor=config.Monitor(**monitor))


def logged(directory: Path, **monitor: object) -> None:
    open_ = Loggers(directory, settings(**monitor))
    for record in RECORDS:
        open_.log(record)
    open_.close()


def test_tensorboard_has_the_numbers_of_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == sorted(NUMBERS)
    for name, wanted in NUMBERS.items():
        assert [(event.step, event.value) for event in found.Scalars(name)] == wanted


TEXTS = [kept(1, "7+8=15"), kept(1, NASTY["surrogate"] + NASTY["terminal"] + NASTY["script"], kept_as=["worst"])]


def test_tensorboard_shows_a_sample_of_each_kind_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    open_ = Loggers(tmp_path, settings())
    open_.log(RECORDS[0], TEXTS)
    open_.log(RECORDS[1])
    open_.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = {f"samples/train/{name}/text_summary" for name in ("best", "worst")}
    assert set(found.Tags()["tensors"]) == tags
    (event,) = found.Tensors("samples/train/worst/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 1 and "a\\ud800b\\x1b" in text and "<script>" in text
    assert all(line.startswith("    ") for line in text.splitlines())  # Markdown leaves such lines alone


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path)
    again = Loggers(tmp_path, settings())
    again.log({"step": 2, "reward_mean": 0.125})
    again.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("reward_mean")] == [(1, 0.5), (2, 0.125)]


def test_wandb_offline_keeps_a_run_with_its_settings(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logged(tmp_path, tensorboard=False, wandb="project", wandb_mode="offline")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    for word in (b"reward_mean", b"route_mismatch/0", b"0.75", b"monitor.bucket", b"here"):
        assert word in kept, word


def test_wandb_and_mlflow_take_texts(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    wanted = dict(tensorboard=False, wandb="project", wandb_mode="offline", mlflow="experiment")
    open_ = Loggers(tmp_path, settings(**wanted))
    open_.log(RECORDS[0], TEXTS)
    assert set(open_._open) == {"wandb", "mlflow"}  # neither failed
    open_.close()
    page = next((tmp_path / "wandb").rglob("*.html")).read_text()
    assert "&lt;" in page and "<script>alert" not in page
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert Path("mlruns").exists() is False and (tmp_path / "mlflow-artifacts").is_dir()
    (path,) = (entry.path for entry in client.list_artifacts(run.info.run_id, "samples/train/best"))
    assert path == "samples/train/best/step-00001.txt"


def test_mlflow_keeps_a_run_with_its_settings(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    logged(tmp_path, tensorboard=False, mlflow="experiment")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert run.info.run_name == "here" and run.info.status == "FINISHED" and run.data.params["monitor.bucket"] == "100"
    for name, wanted in NUMBERS.items():
        assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)] == wanted


def test_a_logger_that_fails_is_named_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the directory should be")
    with RunLog(tmp_path, settings(), 2, active=True) as progress:
        for record in RECORDS:
            progress.log_step(record, ("reward_mean",))
    said = capsys.readouterr().err
    assert said.count("tensorboard failed and is not used any more") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward_mean"] for line in lines] == [0.5, 0.75]


def test_an_alarm_is_on_the_terminal_and_in_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, settings(tensorboard=False), 2, active=True) as progress:
        for record in RECORDS:
            progress.log_step(record, ("reward_mean",))
    said = capsys.readouterr()
    assert said.out.splitlines()[1].startswith("[rank 0] step    2/2  reward_mean 0.75")
    assert said.err == "[rank 0] alarm: entropy collapse: entropy fell, 7 standard errors; read the paper\n"
    assert Alarm(**json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["alarms"][0]) == ALARM


def test_what_is_not_installed_is_refused_if_asked_for_and_said_if_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=f"monitor.{name} is set, but {name} is not installed"):
            loggers.require(settings(**{name: "x"}).monitor)
        validate(settings(**{name: "x"}))  # which `plan` takes
    loggers.require(settings().monitor)
    logged(tmp_path)
    assert "tensorboard is not installed" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "secret", ["https://me:pass@host/mlflow", "postgresql://u:p@h/db", "hf_" + "a" * 30, "sk-" + "b" * 24]
)
def test_a_setting_with_a_secret_is_refused_without_repeating_it(secret: str) -> None:
    with pytest.raises(UserError, match="monitor.mlflow_uri holds a secret") as error:
        validate(settings(mlflow_uri=secret))
    assert secret not in str(error.value)


@pytest.mark.parametrize("plain", ["https://host:5000/mlflow", "sqlite:////runs/a.db", "runs/sk-1", "user@host"])
def test_what_is_no_secret_is_none(plain: str) -> None:
    validate(settings(mlflow_uri=plain))


def test_an_unknown_mode_of_wandb_is_refused() -> None:
    with pytest.raises(UserError, match="monitor.wandb_mode is 'of'"):
        validate_ranges(settings(wandb_mode="of"))
