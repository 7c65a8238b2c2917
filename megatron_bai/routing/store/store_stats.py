"""Statistics of route stores for `megatron-bai inspect`: the load of experts, and the overlap of two stores."""

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
from megatron_bai.utils.terminal_text import make_console

_BARS = "·▁▂▃▄▅▆▇█"  # an expert that was never chosen is a dot
_NUM_NAMED = 3  # experts named as the busiest of a layer, samples named as those of other tokens


@dataclass
class StoreStats:
    """Statistics of one store.

    Attributes:
        signature: of all routes.
        load: `[moe_layers, experts]` int64, how often each expert was chosen.
        records: number of intact records.
        rows: sequence positions recorded.
        valid: rows that have a route.
        encoded: bytes of envelopes.
        bound: the fewest bytes that the sets take when all are equally likely.
        versions: rows by weight version; rows whose version is unknown under "unknown".
        sources: records by source.
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
    """The overlap of two stores by layer, over rows that have a route in both.

    Attributes:
        signature: of both stores' routes.
        rows: `[moe_layers]` int64, rows compared.
        equal: `[moe_layers]` int64, rows with the same set in both.
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
    """Compute the statistics of a store, reading it once. Damage is skipped and added to `store.damage`.

    Raises:
        UserError: it holds no intact record, or routes of two models.
    """
    stats: StoreStats | None = None
    for entry, recording in _readable(store):
        if stats is None:
            signature = recording.signature
            stats = StoreStats(signature, np.zeros((signature.moe_layers, signature.num_experts), dtype=np.int64))
        if recording.signature != stats.signature:
            raise UserError(f"{entry} is of {recording.signature}, others are of {stats.signature}: two models")
        ids = recording.ids[recording.valid]
        for j in range(ids.shape[1]):
            stats.load[recording.first_layer + j] += np.bincount(ids[:, j].ravel(), minlength=stats.load.shape[1])
        stats.records += 1
        stats.rows += len(recording.ids)
        stats.valid += len(ids)
        stats.encoded += entry.length
        stats.bound += min_bytes(recording.signature, recording.num_sets)
        stats.sources[entry.source] += 1
        for span in recording.spans:
            stats.versions[span.version] += span.end - span.start
        if not recording.spans:
            stats.versions["unknown"] += len(recording.ids)
    if stats is None:
        raise UserError(f"{store.directory} holds no intact recording: was the run ended before its first step?")
    return stats


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Compute the entropy of the experts' shares of each layer, over log E: 1 when all are used alike, 0 when one is.

    Args:
        load: `[layers, experts]` counts.

    Returns:
        `[layers]`; NaN for a layer without counts, 1 for a model of one expert.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share = load / load.sum(axis=1, keepdims=True)
        nats = -np.where(load > 0, share * np.log(share), 0 * share).sum(axis=1)
    entropy: np.ndarray = nats / math.log(load.shape[1]) if load.shape[1] > 1 else nats + 1
    return entropy


def compare_stores(a: RouteStore, b: RouteStore) -> StoreOverlap:
    """Compare the samples that two stores hold under one (step, sample) and with the same tokens.

    Args:
        a: the first store.
        b: the second store.

    Raises:
        UserError: the stores are of different models.
    """
    b_entries = {(entry.step, entry.sample): entry for entry in b.entries}
    a_keys = {(entry.step, entry.sample) for entry in a.entries}
    overlap: StoreOverlap | None = None
    for entry, a_routes in _readable(a):
        key = entry.step, entry.sample
        if key not in b_entries:
            continue
        b_routes = b.read_or_none(b_entries[key])
        if b_routes is None:
            continue
        if b_routes.signature != a_routes.signature:
            of_a, of_b = a_routes.signature, b_routes.signature
            raise UserError(f"{a.directory} holds routes of {of_a}, {b.directory} of {of_b}")
        if overlap is None:
            overlap = _empty_overlap(a_routes.signature)
        if b_routes.token_hash != a_routes.token_hash:
            overlap.other_tokens.append(key)
            continue
        overlap.matched += 1
        _add_overlap(overlap, a_routes, b_routes)
    overlap = overlap or _empty_overlap(RouteSignature(0, 0, 0))
    overlap.only = len(a_keys - b_entries.keys()), len(b_entries.keys() - a_keys)
    return overlap


def _empty_overlap(signature: RouteSignature) -> StoreOverlap:
    """Make an overlap of no rows."""
    rows, equal, common = (np.zeros(signature.moe_layers, dtype=np.int64) for _ in range(3))
    return StoreOverlap(signature, rows, equal, common)


