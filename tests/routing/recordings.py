"""Recordings for the tests of the codec, the store and their readers."""

import numpy as np

from megatron_bai.routing.routes import RouteSignature, VersionSpan
from megatron_bai.routing.store.codec import SampleRoutes, token_hash

SMALL = RouteSignature(moe_layers=3, num_experts=8, topk=2)


def routes(rows: int, signature: RouteSignature, random: np.random.Generator) -> np.ndarray:
    """`[rows, layers, topk]`, sets drawn uniformly, in any order."""
    scores = random.random((rows, signature.moe_layers, signature.num_experts))
    return scores.argsort(axis=-1)[..., : signature.topk].astype(signature.dtype)


def recording(rows: int, signature: RouteSignature = SMALL, seed: int = 0, valid: float = 1.0) -> SampleRoutes:
    """Of random tokens; each row has a route with probability `valid`."""
    random = np.random.default_rng(seed)
    middle = int(random.integers(0, rows + 1))
    spans = (VersionSpan("step-1", 0, middle), VersionSpan("schritt-2·β", middle, rows))
    has = random.random(rows) < valid
    ids = routes(rows, signature, random)
    ids[~has] = 0
    return SampleRoutes(signature, ids, has, spans, token_hash(random.integers(0, 99, rows + 1)))


def same(a: SampleRoutes, b: SampleRoutes, ordered: bool = False) -> bool:
    """Whether two recordings agree in everything, and in the order within sets if `ordered`."""
    x, y = (r.ids if ordered else np.sort(r.ids, axis=-1) for r in (a, b))
    facts = [(r.signature, r.spans, r.token_hash, r.first_layer, r.ids.dtype) for r in (a, b)]
    return facts[0] == facts[1] and np.array_equal(a.valid, b.valid) and np.array_equal(x, y)
