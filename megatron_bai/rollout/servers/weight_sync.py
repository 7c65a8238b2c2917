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
and servers share. Several ranks of a trainer send theirs by `group_sync.GroupSync`.
"""

import base64
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import control, releases
from megatron_bai.rollout.servers.weight_buckets import (
    Bucket,
    Coverage,
    Shapes,
    group_together,
    make_buckets,
    pickle_bucket,
)

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

    def start(self, bucket: Bucket) -> Callable[[], object]:
        """Start to send tensors, under Hugging Face's names and unsharded.

        Returns:
            Waits until every server has loaded them; raises what a server refused them with.
        """


class HttpTransport:
    """A weight transport in the body of a request. Servers unpickle it: use it only with servers that a run starts.

    Args:
        sizes: tensor-parallel ranks of each server, each of which takes its part of the whole tensors.
    """

    def __init__(self, urls: Sequence[str], sizes: Sequence[int], timeout_s: float = 600.0):
        self._sizes, self._timeout_s = dict(zip(urls, sizes, strict=True)), timeout_s
        self._thread = ThreadPoolExecutor(1)

    def start(self, bucket: Bucket) -> Callable[[], object]:
        """Start to send a bucket; it is copied before this returns."""
        data = base64.b64encode(pickle_bucket(bucket)).decode()

        def post(url: str) -> None:
            body = {
                "serialized_named_tensors": [data] * self._sizes[url],
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            control.post(url, "/update_weights_from_tensor", body, self._timeout_s)

        loading = self._thread.submit(on_all_servers, list(self._sizes), post)
        return loading.result


def sync_from_tensors(
    urls: Sequence[str],
    named: Iterable[tuple[str, torch.Tensor]],
    version: str,
    expected: Shapes,
    transport: WeightTransport,
    bucket_bytes: int,
    together: Sequence[str] = (),
    unchanged: Collection[str] = (),
) -> None:
    """Send the servers tensors; from then on their samples carry `version`.

    While a bucket is sent, the next one is made of `named`, in the caller's thread. A failure on the way leaves servers
    with some of the new weights: they stay paused, and sample nothing.

    Args:
        urls: of the servers.
        named: every tensor of the model, under Hugging Face's names; read one after the other.
        version: a name for the weights.
        expected: names and shapes of the model served.
        transport: sends the tensors.
        bucket_bytes: of tensors that are held and sent together; a larger one goes alone.
        together: endings of names that share what precedes them, and go in one bucket: `Family.loaded_together`.
        unchanged: names that are not in `named`, since the servers have those tensors.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; a server refused, broke, or does not report
            `version`.
    """
    coverage = Coverage(version, expected, unchanged)
    with tensor_update(urls, version):
        wait: Callable[[], object] | None = None
        for bucket in make_buckets(group_together(named, together), bucket_bytes):
            if wait:
                wait()
            for name, tensor in bucket:
                coverage.add(name, tuple(tensor.shape))
            wait = transport.start(bucket)
        if wait:
            wait()
        coverage.require_complete()


@contextmanager
def tensor_update(urls: Sequence[str], version: str) -> Iterator[None]:
    """Let servers take tensors in the block; from its end on their samples carry `version`.

    After a failure in the block they stay paused.

    Args:
        urls: of the servers.
        version: a name for the weights.

    Raises:
        UserError: a server refused, broke, or does not report `version`.
    """
    with_session = [url for url, release in releases.releases(urls).items() if release.needs_update_session]
    with _paused(urls, resume_on_error=False):
        on_all_servers(urls, _flush_cache)
        on_all_servers(with_session, lambda url: control.post(url, "/begin_weight_update", {}))
        yield
        on_all_servers(with_session, lambda url: control.post(url, "/end_weight_update", {}))
        body = {"new_version": version, "abort_all_requests": False}
        on_all_servers(urls, lambda url: control.post(url, "/update_weight_version", body))
        on_all_servers(urls, _flush_cache)
    _check_versions(urls, version)


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
