"""`megatron-bai inspect` on a store of routes: how experts are loaded, and how far two recordings agree."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_bai.errors import UserError
from megatron_bai.routing.routes import RouteSignature, layer_chunks, sorted_sets
from megatron_bai.routing.store.codec import SampleRoutes, min_bytes
from megatron_bai.routing.store.route_store import RecordEntry, RouteStore

_BARS = "·▁▂▃▄▅▆▇█"  # an expert that was never chosen is a dot
_NAMED = 3  # experts named as the busiest of a layer, samples named as belonging to other tokens


@dataclass
class StoreStats:
    """What a store holds.

    Attributes:
        load: `[moe_layers, experts]` int64, how often each expert was chosen.
        rows: sequence positions recorded; `valid` of them have a route.
        encoded, bound: bytes of envelopes, and the fewest that sets take when all are equally likely.
        versions: rows by weight version; rows whose version is unknown under "unknown".
    """

    signature: RouteSignature
    load: np.ndarray
    records: int = 0
    rows: int = 0
    valid: int = 0
    encoded: int = 0
    bound: float = 0.0
    versions: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)


@dataclass
class StoreOverlap:
    """How far two stores agree, over rows that have a route in both, by layer.

    Attributes:
        rows: `[moe_layers]` int64, rows compared.
        equal: `[moe_layers]` int64, of them those with the same set.
        common: `[moe_layers]` int64, Σ |A ∩ B| over the rows.
        matched: samples compared.
        other_tokens: samples whose token hashes differ, which are not compared.
        only: samples that one of the two lacks, in the first and in the second.
    """

    signature: RouteSignature
    rows: np.ndarray
    equal: np.ndarray
    common: np.ndarray
    matched: int = 0
    other_tokens: list[tuple[int, int]] = field(default_factory=list)
    only: tuple[int, int] = (0, 0)


def compute_stats(store: RouteStore) -> StoreStats:
    """Count what a store holds, reading it once. Damage is passed over and added to `store.damage`.

    Raises:
        UserError: it holds no intact record, or routes of two models.
    """
    found: StoreStats | None = None
    for entry, recording in _readable(store):
        if found is None:
            signature = recording.signature
            found = StoreStats(signature, np.zeros((signature.moe_layers, signature.num_experts), dtype=np.int64))
        if recording.signature != found.signature:
            raise UserError(f"{entry} is of {recording.signature}, others are of {found.signature}: two models")
        ids = recording.ids[recording.valid]
        for j in range(ids.shape[1]):
            found.load[recording.first_layer + j] += np.bincount(ids[:, j].ravel(), minlength=found.load.shape[1])
        found.records += 1
        found.rows += len(recording.ids)
        found.valid += len(ids)
        found.encoded += entry.length
        found.bound += min_bytes(recording.signature, recording.num_sets)
        found.sources[entry.source] += 1
        for span in recording.spans:
            found.versions[span.version] += span.end - span.start
        if not recording.spans:
            found.versions["unknown"] += len(recording.ids)
    if found is None:
        raise UserError(f"{store.directory} holds no intact recording: was the run ended before its first step?")
    return found


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of the experts' shares of a layer over log E: 1 when all are used alike, 0 when only one is.

    Args:
        load: `[layers, experts]` counts.

    Returns:
        `[layers]`; NaN for a layer without counts, 1 for a model of one expert.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = load / load.sum(axis=1, keepdims=True)
        nats = -np.where(load > 0, share * np.log(share), 0 * share).sum(axis=1)
    found: np.ndarray = nats / math.log(load.shape[1]) if load.shape[1] > 1 else nats + 1
    return found


def compare_stores(a: RouteStore, b: RouteStore) -> StoreOverlap:
    """Compare the samples that two stores hold under one (step, sample) and with the same tokens.

    Raises:
        UserError: they are of different models.
    """
    theirs = {(entry.step, entry.sample): entry for entry in b.entries}
    ours = {(entry.step, entry.sample) for entry in a.entries}
    found: StoreOverlap | None = None
    for entry, mine in _readable(a):
        key = entry.step, entry.sample
        if key not in theirs:
            continue
        other = b.read_or_none(theirs[key])
        if other is None:
            continue
        if other.signature != mine.signature:
            raise UserError(f"{a.directory} holds routes of {mine.signature}, {b.directory} of {other.signature}")
        if found is None:
            found = _no_overlap(mine.signature)
        if other.token_hash != mine.token_hash:
            found.other_tokens.append(key)
            continue
        found.matched += 1
        _add_overlap(found, mine, other)
    found = found or _no_overlap(RouteSignature(0, 0, 0))
    found.only = len(ours - theirs.keys()), len(theirs.keys() - ours)
    return found


def _no_overlap(signature: RouteSignature) -> StoreOverlap:
    rows, equal, common = (np.zeros(signature.moe_layers, dtype=np.int64) for _ in range(3))
    return StoreOverlap(signature, rows, equal, common)


def _add_overlap(total: StoreOverlap, a: SampleRoutes, b: SampleRoutes) -> None:
    rows = min(len(a.ids), len(b.ids))
    both = a.valid[:rows] & b.valid[:rows]
    first, last = max(a.first_layer, b.first_layer), min(r.first_layer + r.ids.shape[1] for r in (a, b))
    x, y = (r.ids[:rows][both][:, first - r.first_layer : last - r.first_layer] for r in (a, b))
    for part in layer_chunks(len(x), x.shape[1]):
        layers = slice(first + part.start, first + part.stop)
        mine, other = sorted_sets(x[:, part]), sorted_sets(y[:, part])
        total.rows[layers] += len(x)
        total.equal[layers] += (mine == other).all(axis=0).sum(axis=1)
        for expert in mine:
            total.common[layers] += (other == expert).any(axis=0).sum(axis=1)


def _readable(store: RouteStore) -> Iterator[tuple[RecordEntry, SampleRoutes]]:
    return store.iter_records(skip_damaged=True)


def print_store(path: str, other: str = "") -> None:
    """Print what the store at `path` holds and, with `other`, how far that store's routes are the same.

    Raises:
        UserError: one of the two is no store, or they are of different models.
    """
    console = Console(soft_wrap=True)
    with RouteStore(path) as store:
        _print_content(console, store, compute_stats(store))
        if other:
            with RouteStore(other) as second:
                _print_overlap(console, store, second)


def _print_content(console: Console, store: RouteStore, found: StoreStats) -> None:
    s, steps = found.signature, {entry.step for entry in store.entries}
    sources = " and ".join(sorted(found.sources))
    console.print(
        f"{store.directory}: {found.records:,} samples of {len(steps):,} steps ({min(steps)} to {max(steps)}), "
        f"{sources}; {s.moe_layers} MoE layers, {s.topk} of {s.num_experts} experts"
    )
    console.print(f"rows {found.rows:,}, with a route {found.valid:,} ({_share(found.valid, found.rows)})")
    console.print("weight versions (rows): " + ", ".join(f"{name} ({rows:,})" for name, rows in found.versions.items()))
    if found.valid:
        size, least = found.encoded / found.valid, found.bound / found.valid
        ratio = f" ({size / least:.3f} of it)" if least else ""
        plain = 4 * s.moe_layers * s.topk
        console.print(f"bytes a row with a route: {size:,.1f}, at least {least:,.1f}{ratio}; int32 takes {plain:,}")
    _print_damage(console, store)
    columns = ("layer", "entropy", "max/mean", "min/mean", "unused", "busiest (share of choices)")
    table = Table(*columns, title="load of the experts", title_justify="left")
    for layer, (load, even) in enumerate(zip(found.load, load_entropy(found.load), strict=True)):
        mean = load.mean()
        if not mean:
            table.add_row(str(layer), *["–"] * 5)
            continue
        busiest = ", ".join(f"{e} ({load[e] / load.sum():.1%})" for e in np.argsort(-load, kind="stable")[:_NAMED])
        unused = str(int((load == 0).sum()))
        numbers = (f"{even:.4f}", f"{load.max() / mean:.2f}", f"{load.min() / mean:.2f}")
        table.add_row(str(layer), *numbers, unused, busiest)
    console.print(table)
    console.print("every expert's load, as a share of its layer's busiest:")
    for layer, load in enumerate(found.load):
        height = np.ceil(load * (len(_BARS) - 1) / max(load.max(), 1)).astype(int)
        console.print(f"{layer:>5} {''.join(_BARS[h] for h in height)}")


def _print_overlap(console: Console, a: RouteStore, b: RouteStore) -> None:
    found = compare_stores(a, b)
    _print_damage(console, b)
    console.print(
        f"{found.matched:,} samples in both; only in {a.directory}: {found.only[0]:,}, only in {b.directory}:"
        f" {found.only[1]:,}"
    )
    if found.other_tokens:
        named = ", ".join(f"step {step} sample {sample}" for step, sample in found.other_tokens[:_NAMED])
        console.print(f"{len(found.other_tokens):,} samples are of other tokens and not compared: {named}")
    table = Table("layer", "rows", "same set", "|A ∩ B| / k", title=f"overlap with {b.directory}", title_justify="left")
    sums = zip(found.rows, found.equal, found.common, strict=True)
    for name, rows, equal, common in [
        *((str(layer), *values) for layer, values in enumerate(sums)),
        ("all", found.rows.sum(), found.equal.sum(), found.common.sum()),
    ]:
        table.add_row(name, f"{rows:,}", _share(equal, rows), _share(common, rows * found.signature.topk))
    console.print(table)


def _print_damage(console: Console, store: RouteStore) -> None:
    for damage in store.damage:
        console.print(f"not read: {damage}")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"
