"""Every objective's value and gradient against the formula of its paper (`papers.py`), in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import papers
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from policies import SETTINGS, dirty, drawn, loss, name, one_token

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.monitor.stats import Stats
from megatron_bai.rl import objectives
from megatron_bai.rl.batches.advantages import GroupRewards
from megatron_bai.rl.batches.batch import Batch
from megatron_bai.rl.objectives import aggregate

each = pytest.mark.parametrize("settings", SETTINGS, ids=name)


def same(found: tuple, wanted: papers.Answer) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-10, atol=1e-300)


@each
@examples(max_examples=40)
@given(b=st.integers(2, 7), length=st.integers(1, 9), seed=st.integers(0, 2**31), spread=st.sampled_from([0, 0.2, 4.0]))
def test_value_and_gradient_are_the_papers(
    settings: config.Objective, b: int, length: int, seed: int, spread: float
) -> None:
    case = drawn(b, length, seed, spread)
    same(loss(settings, case), papers.FORMULAS[type(settings)](case, settings))


@each
def test_samples_that_do_not_count_are_as_if_they_were_not_there(settings: config.Objective) -> None:
    case = drawn(9, 6, 5, 0.3)
    some = replace(case, in_loss=np.array([1, 1, 0, 0, 0, 0, 1, 0, 1], dtype=bool))
    found = loss(settings, some)
    same(found, papers.FORMULAS[type(settings)](some, settings))
    assert found[1].any() and not found[1][~some.in_loss].any()
    rest = replace(case, **{key: value[some.in_loss] for key, value in vars(case).items()})
    assert loss(settings, rest)[0] == pytest.approx(found[0], rel=1e-12)


@each
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_does_not_depend_on_the_cut_into_micro_batches(settings: config.Policy, micro: int) -> None:
    case = drawn(9, 6, 6, 0.3)  # groups of 3: a micro-batch of 2 or 4 cuts them
    settings = replace(settings, kl_penalty=0.3, entropy_bonus=0.2)
    entropy = torch.rand(9, 6, dtype=torch.float64)
    whole, parts = loss(settings, case, entropy), loss(settings, case, entropy, micro)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-12)
    assert parts[2] == pytest.approx(whole[2], rel=1e-12)


@each
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e4])
def test_whatever_padding_holds_changes_nothing(settings: config.Policy, garbage: float) -> None:
    settings = replace(settings, kl_penalty=0.3)
    case = drawn(5, 7, 3, 0.5)
    clean, found = loss(settings, case), loss(settings, dirty(case, garbage))
    assert found[0] == clean[0] and found[2] == clean[2]
    np.testing.assert_array_equal(found[1], clean[1])


@each
def test_nothing_to_learn_gives_nothing(settings: config.Objective) -> None:
    case = drawn(6, 5, 1, 0.5)
    empty = replace(case, mask=np.zeros_like(case.mask))
    value, gradient, metrics = loss(settings, empty)
    assert value == 0 and not gradient.any() and metrics == {}
    value, gradient, _ = loss(settings, replace(case, in_loss=np.zeros_like(case.in_loss)))
    assert value == 0 and not gradient.any()


@each
@pytest.mark.parametrize("estimator", ["centred", "normalised", "leave_one_out"])
def test_groups_with_equal_rewards_give_no_gradient(settings: config.Objective, estimator: str) -> None:
    for reward in (0.0, 1.0, 0.7):
        case = replace(drawn(6, 5, 1, 0.5), advantages=GroupRewards.of([reward] * 6, 3).compute_advantages(estimator))
        value, gradient, _ = loss(settings, case)
        assert abs(value) <= 1e-8 and np.abs(gradient).max() <= 1e-8


@each
def test_every_objective_logs_both_factors_of_the_ratio(settings: config.Objective) -> None:
    case = drawn(6, 8, 2, 0.4)
    found = loss(settings, case)[2]
    discrepancy, staleness = (case.old - case.infer)[case.mask], (case.new - case.old)[case.mask]
    assert found["discrepancy"] == pytest.approx(discrepancy.mean())
    assert found["staleness"] == pytest.approx(staleness.mean())
    ratios = {"discrepancy_ratio": discrepancy, "staleness_ratio": staleness, "is_weight": discrepancy + staleness}
    for key, logs in ratios.items():
        assert found[f"{key}_mean"] == pytest.approx(np.exp(logs).mean())
        assert found[f"{key}_max"] == pytest.approx(np.exp(logs).max())
    assert np.exp(discrepancy) * np.exp(staleness) == pytest.approx(np.exp(case.new - case.infer)[case.mask])


@each
def test_on_policy_and_without_discrepancy_the_gradient_is_the_policy_gradient(settings: config.Objective) -> None:
    """−A over the objective's denominator: there no ratio leaves 1 and nothing is clipped or corrected."""
    if getattr(settings, "is_max", 1.0) < 1:
        return
    case = drawn(6, 6, 2, 0.0)
    sums = dict.fromkeys(("minirl", "sequence", "dppo", "drpo"), "sum")
    how = (sums | {"ppo": "batch"}).get(settings.name, "sample")
    how = getattr(settings, "token_mean", how)
    how = "sample" if getattr(settings, "length_norm", False) else how
    wanted = np.zeros_like(case.new)
    for i, tokens in papers.responses(case):
        divisor = len(case.new) if how == "sum" else papers.denominators(case, how)(i, tokens) if tokens else 1
        wanted[i, tokens] = -case.advantages[i] / divisor
    np.testing.assert_allclose(loss(settings, case)[1], wanted, rtol=1e-12)


