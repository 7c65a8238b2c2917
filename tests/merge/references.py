"""The merge methods in plain torch, from the papers' formulas, over whole tensors in float64.

Written apart from `megatron_bai.merge`: nothing is imported from it.
"""

import hashlib
import math

import torch

Tensors = dict[str, torch.Tensor]


def axes(key: str) -> int:
    """Leading axes of `checkpoints.model`'s tensors that count layers and experts."""
    return key.startswith("decoder.layers.") + (".experts.experts." in key)


def by_slice(function, key: str, *tensors: torch.Tensor, lead: int | None = None, **more) -> torch.Tensor:
    """`function` on every layer's or expert's own part."""
    lead = axes(key) if lead is None else lead
    if lead == 0:
        return function(key, *(t.double() for t in tensors), **more)
    rows = zip(*tensors)
    return torch.stack([by_slice(function, f"{key} {i}", *row, lead=lead - 1, **more) for i, row in enumerate(rows)])


def linear(members: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return sum(w * m.double() for m, w in zip(members, weights)) / math.fsum(weights)  # type: ignore[return-value]


def task_arithmetic(base: torch.Tensor, members: list[torch.Tensor], weights: list[float], scale: float):
    return base.double() + scale * sum(w * (m.double() - base.double()) for m, w in zip(members, weights))


def slerp(key: str, a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Shoemake's formula, of unit vectors' angle, by the two-argument arc tangent."""
    lengths = a.norm() * b.norm()
    if lengths == 0:
        return (1 - t) * a + t * b
    u, v = a / a.norm(), b / b.norm()
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if abs(math.sin(angle)) < 1e-6:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def ties(key: str, base: torch.Tensor, *members: torch.Tensor, weights: list[float], density: float, scale: float):
    """Trim, elect sign, disjoint mean, one element after another."""
    vectors = [m - base for m in members]
    k = max(int(density * base.numel() + 1e-9), 1)
    trimmed = []
    for vector in vectors:
        size = vector.abs().float()
        least = size.flatten().sort(descending=True).values[k - 1]
        trimmed.append(torch.where(size < least, torch.zeros_like(vector), vector).flatten().tolist())
    merged = []
    for start, *values in zip(base.flatten().tolist(), *trimmed):
        mass = sum(w * v for w, v in zip(weights, values))
        agreeing = [(w, v) for w, v in zip(weights, values) if v * mass > 0 and w > 0]
        mean = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        merged.append(start + scale * mean)
    return torch.tensor(merged, dtype=torch.float64).view(base.shape)


def kept(seed: int, number: int, name: str, element: int, drop_rate: float) -> bool:
    """DARE's mask for one element, in Python's integers: SplitMix64 from a state that SHA-256 gives."""
    state = int.from_bytes(hashlib.sha256(f"{seed} {number} {name}".encode()).digest()[:8], "little")
    z = (state + element * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) / 2**64 >= drop_rate


def dare_ties(key: str, base: torch.Tensor, *members: torch.Tensor, weights, drop_rate, seed, scale, normalize=False):
    """Drop and rescale, elect the sign of the weighted sum, add what has it, one element after another."""
    merged = []
    for i, start in enumerate(base.flatten().tolist()):
        values = [
            w * float(member.flatten()[i] - start) / (1 - drop_rate) * kept(seed, number, key, i, drop_rate)
            for number, (member, w) in enumerate(zip(members, weights), 1)
        ]
        agreeing = [(w, v) for w, v in zip(weights, values) if v * math.fsum(values) > 0]
        divisor = math.fsum(w for w, _ in agreeing) if normalize and agreeing else 1.0
        merged.append(start + scale * math.fsum(v for _, v in agreeing) / divisor)
    return torch.tensor(merged, dtype=torch.float64).view(base.shape)


def dare(key: str, base: torch.Tensor, *members: torch.Tensor, weights, drop_rate: float, seed: int, scale: float):
    merged = base.clone().flatten()
    for number, (member, weight) in enumerate(zip(members, weights), 1):
        mask = torch.tensor([kept(seed, number, key, i, drop_rate) for i in range(base.numel())]).double()
        merged += scale * weight * mask * (member - base).flatten() / (1 - drop_rate)
    return merged.view(base.shape)
