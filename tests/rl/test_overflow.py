"""Log-ratios whose exponential no float holds: flat losses stay finite with a gradient of 0, others become infinite.

A run stops at a gradient that is not finite. So none may be where the formula's is finite, and none may be made finite
where the formula's is beyond the type. The formulas are those of `papers.py`, with numbers of any exponent.
"""

from dataclasses import replace

import mpmath
import numpy as np
import papers
import pytest
import torch
from policies import SETTINGS, Case, loss, name

from megatron_bai import config
from megatron_bai.monitor.metrics.discrepancy import add_discrepancy
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives
from megatron_bai.rl.objectives.ppo import critic_loss

INF = float("inf")
UNLIMITED = [  # a weight or a ratio that nothing truncates
    config.Minirl(is_max=INF, clip=False),
    config.Minirl(is_max=INF),
    config.Grpo(correction="token_truncate", correction_max=INF),
    config.Gspo(correction="sequence_truncate", correction_max=INF),
    config.Cispo(clip_high=INF, correction="token_mask"),
    config.Grpo(clip_low=1.0, clip_high=INF, correction="sequence_mask"),
    config.Gmpo(clip_high=INF, correction="token_kpop"),
    config.Dppo(delta=INF),
]
SHARES = ("clip_fraction", "clip_fraction_positive", "clip_fraction_negative", "corrected_fraction", "ess")
each = pytest.mark.parametrize("settings", [*SETTINGS, *UNLIMITED], ids=name)
each_distance = pytest.mark.parametrize("distance", [120.0, -120.0, 1000.0, -1000.0])


