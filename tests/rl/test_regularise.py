"""The KL penalty and the entropy bonus, in every objective's own mean."""

from dataclasses import replace

import numpy as np
import papers
import pytest
import torch
from policies import drawn, loss

from megatron_bai import config
from megatron_bai.rl.objectives.regularise import kl_estimate

# x = log π_ref/π_θ → the estimate and its derivative in log π_θ
ESTIMATES = {
    "k1": (lambda x: -x, lambda x: 1.0),
    "k2": (lambda x: x * x / 2, lambda x: -x),
    "k3": (lambda x: np.exp(x) - 1 - x, lambda x: 1 - np.exp(x)),
}


def divided(case: "papers.Case", how: str, values: np.ndarray) -> np.ndarray:
    """Values of tokens over the denominators of a mean."""
    out = np.zeros_like(values)
    for i, tokens in papers.responses(case):
        divisor = len(case.new) if how == "sum" else papers.denominators(case, how)(i, tokens) if tokens else 1
        out[i, tokens] = values[i, tokens] / divisor
    return out


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize(
    ("settings", "how"),
    [
        (config.Minirl(), "sum"),
        (config.Grpo(), "sample"),
        (config.Dapo(), "batch"),
        (config.Cispo(token_mean="prompt"), "prompt"),
        (config.Sequence(), "sample"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_penalty_and_a_bonus_are_added_to_every_token(settings: config.Policy, how: str, kind: str) -> None:
    case = drawn(6, 7, 4, 0.6)
    entropy = torch.rand(6, 7, dtype=torch.float64, requires_grad=True)
    plain = loss(settings, case)
    found = loss(replace(settings, kl_penalty=0.3, kl_estimator=kind, entropy_bonus=0.2), case, entropy)
    estimate, slope = ESTIMATES[kind]
    x, nats = case.reference - case.new, entropy.detach().numpy()
    extra = divided(case, how, 0.3 * estimate(x) - 0.2 * nats).sum()
    assert found[0] - plain[0] == pytest.approx(extra, rel=1e-9)
    np.testing.assert_allclose(found[1] - plain[1], divided(case, how, 0.3 * slope(x) + 0 * x), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(entropy.grad.numpy(), divided(case, how, np.full_like(x, -0.2)), rtol=1e-9)
    assert found[2]["kl_reference"] == pytest.approx(estimate(x)[case.mask].mean())
    assert found[2]["entropy_update"] == pytest.approx(nats[case.mask].mean())


def test_at_the_reference_nothing_is_penalised() -> None:
    case = drawn(4, 5, 0, 0.3)
    mask = torch.ones(4, 5, dtype=torch.bool)
    for kind in ESTIMATES:
        new = torch.from_numpy(case.new.copy())
        assert not kl_estimate(new, new.clone(), mask, kind).any()


def test_the_expected_gradients_of_the_estimators_are_what_is_said_of_them() -> None:
    """Over all outcomes of a distribution: k1 restrains nothing, k2 is KL(π ‖ ref), k3 is KL(ref ‖ π)."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, logq = logits.log_softmax(-1), other.log_softmax(-1)
    forward, backward = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    wanted = {
        "k1": torch.zeros_like(logits),
        "k2": torch.autograd.grad(forward, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(backward, logits, retain_graph=True)[0],
    }
    for kind, gradient in wanted.items():
        estimates = kl_estimate(logp, logq, torch.ones(7, dtype=torch.bool), kind)
        found = torch.autograd.grad((logp.exp().detach() * estimates).sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
        if kind != "k2":  # unbiased: the expectation is the divergence itself
            value = (logp.exp() * estimates).sum()
            torch.testing.assert_close(value, forward, rtol=1e-10, atol=1e-12)
