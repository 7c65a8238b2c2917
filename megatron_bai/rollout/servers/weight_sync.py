"""Sync of weights to running SGLang servers, and the check that they arrived.

Order: pause and abort → drain → load → flush → continue. SGLang 0.5.21 has three traps here:

- A partial or unknown set of tensors is accepted with success, one of a wrong shape kills the server, and a failed
  load is rolled back from the *new* path (model_executor/model_runner_components/weight_updater.py). So names and
  shapes are compared before anything is sent.
- `/update_weights_from_disk` with `flush_cache` asserts in the scheduler that nothing runs; a request still leaving
  the pipeline would kill it. `/flush_cache?timeout=` waits instead, and says if it could not.
- `/server_info` keeps the version given at launch; `/model_info` has the live one.

Weights travel in one of three ways: as a checkpoint that the servers read (`sync_from_disk`), or as tensors out of the
trainer's memory (`sync_from_tensors`), in buckets of bounded size that a weight transport sends:
`HttpTransport` in the request's body, or `broadcast_transport.BroadcastTransport` through a process group that trainer
and servers share.
"""

import base64
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import control, releases

Shapes = dict[str, tuple[int, ...]]
Bucket = list[tuple[str, torch.Tensor]]
T = TypeVar("T")
_DRAIN_S = 60.0  # for requests to leave the server after they were aborted


def on_all_servers(urls: Sequence[str], call: Callable[[str], T]) -> list[T]:
    """Call a function for every server at once. All calls have ended when the first failure is raised.

    Args:
        urls: of the servers.
        call: gets a server's URL.

    Returns:
        The results, in order.
    """
    with ThreadPoolExecutor(max(1, len(urls))) as pool:
        futures = [pool.submit(call, url) for url in urls]
    return [future.result() for future in futures]


