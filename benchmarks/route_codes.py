"""The store's code of sets beside sorted differences with zstd, on the routes of real runs.

    python benchmarks/route_codes.py runs/demo/routes runs/gap/routes     # stores that `replay.store` wrote
    python benchmarks/route_codes.py                                      # routes that are drawn: uniform and skewed

Encoded is each sample by itself, as the store holds it, in the same envelope; then all rows as one sample, and these in
another order, which leaves the load of the experts and takes away that texts repeat:

    plain         ids as they are
    compact       `routing/store/expert_set_code.py`
    zstd          sorted ids, differences less one, slot after slot and layer after layer, in one zstd frame (level 3)
    zstd, layers  a frame a layer, so that a pipeline stage's layers can be sliced from it, as from the two first

zstd is pyarrow's, of the extra `datasets`, which a run does not depend on. Every sample is encoded and decoded by each
code, one after the other, in `--rounds` rounds; what is decoded is what was encoded. Seconds are of the processor, the
least of the rounds. Those of the first two contain the envelope's checks, zstd's none.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow

from megatron_bai.routing.routes import RouteSignature
from megatron_bai.routing.store.codec import SampleRoutes, decode, encode, min_bytes
from megatron_bai.routing.store.route_store import RouteStore

LEVEL = 3
Code = tuple[Callable[[SampleRoutes], list[bytes]], Callable[[list[bytes], SampleRoutes], np.ndarray]]


def make_differences(ids: np.ndarray) -> np.ndarray:
    """Return `[layers, topk, rows]` of ids `[rows, layers, topk]`: the smallest id, then differences less one."""
    ordered = np.sort(ids, axis=-1)
    ordered[..., 1:] -= ordered[..., :-1] + 1
    return np.ascontiguousarray(ordered.transpose(1, 2, 0))


def sum_differences(differences: np.ndarray) -> np.ndarray:
    """Return the ids `[rows, layers, topk]`, ascending, of which `make_differences` made these."""
    ids = differences.copy()
    ids[:, 1:] += 1
    return np.ascontiguousarray(ids.cumsum(axis=1, dtype=ids.dtype).transpose(2, 0, 1))


def zstd(by_layer: bool) -> Code:
    """Make the code of sorted differences, in one frame or in one a layer."""
    codec = pyarrow.Codec("zstd", LEVEL)

    def write(routes: SampleRoutes) -> list[bytes]:
        differences = make_differences(routes.ids[routes.valid])
        return [codec.compress(part.tobytes(), asbytes=True) for part in (differences if by_layer else [differences])]

    def read(frames: list[bytes], routes: SampleRoutes) -> np.ndarray:
        rows, (_, layers, topk) = int(routes.valid.sum()), routes.ids.shape
        num_bytes = rows * layers * topk * routes.ids.itemsize // len(frames)
        data = b"".join(codec.decompress(frame, num_bytes, asbytes=True) for frame in frames)
        return sum_differences(np.frombuffer(data, routes.ids.dtype).reshape(layers, topk, rows))

    return write, read


def envelope(encoding: str) -> Code:
    """Make one of the store's own codes."""
    return (
        lambda routes: [encode(routes, encoding)],
        lambda frames, routes: decode(frames[0], routes.signature).ids[routes.valid],
    )


CODES = {"plain": envelope("plain"), "compact": envelope("compact"), "zstd": zstd(False), "zstd, layers": zstd(True)}


def draw(skewed: bool, samples: int = 4, tokens: int = 2048) -> list[SampleRoutes]:
    """Draw routes of 8 of 128 experts in 8 layers, all equally likely or with the weights 1 / (1 + number)."""
    random, signature = np.random.default_rng(0), RouteSignature(8, 128, 8)
    log_weights = -np.log1p(np.arange(128)) if skewed else np.zeros(128)
    drawn = []
    for _ in range(samples):
        scores = log_weights + random.gumbel(size=(tokens, 8, 128))
        ids = scores.argpartition(-8, axis=-1)[..., -8:].astype(signature.dtype)
        drawn.append(SampleRoutes(signature, ids, np.ones(tokens, dtype=bool), (), bytes(16)))
    return drawn


def read(store: Path) -> list[SampleRoutes]:
    with RouteStore(store) as opened:
        return [routes for _, routes in opened.iter_records()]


def join(samples: list[SampleRoutes], shuffled: bool) -> list[SampleRoutes]:
    """Make one sample of the rows of all, in their order or in none."""
    ids = np.concatenate([routes.ids[routes.valid] for routes in samples])
    if shuffled:
        np.random.default_rng(0).shuffle(ids)
    return [SampleRoutes(samples[0].signature, ids, np.ones(len(ids), dtype=bool), (), bytes(16))]


def measure(name: str, samples: list[SampleRoutes], rounds: int) -> None:
    """Print a table's rows of one set of routes."""
    sets, signature = sum(routes.num_sets for routes in samples), samples[0].signature
    tokens = sum(int(routes.valid.sum()) for routes in samples)
    header = sum(len(encode(routes, "plain")) - routes.ids[routes.valid].nbytes for routes in samples)
    spent: dict[str, list[tuple[float, float]]] = {code: [] for code in CODES}
    sizes = dict.fromkeys(CODES, 0)
    for _ in range(rounds + 1):  # the first builds tables
        for code, (write, take) in CODES.items():
            began = time.process_time()
            written = [write(routes) for routes in samples]
            middle = time.process_time()
            found = [take(frames, routes) for frames, routes in zip(written, samples)]
            spent[code].append((middle - began, time.process_time() - middle))
            for ids, routes in zip(found, samples):
                assert np.array_equal(np.sort(ids), np.sort(routes.ids[routes.valid])), code
            sizes[code] = sum(len(frame) for frames in written for frame in frames)
            sizes[code] += header if code.startswith("zstd") else 0
    bound = min_bytes(signature, sets) / tokens
    shape = f"{signature.moe_layers} layers, {signature.topk} of {signature.num_experts} experts"
    print(f"{name}: {len(samples)} samples, {tokens / len(samples):.0f} rows, {shape}; bound {bound:.2f} bytes a token")
    for code, size in sizes.items():
        encoding, decoding = (min(each[i] for each in spent[code][1:]) / sets * 1e9 for i in (0, 1))
        ratio = size / sizes["compact"]
        print(f"| {name} | {code} | {size / tokens:.2f} | {ratio:.2f} | {encoding:.0f} | {decoding:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="*", help="directories that `replay.store` named")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sources = {str(store): read(store) for store in options.stores}
    for name, samples in list(sources.items()):
        sources |= {f"{name}, joined": join(samples, False), f"{name}, joined and shuffled": join(samples, True)}
    sources = sources or {"uniform": draw(False), "skewed": draw(True)}
    print(
        "| routes | code | bytes a token | of compact | ns a set to encode | ns to decode |\n|---|---|---|---|---|---|"
    )
    for name, samples in sources.items():
        measure(name, samples, options.rounds)


if __name__ == "__main__":
    main()