def _add_overlap(total: StoreOverlap, a: SampleRoutes, b: SampleRoutes) -> None:
    """Add the overlap of one sample's routes."""
    rows = min(len(a.ids), len(b.ids))
    both = a.valid[:rows] & b.valid[:rows]
    first, last = max(a.first_layer, b.first_layer), min(r.first_layer + r.ids.shape[1] for r in (a, b))
    x, y = (r.ids[:rows][both][:, first - r.first_layer : last - r.first_layer] for r in (a, b))
    for chunk in layer_chunks(len(x), x.shape[1]):
        layers = slice(first + chunk.start, first + chunk.stop)
        a_sets, b_sets = sorted_sets(x[:, chunk]), sorted_sets(y[:, chunk])
        total.rows[layers] += len(x)
        total.equal[layers] += (a_sets == b_sets).all(axis=0).sum(axis=1)
        for expert in a_sets:
            total.common[layers] += (b_sets == expert).any(axis=0).sum(axis=1)


def _readable(store: RouteStore) -> Iterator[tuple[RecordEntry, SampleRoutes]]:
    """Yield the intact records of a store."""
    return store.iter_records(skip_damaged=True)


def print_store(path: str, other: str = "") -> None:
    """Print the statistics of a store and, with `other`, its overlap with that store.

    Args:
        path: directory of the store.
        other: directory of a store to compare with; empty: none.

    Raises:
        UserError: one of the two is no store, or they are of different models.
    """
    console = make_console(soft_wrap=True)
    with RouteStore(path) as store:
        _print_stats(console, store, compute_stats(store))
        if other:
            with RouteStore(other) as second:
                _print_overlap(console, store, second)


def _print_stats(console: Console, store: RouteStore, stats: StoreStats) -> None:
    """Print a store's statistics: lines, and a table of the load by layer."""
    s, steps = stats.signature, {entry.step for entry in store.entries}
    sources = " and ".join(sorted(stats.sources))
    console.print(
        f"{store.directory}: {stats.records:,} samples of {len(steps):,} steps ({min(steps)} to {max(steps)}), "
        f"{sources}; {s.moe_layers} MoE layers, {s.topk} of {s.num_experts} experts"
    )
    console.print(f"rows {stats.rows:,}, with a route {stats.valid:,} ({_share(stats.valid, stats.rows)})")
    console.print("weight versions (rows): " + ", ".join(f"{name} ({rows:,})" for name, rows in stats.versions.items()))
    if stats.valid:
        size, least = stats.encoded / stats.valid, stats.bound / stats.valid
        ratio = f" ({size / least:.3f} of it)" if least else ""
        plain = 4 * s.moe_layers * s.topk
        console.print(f"bytes a row with a route: {size:,.1f}, at least {least:,.1f}{ratio}; int32 takes {plain:,}")
    _print_damage(console, store)
    columns = ("layer", "entropy", "max/mean", "min/mean", "unused", "busiest (share of choices)")
    table = Table(*columns, title="load of the experts", title_justify="left")
    for layer, (load, even) in enumerate(zip(stats.load, load_entropy(stats.load), strict=True)):
        mean = load.mean()
        if not mean:
            table.add_row(str(layer), *["–"] * 5)
            continue
        busiest = ", ".join(f"{e} ({load[e] / load.sum():.1%})" for e in np.argsort(-load, kind="stable")[:_NUM_NAMED])
        unused = str(int((load == 0).sum()))
        numbers = (f"{even:.4f}", f"{load.max() / mean:.2f}", f"{load.min() / mean:.2f}")
        table.add_row(str(layer), *numbers, unused, busiest)
    console.print(table)
    console.print("every expert's load, as a share of its layer's busiest:")
    for layer, load in enumerate(stats.load):
        height = np.ceil(load * (len(_BARS) - 1) / max(load.max(), 1)).astype(int)
        console.print(f"{layer:>5} {''.join(_BARS[h] for h in height)}")


def _print_overlap(console: Console, a: RouteStore, b: RouteStore) -> None:
    """Compare two stores, and print a table by layer."""
    overlap = compare_stores(a, b)
    _print_damage(console, b)
    console.print(
        f"{overlap.matched:,} samples in both; only in {a.directory}: {overlap.only[0]:,}, only in {b.directory}:"
        f" {overlap.only[1]:,}"
    )
    if overlap.other_tokens:
        named = ", ".join(f"step {step} sample {sample}" for step, sample in overlap.other_tokens[:_NUM_NAMED])
        console.print(f"{len(overlap.other_tokens):,} samples are of other tokens and not compared: {named}")
    table = Table("layer", "rows", "same set", "|A ∩ B| / k", title=f"overlap with {b.directory}", title_justify="left")
    sums = zip(overlap.rows, overlap.equal, overlap.common, strict=True)
    for name, rows, equal, common in [
        *((str(layer), *values) for layer, values in enumerate(sums)),
        ("all", overlap.rows.sum(), overlap.equal.sum(), overlap.common.sum()),
    ]:
        table.add_row(name, f"{rows:,}", _share(equal, rows), _share(common, rows * overlap.signature.topk))
    console.print(table)


def _print_damage(console: Console, store: RouteStore) -> None:
    """Print the ranges of a store that could not be read."""
    for damage in store.damage:
        console.print(f"not read: {damage}")


def _share(count: int, total: int) -> str:
    """Format a share in per cent."""
    return f"{count / total:.2%}" if total else "–"