# π_θ/π_old, A → gradient of a one-token response; clip_low 0.2, clip_high 0.28
CLIPPED = [
    (1.28 - 1e-9, 1.0, -1.28), (1.28 + 1e-9, 1.0, 0.0), (0.01, 1.0, -0.01),
    (0.8 + 1e-9, -1.0, 0.8), (0.8 - 1e-9, -1.0, 0.0), (100.0, -1.0, 100.0), (1.0, 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "advantage", "wanted"), CLIPPED)
@pytest.mark.parametrize("kind", [config.Grpo, config.Dapo, config.Gspo], ids=lambda kind: kind.name)
def test_a_clipped_ratio_stops_the_gradient_only_on_the_side_its_advantage_pushes_to(
    kind: type, ratio: float, advantage: float, wanted: float
) -> None:
    found = loss(kind(clip_low=0.2, clip_high=0.28), one_token(ratio, advantage))
    assert found[1][0, 0] == pytest.approx(wanted, rel=1e-8)
    dropped = wanted == 0 and advantage != 0
    signs = [found[2][f"clip_fraction{sign}"] for sign in ("", "_positive", "_negative")]
    assert signs == [dropped, dropped and advantage > 0, dropped and advantage < 0]


def test_a_dual_clip_limits_the_loss_of_a_bad_token_that_became_more_likely() -> None:
    """max(min(r·A, clip(r)·A), c·A) where A < 0, and no change elsewhere (arXiv 1912.09729, eq. 5)."""
    for ratio, advantage, gradient in (
        (3 - 1e-9, -1.0, 3.0), (3 + 1e-9, -1.0, 0.0), (1e6, -1.0, 0.0), (0.1, -1.0, 0.0), (0.9, -1.0, 0.9),
        (1.1, 1.0, -1.1), (1e6, 1.0, 0.0), (1e-3, 1.0, -1e-3), (1e6, 0.0, 0.0),
    ):  # fmt: skip
        for kind in (config.Grpo, config.Dapo, config.Ppo):
            found = loss(kind(dual_clip=3.0), one_token(ratio, advantage))
            assert found[1][0, 0] == pytest.approx(gradient, rel=1e-8)
            # verl, core_algos.compute_policy_loss_vanilla, as a formula
            first, second = -advantage * ratio, -advantage * np.clip(ratio, 0.8, 1 + kind.clip_high)
            wanted = min(-advantage * 3.0, max(first, second)) if advantage < 0 else max(first, second)
            assert found[0] == pytest.approx(wanted, rel=1e-8)
            assert found[2]["clip_fraction"] == (gradient == 0 and advantage != 0)


def test_cispo_clips_a_ratio_and_keeps_its_token() -> None:
    settings = config.Cispo(clip_low=0.5, clip_high=0.27)
    for ratio, weight in ((1.26, 1.26), (100.0, 1.27), (0.51, 0.51), (1e-6, 0.5)):
        for advantage in (2.0, -2.0):
            assert loss(settings, one_token(ratio, advantage))[1][0, 0] == pytest.approx(-weight * advantage)
    assert loss(config.Cispo(), one_token(1e-6, 1.0))[1][0, 0] == pytest.approx(-1e-6)  # no lower limit


