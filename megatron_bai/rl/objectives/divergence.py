"""Divergences of two policies at a sampled token, the vocabulary taken as two events: this token, or any other.

Rounding may leave a logarithm of a probability above 0, which counts as 0.
"""

import torch

from megatron_bai.rl.objectives.objective import PerToken


def binary_tv(p: PerToken, q: PerToken) -> PerToken:
    """Compute the total variation |p − q| of two binary distributions (arXiv 2602.04879, eq. 13).

    Args:
        p: `[B, T]` logarithm of the token's probability under one policy.
        q: the same under the other.
    """
    return (p.clamp(max=0).exp() - q.clamp(max=0).exp()).abs()


def binary_kl(p: PerToken, q: PerToken) -> PerToken:
    """Compute p·log(p/q) + (1 − p)·log((1 − p)/(1 − q)) (arXiv 2602.04879, eq. 14).

    1 − p comes from the logarithm itself: p rounds to 1 in float32 where it does not equal 1.

    Args:
        p: `[B, T]` logarithm of the token's probability under one policy.
        q: the same under the other.

    Returns:
        `[B, T]` nats; inf where q is 1 and p is not.
    """
    p, q = p.clamp(max=0), q.clamp(max=0)
    others_p, others_q = -p.expm1(), -q.expm1()
    certain = others_p == 0  # 0 · log 0
    others = others_p * (others_p.masked_fill(certain, 1.0).log() - others_q.masked_fill(certain, 1.0).log())
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)) + others
