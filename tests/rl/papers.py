"""Losses and their gradients as the papers' formulas give them, one token after another, without autograd.

Each function takes a case and settings and returns the loss of a mini-batch and its gradient in log π_θ.
"""

from collections.abc import Callable
from math import exp, log
from typing import Any

import numpy as np
from policies import Case

from megatron_bai import config

Answer = tuple[float, np.ndarray]


def responses(case: Case) -> list[tuple[int, list[int]]]:
    """(sample, positions of its tokens) of the samples that count, empty responses included."""
    return [(i, np.nonzero(case.mask[i])[0].tolist()) for i in np.nonzero(case.in_loss)[0].tolist()]


def clip(x: float, low: float, high: float) -> float:
    return max(min(x, high), low)


def token_weight(case: Case, i: int, t: int, settings: config.Corrected) -> float:
    """The correction's factor."""
    if settings.correction == "none":
        return 1.0
    if settings.correction == "token_kpop":
        old, infer = case.old[i, t], case.infer[i, t]
        both = binary_kl(old, infer), binary_kl(infer, old)
        return exp(old - infer) if max(both) <= settings.correction_kl else 0.0
    level, action = settings.correction.split("_")
    tokens = [t] if level == "token" else np.nonzero(case.mask[i])[0]
    w = 1.0
    for s in tokens:
        w *= exp(case.old[i, s]) / exp(case.infer[i, s])
    if settings.correction_min <= w <= settings.correction_max:
        return w
    return settings.correction_max if action == "truncate" else 0.0


def binary_kl(a: float, b: float) -> float:
    """KL of two events with probabilities e^a and 1 − e^a from those of e^b; what is above 1 counts as 1."""
    a, b = min(float(a), 0.0), min(float(b), 0.0)
    p, q = exp(a), exp(b)
    if p < 1 and q == 1:
        return float("inf")
    return p * (a - b) + ((1 - p) * log((1 - p) / (1 - q)) if p < 1 else 0.0)


def gamma(case: Case, i: int, t: int, settings: config.RouterShifted) -> float:
    """The routers' factor of an importance ratio."""
    return max(exp(-case.shift[i, t]), settings.router_shift_min) if settings.router_shift else 1.0


def surrogate(ratio: float, a: float, settings: Any) -> tuple[float, float]:
    """min(rA, clip(r)A), with a dual clip c and A < 0 max(min(rA, clip(r)A), cA), and its derivative in r."""
    free, held = ratio * a, clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high) * a
    value, slope = (free, a) if free <= held else (held, 0.0)
    dual = getattr(settings, "dual_clip", float("inf"))
    return (dual * a, 0.0) if a < 0 and value < dual * a else (value, slope)


def minirl(case: Case, settings: config.Minirl) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    counted = responses(case)
    for i, tokens in counted:
        for t in tokens:
            a, p, old, mu = case.advantages[i], exp(case.new[i, t]), exp(case.old[i, t]), exp(case.infer[i, t])
            m, g = 1.0, gamma(case, i, t, settings)
            if settings.clip and a > 0 and g * p / old > 1 + settings.clip_high:
                m = 0.0
            if settings.clip and a < 0 and g * p / old < 1 - settings.clip_low:
                m = 0.0
            weight = min(g * p / (mu if settings.train_infer_is else old), settings.is_max)
            c = m * weight * a / (len(tokens) if settings.length_norm else 1) / len(counted)
            value -= c * case.new[i, t]
            gradient[i, t] = -c
    return value, gradient


def dppo(case: Case, settings: config.Dppo) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    counted = responses(case)
    for i, tokens in counted:
        for t in tokens:
            a, x = case.advantages[i], case.new[i, t]
            y = case.infer[i, t] if settings.anchor == "inference" else case.old[i, t]
            limit = settings.delta
            if settings.divergence == "tv":
                d, limit = abs(exp(min(x, 0.0)) - exp(min(y, 0.0))), 0.15 if limit is None else limit
            else:
                d, limit = binary_kl(y, x), 0.05 if limit is None else limit
            m = 0.0 if d > limit and (a > 0 and x > y or a < 0 and x < y) else 1.0
            weight = min(gamma(case, i, t, settings) * exp(x) / exp(case.infer[i, t]), settings.is_max)
            c = m * weight * a / (len(tokens) if settings.length_norm else 1) / len(counted)
            value -= c * x
            gradient[i, t] = -c
    return value, gradient


def drpo(case: Case, settings: config.Drpo) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    counted = responses(case)
    for i, tokens in counted:
        for t in tokens:
            a, r = case.advantages[i], exp(case.new[i, t]) / exp(case.infer[i, t])
            mu = exp(min(case.infer[i, t], 0.0))
            c = gamma(case, i, t, settings) / (len(tokens) if settings.length_norm else 1) / len(counted)
            value -= c * (r * a - abs(a) / (2 * settings.delta) * mu * (r - 1) ** 2)
            w = 1 - (1 if a * (r - 1) > 0 else -1) * mu * abs(r - 1) / settings.delta
            gradient[i, t] = -c * a * r * w
    return value, gradient


