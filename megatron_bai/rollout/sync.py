"""Brings new weights to a running SGLang server, and proves that they arrived.

Order: pause and abort → drain → load → flush → continue. SGLang 0.5.21 has three traps here:

- A partial or unknown set of tensors is accepted with success, one of a wrong shape kills the server, and a failed
  load is rolled back from the *new* path (model_executor/model_runner_components/weight_updater.py). So names and
  shapes are compared before anything is sent.
- `/update_weights_from_disk` with `flush_cache` asserts in the scheduler that nothing runs; a request still leaving
  the pipeline would kill it. `/flush_cache?timeout=` waits instead, and says if it could not.
- `/server_info` keeps the version given at launch; `/model_info` has the live one.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_bai.errors import UserError
from megatron_bai.rollout import control

Shapes = dict[str, tuple[int, ...]]
_DRAIN_S = 60.0  # for requests to leave the server after they were aborted


def tensor_shapes(model_dir: str | Path) -> Shapes:
    """Names and shapes of a Hugging Face checkpoint's tensors, from its headers.

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
    url: str, model_dir: str | Path, version: str, expected: Shapes, timeout_s: float = 600.0
) -> None:
    """Load a checkpoint into the server; from then on its samples carry `version`.

    Requests in flight are aborted and return what they have. Whatever happens, the server is asked to go on.

    Args:
        url: the server's.
        model_dir: a Hugging Face checkpoint that the server's machine can read, of the model it serves.
        version: a name for the weights.
        expected: `tensor_shapes` of what the server was started with.
        timeout_s: for reading the weights.

    Raises:
        UserError: the checkpoint is another model's, the server refused or broke, or it does not report `version`.
    """
    check_shapes(tensor_shapes(model_dir), expected, str(model_dir))
    with _paused(url):
        _flush(url)
        body = {"model_path": str(Path(model_dir).resolve()), "weight_version": version, "flush_cache": False}
        control.post(url, "/update_weights_from_disk", body, timeout_s)
        _flush(url)
    found = control.weight_version(url)
    if found != version:
        raise UserError(f"SGLang at {url} reports weights {found!r} after an update to {version!r}")


def check_shapes(found: Shapes, expected: Shapes, where: str) -> None:
    """Raise a UserError that names a missing, unknown or differently shaped tensor."""
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
def _paused(url: str) -> Iterator[None]:
    """Abort what runs and hold back what comes, while the block runs."""
    try:
        control.post(url, "/pause_generation", {"mode": "abort"}, _DRAIN_S)
        yield
    except BaseException:
        with suppress(UserError):  # the first failure is the one to report
            control.post(url, "/continue_generation", {})
        raise
    control.post(url, "/continue_generation", {})


def _flush(url: str) -> None:
    """Wait until nothing runs, then drop every cached key and value."""
    control.post(url, f"/flush_cache?timeout={_DRAIN_S:g}", {}, 2 * _DRAIN_S)
