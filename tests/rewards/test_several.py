"""A weighted sum of rewards: each part is known, one that fails fails the sample, settings are those of the parts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bai import config, rewards
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rewards import Item, Score, several
from megatron_bai.rewards.reward import SampleScorer

TASK = SimpleNamespace(reward=lambda prompt, ids: float(ids[0]))
PARTS = {
    "right": {"reward": "exact", "weight": 2},
    "calls": {"reward": "environment", "weight": -0.5},
    "length": {"reward": "function", "function": "functions:misbehave", "timeout_s": 60},
}


def item(response: str = "fine", right: int = 1, environment: float | None = 4.0) -> Item:
    return Item(Prompt([1], "p", ""), response, [right], environment_reward=environment)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


def test_the_sum_and_its_parts(tmp_path: Path) -> None:
    opened: Any = rewards.open_scorer(config.Several(parts=PARTS), TASK, tmp_path / "log")
    with opened as scorer:
        first, failed, last = scorer([item(), item("raise"), item(right=0, environment=None)])
        assert isinstance(scorer, SampleScorer) and scorer.submit(item()).result(60) == first
    assert first == Score(1.0, turn_weight=-0.5, parts={"right": 1.0, "calls": 4.0, "length": 1.0})
    assert failed == Score(None, "part length: ZeroDivisionError: division by zero")
    assert last == Score(1.0, turn_weight=-0.5, parts={"right": 0.0, "calls": 0.0, "length": 1.0})


def test_a_part_of_lists_alone_is_called_with_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Ranked(config.Reward):
        pass

    calls: list[int] = []

    class Opened:
        def __enter__(self) -> Any:
            return lambda items: calls.append(len(items)) or [Score(float(i)) for i in range(len(items))]

        def __exit__(self, *error: object) -> None:
            pass

    kind = rewards.Reward(Ranked, lambda settings, task, log: Opened())
    monkeypatch.setitem(rewards._REGISTRY, "ranked", kind)
    monkeypatch.setattr(several, "make_parts", lambda settings: {
        "rank": several.Part(Ranked("ranked"), 1.0), "right": several.Part(config.Exact(), 1.0)
    })  # fmt: skip
    with rewards.open_scorer(config.Several(), TASK, tmp_path / "log") as scorer:
        assert not hasattr(scorer, "submit")
        assert [score.value for score in scorer([item(), item(), item()])] == [1.0, 2.0, 3.0]
    assert calls == [3]


def test_a_value_from_outside_that_float32_cannot_hold_fails_the_sample() -> None:
    parts = {"huge": several.Part(config.Exact(), 1.0)}
    assert "part huge: it is 1e+39, which is too large" in several.combine(parts, [Score(1e39)]).failure


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({}, "reward.parts is empty"),
        ({"a": {}}, "reward.parts.a has no reward"),
        ({"a": 1}, "reward.parts.a has no reward"),
        ({"A-b": {"reward": "exact"}}, "reward.parts.A-b: the name of a part"),
        ({"a": {"reward": "exakt"}}, "reward.parts.a.reward is 'exakt': .* did you mean exact"),
        ({"a": {"reward": "several"}}, "reward.parts.a.reward is 'several'"),
        ({"a": {"reward": "exact", "weight": 0}}, "reward.parts.a.weight is 0: it must be a number but 0"),
        ({"a": {"reward": "exact", "weight": float("nan")}}, "reward.parts.a.weight is nan"),
        ({"a": {"reward": "exact", "weight": 1e7}}, "reward.parts.a.weight is 10000000.0"),
        ({"a": {"reward": "exact", "weight": "1"}}, "reward.parts.a.weight is '1'"),
        ({"a": {"reward": "exact", "weight": True}}, "reward.parts.a.weight is True"),
        ({"a": {"reward": "function", "funktion": "a:b"}}, "reward.parts.a has no setting 'funktion': .* function"),
        ({"a": {"reward": "function", "timeout_s": "long"}}, "reward.parts.a.timeout_s is 'long'"),
        ({"a": {"reward": "function", "function": "a:b", "workers": 0}}, "reward.parts.a.workers is 0"),
        ({"a": {"reward": "function", "function": "ab"}}, "reward.function is 'ab'"),
        ({"a": {"reward": "exact", "name": "x"}}, "reward.parts.a has no setting 'name'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(parts: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        rewards.resolve_reward(config.Several(parts=parts))