def sequence(case: Case, settings: config.Sequence) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    counted = responses(case)
    for i, tokens in counted:
        w = 1.0
        for t in tokens:
            w *= gamma(case, i, t, settings) * exp(case.new[i, t]) / exp(case.infer[i, t])
        c = min(w, settings.is_max) * case.advantages[i] / len(counted)
        value -= c if tokens else 0.0
        gradient[i, tokens] = -c
    return value, gradient


def denominators(case: Case, how: str) -> Callable[[int, list[int]], float]:
    """What a token of a response is divided by."""
    counted = responses(case)
    prompts = {case.prompt_index[i] for i, _ in counted}
    tokens = {q: sum(len(own) for i, own in counted if case.prompt_index[i] == q) for q in prompts}
    return {
        "sample": lambda i, own: len(own) * len(counted),
        "batch": lambda i, own: sum(tokens.values()),
        "prompt": lambda i, own: tokens[case.prompt_index[i]] * len(prompts),
    }[how]


def grpo(case: Case, settings: config.Grpo | config.Dapo | config.Ppo) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    how = "batch" if isinstance(settings, config.Ppo) else getattr(settings, "token_mean", "sample")
    divisor = denominators(case, how)
    for i, tokens in responses(case):
        for t in tokens:
            r = gamma(case, i, t, settings) * exp(case.new[i, t]) / exp(case.old[i, t])
            j, slope = surrogate(r, case.advantages[i], settings)
            c = token_weight(case, i, t, settings) / divisor(i, tokens)
            value -= c * j
            gradient[i, t] = -c * slope * r  # dr / d log π = r
    return value, gradient


def cispo(case: Case, settings: config.Cispo) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    divisor = denominators(case, settings.token_mean)
    for i, tokens in responses(case):
        for t in tokens:
            g = gamma(case, i, t, settings)
            r = clip(g * exp(case.new[i, t]) / exp(case.old[i, t]), 1 - settings.clip_low, 1 + settings.clip_high)
            c = token_weight(case, i, t, settings) * r * case.advantages[i] / divisor(i, tokens)
            value -= c * case.new[i, t]
            gradient[i, t] = -c
    return value, gradient


def gspo(case: Case, settings: config.Gspo) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    counted = responses(case)
    for i, tokens in counted:
        if not tokens:
            continue
        s = exp(sum(case.new[i, t] - case.old[i, t] for t in tokens) / len(tokens))
        for t in tokens:
            s *= gamma(case, i, t, settings) ** (1 / len(tokens))
        j, slope = surrogate(s, case.advantages[i], settings)
        c = sum(token_weight(case, i, t, settings) for t in tokens) / len(tokens) / len(counted)
        value -= c * j
        gradient[i, tokens] = -c * slope * s / len(tokens)  # ds / d log π(y_t) = s / |y|
    return value, gradient


def sapo(case: Case, settings: config.Sapo) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    divisor = denominators(case, "sample")
    for i, tokens in responses(case):
        for t in tokens:
            a, r = case.advantages[i], gamma(case, i, t, settings) * exp(case.new[i, t]) / exp(case.old[i, t])
            tau = settings.tau_positive if a > 0 else settings.tau_negative
            e = exp(-tau * (r - 1))
            c = token_weight(case, i, t, settings) / divisor(i, tokens)
            value -= c * a * 4 / tau / (1 + e)
            gradient[i, t] = -c * a * r * 4 * e / (1 + e) ** 2
    return value, gradient


def gmpo(case: Case, settings: config.Gmpo) -> Answer:
    value, gradient = 0.0, np.zeros_like(case.new)
    counted = responses(case)
    for i, tokens in counted:
        a, logs = case.advantages[i], {}
        for t in tokens:
            logs[t] = case.new[i, t] - case.old[i, t] + float(log(gamma(case, i, t, settings)))
        kept = {
            t: min(x, settings.clip_high) if a > 0 else max(x, -settings.clip_low) if a < 0 else x
            for t, x in logs.items()
        }
        if not tokens:
            continue
        rho = exp(sum(kept.values()) / len(tokens))
        c = sum(token_weight(case, i, t, settings) for t in tokens) / len(tokens) / len(counted) * a * rho
        value -= c
        for t in tokens:
            gradient[i, t] = -c / len(tokens) if kept[t] == logs[t] else 0.0
    return value, gradient


FORMULAS: dict[type, Callable[[Case, config.Objective], Answer]] = {
    config.Minirl: minirl,
    config.Sequence: sequence,
    config.Dppo: dppo,
    config.Drpo: drpo,
    config.Grpo: grpo,
    config.Dapo: grpo,
    config.Cispo: cispo,
    config.Gspo: gspo,
    config.Gmpo: gmpo,
    config.Sapo: sapo,
    config.Ppo: grpo,
}