def far(distance: float, which: str, dtype: type, garbage: float = 0.0) -> Case:
    """Nine responses of three tokens, A of each sign; in six the middle token is `distance` from `which`."""
    random = np.random.default_rng(3)
    shape = (9, 4)
    new = -random.exponential(1.0, shape) - 0.1
    old, infer, reference = (new + random.normal(0, 0.1, shape) for _ in range(3))
    shift = np.zeros(shape)
    shift[3:, 1] = distance
    if which == "staleness":
        old -= shift
    if which in ("staleness", "discrepancy"):
        infer -= shift
    if which == "reference":
        reference += shift
    mask = np.ones(shape, dtype=bool)
    mask[:, 3] = False
    policies = (new, old, infer, reference)
    new, old, infer, reference = (np.where(mask, values, garbage).astype(dtype) for values in policies)
    advantages = np.array([1.3, 0.0, -0.7] * 3, dtype=dtype)
    moved = np.where(mask, np.abs(np.sin(np.arange(36.0).reshape(shape))), garbage).astype(dtype)
    return Case(new, old, infer, reference, advantages, mask, np.arange(9) // 3, np.ones(9, dtype=bool), moved)


def exact(case: Case, settings: config.Objective, monkeypatch: pytest.MonkeyPatch) -> papers.Answer:
    """The formula's loss and gradient; inf where a float64 holds them not."""
    monkeypatch.setattr(papers, "exp", lambda x: mpmath.exp(x if isinstance(x, mpmath.mpf) else float(x)))
    monkeypatch.setattr(papers, "log", mpmath.log)
    arrays = ("new", "old", "infer", "reference", "advantages", "shift")
    double = replace(case, **{key: getattr(case, key).astype(np.float64) for key in arrays})
    value, gradient = papers.FORMULAS[type(settings)](double, settings)
    return float(value), gradient


@each
@each_distance
@pytest.mark.parametrize("which", ["staleness", "discrepancy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_flat_stays_flat_and_what_is_infinite_is_not_hidden(
    settings: config.Objective, distance: float, which: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = far(distance, which, dtype)
    wanted, gradient = exact(case, settings, monkeypatch)
    found = loss(settings, case)
    limits = np.finfo(dtype)
    is_finite = np.abs(gradient) < limits.max
    np.testing.assert_array_equal(np.isfinite(found[1]), is_finite)
    # Rounding of a log-ratio of 1000 in float32 is 3e-5 of the ratio.
    rtol = 1e-3 if dtype is np.float32 else 1e-9
    np.testing.assert_allclose(found[1][is_finite], gradient[is_finite], rtol=rtol, atol=limits.tiny)
    assert not found[1][[1, 4, 7]].any(), "no advantage, no gradient"
    if is_finite.all():
        assert found[0] == pytest.approx(wanted, rel=rtol, abs=1e-6)
    else:
        assert not np.isfinite(found[0])


@each
@pytest.mark.parametrize("garbage", [float("nan"), INF, -INF, 1e30])
def test_far_tokens_beside_garbage_in_padding(settings: config.Policy, garbage: float) -> None:
    settings = replace(settings, kl_penalty=0.1, kl_estimator="k2")
    for distance in (120.0, -120.0):
        clean, found = (loss(settings, far(distance, "staleness", np.float32, g)) for g in (0.0, garbage))
        np.testing.assert_equal(found[:2], clean[:2])
        assert not found[1][:, 3].any() and found[2] == pytest.approx(clean[2], nan_ok=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_distance
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_penalty_far_from_the_reference(estimator: str, distance: float, dtype: type) -> None:
    """Its slope is 1, −x, 1 − eˣ: of a token beyond the type it is not finite, and the others keep theirs."""
    case, settings = far(distance, "reference", dtype), config.Dapo(kl_penalty=0.5, kl_estimator=estimator)
    added = loss(settings, case)[1] - loss(config.Dapo(), case)[1]
    x = (case.reference - case.new).astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = {"k1": np.ones_like(x), "k2": -x, "k3": 1 - np.exp(x)}[estimator] * 0.5 / case.mask.sum()
    wanted[~case.mask] = 0
    is_finite = np.abs(wanted) < np.finfo(dtype).max
    np.testing.assert_array_equal(np.isfinite(added), is_finite)
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype is np.float32 else {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(added[is_finite], wanted[is_finite], **tolerance)


@each
@each_distance
@pytest.mark.parametrize("which", ["staleness", "discrepancy"])
def test_a_metric_beyond_float64_is_infinite_and_spoils_no_other(
    settings: config.Objective, distance: float, which: str
) -> None:
    found = loss(settings, far(distance, which, np.float32))[2]
    assert not any(np.isnan(value) for value in found.values())
    for key in set(SHARES) & found.keys():
        assert 0 <= found[key] <= 1
    beyond = {key for key, value in found.items() if np.isinf(value)}
    assert all(key.endswith(("ratio_mean", "ratio_max", "weight_mean", "weight_max")) for key in beyond)
    far_share, own = 6 / 27, {"staleness": "staleness", "discrepancy": "discrepancy"}[which]
    assert found[own] == pytest.approx(distance * far_share, abs=0.2)
    if distance > 0:  # the weights are six equal ones and others that are nothing beside them
        assert found["ess"] == pytest.approx(far_share, rel=0.1)


@each_distance
def test_metrics_of_the_discrepancy_beyond_float64(distance: float) -> None:
    case, stats = far(distance, "discrepancy", np.float32, float("nan")), Stats()
    train, infer, mask = (torch.from_numpy(part) for part in (case.old, case.infer, case.mask))
    add_discrepancy(stats, "", train, infer, mask)
    found = stats.values()
    assert not any(np.isnan(value) for value in found.values())
    for threshold in ("2", "5"):
        assert found[f"f_{threshold}"] == pytest.approx(6 / 27)
    assert found["kl_k1"] == pytest.approx(-distance * 6 / 27, rel=0.01)
    assert found["kl_k3"] == (INF if distance == 1000 else pytest.approx(found["kl_k3"])) and found["kl_k3"] >= 0
    assert 0 < found["ess_discrepancy"] <= 1


def test_other_objectives_have_no_ratio_to_overflow() -> None:
    case = far(1000.0, "staleness", np.float32, float("nan"))
    logprobs = torch.from_numpy(case.new - 1000).requires_grad_()
    total, _ = objectives.batch_loss(objectives.get("sft"), config.Sft(), logprobs, case.batch())
    total.backward()
    assert torch.isfinite(total)
    assert torch.equal(logprobs.grad, -case.batch().mask.float())


@pytest.mark.parametrize("clip", [0.2, INF])
@pytest.mark.parametrize("garbage", [float("nan"), INF])
def test_a_critic_far_from_its_returns(clip: float, garbage: float) -> None:
    """A value that the limit holds has no gradient; one beyond the type has a loss of ∞; padding counts nowhere."""
    mask = torch.tensor([[True, True, True, False]])
    values = torch.tensor([[1e10, 0.1, 1e30, garbage]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.0, 0.0, garbage]]), torch.tensor([[2e10, 0.0, 0.0, garbage]])
    losses, stats = critic_loss(values, old, returns, mask, clip)
    losses.sum().backward()
    first = 0.0 if clip < INF else -1e10
    assert values.grad[0, [0, 1, 3]].tolist() == pytest.approx([first, 0.1, 0.0])
    assert losses[0, 2] == INF and torch.isfinite(losses[0, [0, 1, 3]]).all()
    assert stats.values()["value_clip_fraction"] == pytest.approx(1 / 3 if clip < INF else 0)