def tensor_shapes(model_dir: str | Path) -> Shapes:
    """Read the names and shapes of a Hugging Face checkpoint's tensors, from its headers.

    Raises:
        UserError: the directory holds no readable safetensors.
    """
    from safetensors import SafetensorError, safe_open

    shapes: Shapes = {}
    try:
        for path in sorted(Path(model_dir).glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    if not shapes:
        raise UserError(f"{model_dir} holds no safetensors")
    return shapes


def sync_from_disk(
    urls: Sequence[str], model_dir: str | Path, version: str, expected: Shapes, timeout_s: float = 600.0
) -> None:
    """Make the servers load a checkpoint; from then on their samples carry `version`.

    Requests in flight are aborted and return the tokens so far. The servers continue also after an error.

    Args:
        urls: of the servers.
        model_dir: a Hugging Face checkpoint that the servers' machines can read, of the model they serve.
        version: a name for the weights.
        expected: `tensor_shapes` of what the servers were started with.
        timeout_s: for reading the weights.

    Raises:
        UserError: the checkpoint is another model's, a server refused or broke, or does not report `version`.
    """
    check_shapes(tensor_shapes(model_dir), expected, str(model_dir))
    body = {"model_path": str(Path(model_dir).resolve()), "weight_version": version, "flush_cache": False}
    with _paused(urls, resume_on_error=True):
        on_all_servers(urls, _flush_cache)
        on_all_servers(urls, lambda url: control.post(url, "/update_weights_from_disk", body, timeout_s))
        on_all_servers(urls, _flush_cache)
    _check_versions(urls, version)


class WeightTransport(Protocol):
    """A way of tensors from the trainer to the servers."""

    def send(self, bucket: Bucket) -> None:
        """Send tensors, under Hugging Face's names and unsharded, and wait until every server has loaded them."""


class HttpTransport:
    """A weight transport in the body of a request. Servers unpickle it: use it only with servers that a run starts.

    Args:
        sizes: tensor-parallel ranks of each server, each of which takes its part of the whole tensors.
    """

    def __init__(self, urls: Sequence[str], sizes: Sequence[int], timeout_s: float = 600.0):
        self._sizes, self._timeout_s = dict(zip(urls, sizes, strict=True)), timeout_s

    def send(self, bucket: Bucket) -> None:
        """Send a bucket, and wait until every server has loaded it."""
        # A clone, since a view would take its whole storage along.
        named = [(name, tensor.detach().cpu().clone()) for name, tensor in bucket]
        data = base64.b64encode(pickle_tensors(named)).decode()

        def post(url: str) -> None:
            body = {"serialized_named_tensors": [data] * self._sizes[url], "flush_cache": False}
            control.post(url, "/update_weights_from_tensor", body, self._timeout_s)

        on_all_servers(list(self._sizes), post)


def pickle_tensors(bucket: Bucket) -> bytes:
    """Pickle tensors on the host as SGLang unpickles them: by names of torch's functions alone.

    Plain pickle carries the values; torch's own for processes would carry names of shared memory. Megatron-Core (from
    0.17.1, where it is imported) puts a function of its own, a stricter one, in the place of torch's that loads
    storages, and a pickle would name that: SGLang's scheduler ends on names that it does not know.
    """
    load_storage: Any = torch.storage._load_from_bytes
    load_storage.__module__, load_storage.__qualname__ = "torch.storage", "_load_from_bytes"  # where it is found
    return pickle.dumps(bucket)


def sync_from_tensors(
    urls: Sequence[str],
    named: Iterable[tuple[str, torch.Tensor]],
    version: str,
    expected: Shapes,
    transport: WeightTransport,
    bucket_bytes: int,
    together: Sequence[str] = (),
) -> None:
    """Send the servers tensors; from then on their samples carry `version`.

    A failure on the way leaves servers with some of the new weights: they stay paused, and sample nothing.

    Args:
        urls: of the servers.
        named: every tensor of the model, under Hugging Face's names; read one after the other.
        version: a name for the weights.
        expected: names and shapes of the model served.
        transport: sends the tensors.
        bucket_bytes: of tensors that are held and sent together; a larger one goes alone.
        together: endings of names that share what precedes them, and go in one bucket: `Family.loaded_together`.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; a server refused, broke, or does not report
            `version`.
    """
    missing = dict(expected)
    with_session = [url for url, release in releases.releases(urls).items() if release.needs_update_session]
    with _paused(urls, resume_on_error=False):
        on_all_servers(urls, _flush_cache)
        on_all_servers(with_session, lambda url: control.post(url, "/begin_weight_update", {}))
        for bucket in _make_buckets(_group(named, together), bucket_bytes):
            for name, tensor in bucket:
                shape = tuple(tensor.shape)
                if missing.pop(name, None) != shape:
                    served = expected.get(name, "none, or sent before")
                    raise UserError(f"weight sync {version}: {name} has shape {shape}, the servers' has {served}")
            transport.send(bucket)
        if missing:
            raise UserError(f"weight sync {version}: {len(missing)} tensors were not sent, first {min(missing)}")
        on_all_servers(with_session, lambda url: control.post(url, "/end_weight_update", {}))
        body = {"new_version": version, "abort_all_requests": False}
        on_all_servers(urls, lambda url: control.post(url, "/update_weight_version", body))
        on_all_servers(urls, _flush_cache)
    _check_versions(urls, version)


def _group(named: Iterable[tuple[str, torch.Tensor]], together: Sequence[str]) -> Iterator[Bucket]:
    """Yield tensors alone, but those that belong together when the last of them has come."""
    waiting: dict[str, Bucket] = {}
    for name, tensor in named:
        ending = next((each for each in together if name.endswith(each)), None)
        if ending is None:
            yield [(name, tensor)]
            continue
        stem = name.removesuffix(ending)
        waiting.setdefault(stem, []).append((name, tensor))
        if len(waiting[stem]) == len(together):
            yield waiting.pop(stem)
    yield from waiting.values()  # a layer that has not all of them


def _make_buckets(groups: Iterable[Bucket], limit: int) -> Iterator[Bucket]:
    """Join groups of tensors into buckets of at most `limit` bytes; a larger group is a bucket alone."""
    bucket: Bucket = []
    size = 0
    for group in groups:
        num_bytes = sum(tensor.nbytes for _, tensor in group)
        if bucket and size + num_bytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket += group
        size += num_bytes
    if bucket:
        yield bucket


def _check_versions(urls: Sequence[str], version: str) -> None:
    """Check that every server reports the new version."""
    for url, found in zip(urls, on_all_servers(urls, control.weight_version), strict=True):
        if found != version:
            raise UserError(f"SGLang at {url} reports weights {found!r} after an update to {version!r}")


def check_shapes(found: Shapes, expected: Shapes, where: str) -> None:
    """Raise a UserError unless a checkpoint has the served model's tensors.

    Args:
        found: names and shapes of the checkpoint.
        expected: names and shapes of the model served.
        where: names the checkpoint in the error.
    """
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]} for {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise UserError(f"{where} is not the served model: {problems[0]} ({len(problems)} such tensors)")


@contextmanager
def _paused(urls: Sequence[str], resume_on_error: bool) -> Iterator[None]:
    """Pause the servers for the block, aborting their requests; they resume at its end.

    Args:
        urls: of the servers.
        resume_on_error: resume after a failure in the block, too.
    """
    try:
        on_all_servers(urls, lambda url: control.post(url, "/pause_generation", {"mode": "abort"}, _DRAIN_S))
        yield
    except BaseException:
        for url in urls if resume_on_error else ():
            with suppress(UserError):  # the first failure is the one to report
                control.post(url, "/continue_generation", {})
        raise
    on_all_servers(urls, lambda url: control.post(url, "/continue_generation", {}))


def _flush_cache(url: str) -> None:
    """Wait until nothing runs, then drop every cached key and value."""
    control.post(url, f"/flush_cache?timeout={_DRAIN_S:g}", {}, 2 * _DRAIN_S)
