"""The confidence interval of an evaluation."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from megatron_bai.rl.experience.evaluation import confidence_interval, student_quantile

# Two-sided 95 % and 99 % quantiles from printed tables.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 9: (2.262, 3.250), 30: (2.042, 2.750)}


@pytest.mark.parametrize("degrees", TABLE)
def test_the_quantile_is_that_of_the_tables(degrees: int) -> None:
    for p, wanted in zip((0.975, 0.995), TABLE[degrees]):
        assert student_quantile(p, degrees) == pytest.approx(wanted, abs=5e-4)


def test_the_quantile_in_closed_form() -> None:
    for p in (0.6, 0.9, 0.975, 0.999):
        assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-12)  # Cauchy
        a = 2 * p - 1
        assert student_quantile(p, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-12)
    assert student_quantile(0.975, 20000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=2e-4)


def test_the_interval_by_hand() -> None:
    mean, half = confidence_interval(np.array([0.0, 0.5, 1.0]))
    assert (mean, half) == (0.5, pytest.approx(4.302652729749464 * 0.5 / math.sqrt(3)))
    assert confidence_interval(np.array([0.25])) == (0.25, None)
    assert confidence_interval(np.ones(5)) == (1.0, 0.0)


@pytest.mark.parametrize("problems", [5, 40])
def test_it_covers_the_truth_as_often_as_it_says(problems: int) -> None:
    """Problems of different difficulty, eight samples each: 95 % of 4000 intervals hold the mean over all problems.

    The standard error of the share is 0.35 %. One that takes the samples for independent covers far less.
    """
    random = np.random.default_rng(0)
    difficulty = random.beta(2, 2, (4000, problems))  # mean 0.5
    means = random.binomial(8, difficulty) / 8
    held = naive = 0
    for each in means:
        mean, half = confidence_interval(each)
        held += abs(mean - 0.5) <= half
        naive += abs(mean - 0.5) <= 1.96 * math.sqrt(mean * (1 - mean) / (8 * problems))
    assert 0.935 <= held / 4000 <= 0.965
    assert naive / 4000 < 0.9