@pytest.mark.parametrize(("kind", "above"), [("truncate", 2.0), ("mask", 0.0)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_correction_acts_above_its_maximum_and_not_below(level: str, kind: str, above: float) -> None:
    settings = config.Grpo(correction=f"{level}_{kind}")
    for weight, wanted in ((1e-3, 1e-3), (2 - 1e-9, 2 - 1e-9), (2 + 1e-9, above), (1e6, above)):
        found = loss(settings, one_token(1.0, -1.0, weight))
        assert found[1][0, 0] == pytest.approx(wanted, rel=1e-8)
        assert found[2]["corrected_fraction"] == float(weight > 2)


def test_a_sequence_weight_too_large_for_its_type_does_not_spoil_samples_without_advantage() -> None:
    case = replace(drawn(4, 6, 0, 0.1), advantages=np.array([1.0, 1.0, 0.0, 1.0]))
    case.infer[2] = -1e4
    value, gradient, _ = loss(config.Sequence(), replace(case, mask=np.ones_like(case.mask)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[2].any()


def test_float32_log_probabilities_stay_close_to_the_formulas() -> None:
    double = drawn(8, 30, 4, 0.1)
    arrays = ("new", "old", "infer", "reference", "advantages", "shift")
    single = replace(double, **{key: getattr(double, key).astype(np.float32) for key in arrays})
    exact = replace(single, **{key: getattr(single, key).astype(np.float64) for key in arrays})
    wide = config.Gspo(clip_low=0.5, clip_high=0.5)
    for settings in (config.Minirl(), config.Grpo(), config.Cispo(), config.Sequence(), wide):
        found, wanted = loss(settings, single), papers.FORMULAS[type(settings)](exact, settings)
        assert found[0] == pytest.approx(wanted[0], rel=1e-4, abs=1e-6), settings.name
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, err_msg=settings.name)


def test_a_prompts_tokens_and_the_count_of_prompts_follow_what_counts() -> None:
    case = replace(drawn(6, 5, 1, 0.1), in_loss=np.array([1, 1, 0, 0, 0, 0], dtype=bool))
    micros = case.batch().split(4)
    counts = {
        how: aggregate.loss_denominator(micros, how)
        for how in ("sample_sum", "sample_mean", "token_mean", "prompt_mean")
    }
    assert counts == {"sample_sum": 2, "sample_mean": 2, "token_mean": int(case.mask[:2].sum()), "prompt_mean": 1}


def test_the_routers_factor_and_its_floor_are_logged() -> None:
    case = drawn(6, 8, 2, 0.4)
    shift = np.exp(-case.shift[case.mask])
    found = loss(config.Grpo(router_shift=True, router_shift_min=0.7), case)[2]
    assert found["router_shift_mean"] == pytest.approx(shift.mean())
    assert found["router_shift_floor_fraction"] == pytest.approx((shift < 0.7).mean()) and (shift < 0.7).any()
    assert "router_shift_mean" not in loss(config.Grpo(), case)[2]


def reduced(logprobs: torch.Tensor, batch: Batch, settings: config.Minirl) -> tuple[torch.Tensor, Stats]:
    return logprobs.sum(), Stats()


def of_samples(logprobs: torch.Tensor, batch: Batch, settings: config.Minirl) -> tuple[torch.Tensor, Stats]:
    """As it was written when a sample had one advantage."""
    return -batch.advantages[:, None] * logprobs, Stats()


def masking(logprobs: torch.Tensor, batch: Batch, settings: config.Minirl) -> tuple[torch.Tensor, Stats]:
    """As it was written when a batch was filled in place."""
    batch.mask[:, 0] = False
    return -batch.advantages * logprobs, Stats()


def scaling(logprobs: torch.Tensor, batch: Batch, settings: config.Minirl) -> tuple[torch.Tensor, Stats]:
    return -batch.advantages.mul_(2) * logprobs, Stats()


@pytest.mark.parametrize(("writer", "field"), [(masking, "loss_mask"), (scaling, "advantages")])
def test_an_objective_that_writes_into_the_batch_is_told(writer: Any, field: str) -> None:
    broken = objectives.Objective(writer, config.Minirl, lambda settings: "token_mean")
    case = drawn(3, 4, 0, 0.1)
    with pytest.raises(UserError, match=rf"objective 'minirl' wrote into batch\.{field}, which"):
        objectives.batch_loss(broken, config.Minirl(), torch.from_numpy(case.new), case.batch())


@pytest.mark.parametrize(("wrong", "shape"), [(reduced, r"\[\]"), (of_samples, r"\[3, 3, 4\]")])
def test_losses_of_the_wrong_shape_are_told_to_who_wrote_them(wrong: Any, shape: str) -> None:
    broken = objectives.Objective(wrong, config.Minirl, lambda settings: "token_mean")
    case = drawn(3, 4, 0, 0.1)
    named = rf"objective 'minirl' gave losses of shape {shape}: one a token is needed, \[3, 4\]"
    with pytest.raises(UserError, match=named):
        objectives.batch_loss(broken, config.Minirl(), torch.from_numpy(case.new), case.batch())
