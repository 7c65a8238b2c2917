"""Run as a script: what loading a Megatron checkpoint says of damage and of malice. Argument: a directory.

Leaves `found.pt`: for each damaged or hostile checkpoint what was said, or "loaded" and whether the weights are those
that were saved; and `ran`, the names of attacks that ran. With a second argument, `save`, it saves and stops in the
middle of it, to be killed.
"""

import functools
import io
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from moe import MODEL

from megatron_bai import config
from megatron_bai.checkpoint import atomic_dir, manifest, safe_unpickle
from megatron_bai.checkpoint.common_state import COMMON, COMMON_OBJECT
from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.distributed import backend
from megatron_bai.errors import UserError
from megatron_bai.model import build, megatron_checkpoint, param_shards


class Attack:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def actor() -> build.MegatronModel:
    settings = config.Config(model=MODEL, backend=config.Backend(kind="cpu"))
    device = backend.init_backend(settings.backend)
    build.init_parallel(settings.parallel, seed=0)
    made = build.build_actor(settings, device, train=False)
    param_shards.init_random(made.modules, MODEL, seed=0)
    return made


def weights(made: build.MegatronModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in made.modules[0].named_parameters()}


def damages(good: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """Copies of a checkpoint, each with one file damaged."""
    chance = random.Random(0)
    for file in sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file()):
        data = (good / file).read_bytes()
        places = [chance.randrange(len(data)) for _ in range(4)]
        changed = {f"bit {at}": data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in places}
        changed |= {"zeros": bytes(4096)[: len(data)] + data[4096:], "cut": data[:-1], "longer": data + b"0"}
        for how, content in {**changed, "gone": None}.items():
            path = Path(shutil.copytree(good, directory / f"{file} {how}"))
            (path / file).unlink()
            if content is not None:
                (path / file).write_bytes(content)
            yield f"{file} {how}", path


def hostile(good: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """Copies with a manifest that agrees: nothing but what is in the files can tell."""
    metadata = safe_unpickle.read_metadata(good / ".metadata")
    key = "embedding.word_embeddings.weight"
    place = next(at for at in metadata.storage_data if at.fqn == key)

    def attack(path: Path, name: str) -> bytes:
        file = io.BytesIO()
        torch.save(Attack(directory / "ran" / name), file)
        return file.getvalue()

    def index(path: Path, change: Callable) -> None:
        found = safe_unpickle.read_metadata(good / ".metadata")
        change(found, found.storage_data[place])
        (path / ".metadata").write_bytes(pickle.dumps(found))

    def item(path: Path, content: bytes) -> None:
        (path / "other.distcp").write_bytes(content)

        def point(found, info) -> None:
            info.relative_path, info.offset, info.length = "other.distcp", 0, len(content)

        index(path, point)

    def common(path: Path, name: str) -> None:
        write_common(path, attack(path, name))

    def write_common(path: Path, content: bytes) -> None:
        if (path / COMMON).is_file():
            (path / COMMON).write_bytes(content)
            return
        (path / "common.distcp").write_bytes(content)

        def point(found, info) -> None:
            (at,) = (at for at in found.storage_data if at.fqn == COMMON_OBJECT)
            info = found.storage_data[at]
            info.relative_path, info.offset, info.length = "common.distcp", 0, len(content)

        index(path, point)

    def read_common(path: Path) -> bytes:
        with TorchDistReader(path) as reader:
            return (path / COMMON).read_bytes() if (path / COMMON).is_file() else reader.read_object(COMMON_OBJECT)

    def as_object(path: Path, name: str) -> None:
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        item(path, attack(path, name))
        found = pickle.loads((path / ".metadata").read_bytes())
        stored = found.state_dict_metadata[key]
        found.state_dict_metadata[key] = BytesStorageMetadata()
        found.state_dict_metadata[key].size = stored.size  # Megatron-Core asks for nothing else
        found.storage_data[MetadataIndex(key)] = found.storage_data.pop(place)
        (path / ".metadata").write_bytes(pickle.dumps(found))

    def repacked(file: bytes) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        return packed.getvalue()

    def compressed(path: Path, name: str) -> None:
        info = metadata.storage_data[place]
        item(path, repacked((good / info.relative_path).read_bytes()[info.offset : info.offset + info.length]))

    makers: dict[str, Callable[[Path, str], None]] = {
        "common": common,
        "object": as_object,
        "item": lambda path, name: item(path, attack(path, name)),
        "index": lambda path, name: (path / ".metadata").write_bytes(pickle.dumps(Attack(directory / "ran" / name))),
        "compressed": compressed,
        "compressed common": lambda path, _: write_common(path, repacked(read_common(good))),
        "outside": lambda path, _: index(path, lambda _, info: setattr(info, "relative_path", "../good/__0_0.distcp")),
        "negative": lambda path, _: index(path, lambda _, info: setattr(info, "offset", -1)),
        "huge": lambda path, _: index(path, lambda _, info: setattr(info, "length", 1 << 60)),
        "config": lambda path, _: (path / "config.json").write_text("[" * 100_000),
    }
    for name, make in makers.items():
        path = Path(shutil.copytree(good, directory / f"hostile {name}"))
        make(path, name)
        yield f"hostile {name}", manifest.finalize(path.rename(atomic_dir.staging_path(path)), path, {})


def look(directory: Path) -> None:
    from megatron.core import dist_checkpointing

    made, good = actor(), directory / "good"
    saved, found = weights(made), {}
    (directory / "ran").mkdir()
    megatron_checkpoint.save(made, good, Path("none"), {"step": 3})
    for name, path in (("good", good), *damages(good, directory), *hostile(good, directory)):
        param_shards.init_random(made.modules, MODEL, seed=1)
        try:
            megatron_checkpoint.load(made, path)
            same = all(torch.equal(value, saved[key]) for key, value in weights(made).items())
            found[name] = f"loaded {same}"
        except UserError as error:
            found[name] = str(error)
        except BaseException as error:
            found[name] = f"traceback {error!r}"
    ran = {path.name for path in (directory / "ran").iterdir()}
    try:  # what Megatron-Core's reader does by itself
        dist_checkpointing.load(megatron_checkpoint.sharded_state(made), str(directory / "hostile object"))
    except BaseException:  # CheckpointException is none of Exception's
        pass
    premise = {path.name for path in (directory / "ran").iterdir()} - ran
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 3000, 50_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            megatron_checkpoint.save(made, directory / "full", Path("none"), {})
        except UserError as error:
            found[f"full {limit}"] = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torch.save({"said": found, "ran": ran, "premise": premise}, directory / "found.pt")


def stop_while_saving(directory: Path) -> None:
    """Save once, then again, where a writer stops in the middle of a file."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    made = actor()
    megatron_checkpoint.save(made, directory / "target", Path("none"), {"step": 1})
    write, written = filesystem_async._write_item, []

    @functools.wraps(write)  # its parameters are looked at
    def stop(*arguments, **options):
        if len(written) == 5:
            os.write(sys.stdout.fileno(), b"in the middle\n")  # at once: two writers do
            signal.pause()
        written.append(None)
        return write(*arguments, **options)

    filesystem_async._write_item = stop
    param_shards.init_random(made.modules, MODEL, seed=1)
    megatron_checkpoint.save(made, directory / "target", Path("none"), {"step": 2})


if __name__ == "__main__":
    (stop_while_saving if sys.argv[2:] == ["save"] else look)(Path(sys.argv[1]))
    backend.shutdown_backend()
