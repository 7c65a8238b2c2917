"""The token-level objective is the first-order approximation of the sequence-level one (arXiv 2512.01374).

A tiny autoregressive model in plain torch, whose responses are all enumerated: expectations over μ_old are exact. θ
moves from θ_old by ε along a random direction. Then, without discrepancy (μ_old = π_old),

    J_seq(θ) − J_token(θ) = constant + O(ε²)        so        ∇J_seq − ∇J_token = O(ε):

the objectives agree to first order, and their gradients are equal at θ_old and part linearly in ε.
"""

from itertools import product

import numpy as np
import pytest
import torch
from policies import Case
from torch import Tensor

from megatron_bai import config
from megatron_bai.rl import objectives

VOCABULARY, LENGTH = 3, 4
RESPONSES = torch.tensor(list(product(range(VOCABULARY), repeat=LENGTH)))  # [81, 4]
DISTANCES = np.array([1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
TOKEN = config.Minirl(clip=False, is_max=float("inf"))


class Model(torch.nn.Module):
    """Next-token distribution from an embedding of the token before and a running mean of all before."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.embedding, self.mix, self.head = weight(VOCABULARY + 1, 5), weight(5, 5), weight(5, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T]` responses → log-probability of each token."""
        start = torch.full_like(tokens[:, :1], VOCABULARY)
        x = self.embedding[torch.cat([start, tokens[:, :-1]], dim=1)]
        history = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        logits = torch.tanh(x + history @ self.mix) @ self.head
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


MODEL = Model()
THETA = torch.nn.utils.parameters_to_vector(MODEL.parameters()).detach()
STEP = torch.randn(THETA.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DIRECTION = STEP / STEP.norm()
REWARD = torch.tensor([float(len(set(y.tolist())) == 2) for y in RESPONSES], dtype=torch.float64)  # of two tokens
with torch.no_grad():
    OLD = MODEL(RESPONSES)


def measured(settings: config.Policy, distance: float, infer: Tensor = OLD) -> tuple[float, Tensor]:
    """J = E_{y ~ μ_old} and its gradient in θ at θ_old + distance · direction; J is minus the loss."""
    torch.nn.utils.vector_to_parameters(THETA + distance * DIRECTION, MODEL.parameters())
    MODEL.zero_grad()
    logprobs = MODEL(RESPONSES)
    probability = infer.sum(1).exp()
    case = Case(
        new=logprobs.detach().numpy(), old=OLD.numpy(), infer=infer.numpy(), reference=OLD.numpy(),
        advantages=(REWARD * probability).numpy(),  # the expectation's weights: an objective is linear in A
        mask=np.ones(RESPONSES.shape, dtype=bool), prompt_index=np.zeros(81, dtype=int),
        in_loss=np.ones(81, dtype=bool),
    )  # fmt: skip
    total, _ = objectives.batch_loss(objectives.get(settings.name), settings, logprobs, case.batch())
    (-total).backward()
    return -float(total.detach()), torch.cat([p.grad.flatten() for p in MODEL.parameters()])


def surrogate_of_tokens(distance: float) -> float:
    """J_token as the paper writes it, Σ_t π_θ/μ_old · R, whose gradient MiniRL's sg[·] · log π form has."""
    torch.nn.utils.vector_to_parameters(THETA + distance * DIRECTION, MODEL.parameters())
    with torch.no_grad():
        ratios = (MODEL(RESPONSES) - OLD).exp().sum(1)
        return float((OLD.sum(1).exp() * REWARD * ratios).sum())


def slope(errors: list[float]) -> float:
    """Of log error over log distance."""
    return float(np.polyfit(np.log(DISTANCES), np.log(errors), 1)[0])


def test_the_sequence_objective_is_the_expected_reward_of_the_policy() -> None:
    """Importance sampling at its word: value and gradient are those of E_{y ~ π_θ}[R], far from θ_old too."""
    for distance in (0.0, 0.3, 2.0):
        value, gradient = measured(config.Sequence(), distance)
        MODEL.zero_grad()
        expected = (MODEL(RESPONSES).sum(1).exp() * REWARD).sum()
        expected.backward()
        assert value == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in MODEL.parameters()]))


def test_gradients_are_equal_at_the_old_policy() -> None:
    torch.testing.assert_close(measured(config.Sequence(), 0.0)[1], measured(TOKEN, 0.0)[1], rtol=1e-12, atol=1e-15)


def test_the_objectives_part_at_second_order() -> None:
    apart = [measured(config.Sequence(), d)[0] - surrogate_of_tokens(d) for d in (0.0, *DISTANCES)]
    assert slope([abs(found - apart[0]) for found in apart[1:]]) == pytest.approx(2.0, abs=0.05)


def test_the_gradients_part_at_first_order() -> None:
    errors = [float((measured(config.Sequence(), d)[1] - measured(TOKEN, d)[1]).norm()) for d in DISTANCES]
    assert slope(errors) == pytest.approx(1.0, abs=0.05)
    assert errors[0] < 1e-2 * float(measured(TOKEN, DISTANCES[0])[1].norm())


def test_the_first_step_improves_the_sequence_objective_alike() -> None:
    """Along −ε·gradient the two differ in what is gained at second order: gain_seq − gain_token = O(ε²)."""
    errors = []
    for distance in DISTANCES:
        gained = measured(config.Sequence(), distance)[0] - measured(config.Sequence(), 0.0)[0]
        predicted = distance * float(measured(TOKEN, 0.0)[1] @ DIRECTION)
        errors.append(abs(gained - predicted))
    assert slope(errors) == pytest.approx(2.0, abs=0.05)


def test_a_discrepancy_between_the_engines_leaves_an_error_that_does_not_vanish() -> None:
    """μ_old ≠ π_old: as θ → θ_old the gradients keep a distance. Why replay and small discrepancy matter."""
    torch.nn.utils.vector_to_parameters(THETA + 0.1 * DIRECTION.flip(0), MODEL.parameters())
    with torch.no_grad():
        infer = MODEL(RESPONSES)
    pairs = [[measured(settings, d, infer)[1] for settings in (config.Sequence(), TOKEN)] for d in DISTANCES]
    errors = [float((sequence - token).norm()) for sequence, token in pairs]
    assert abs(slope(errors)) < 0.2
