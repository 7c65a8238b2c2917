import io
import json
import os
import pickle
import zipfile

import checkpoints
import pytest
import torch

from megatron_bai.checkpoint.torch_dist import TorchDistReader
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError

LAYOUTS = [checkpoints.whole, checkpoints.rows, checkpoints.columns, checkpoints.experts, checkpoints.irregular]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_region_of_any_layout(tmp_path, layout):
    tensors = checkpoints.model(0)
    generator = torch.Generator().manual_seed(1)
    with TorchDistReader(checkpoints.write(tmp_path / "c", tensors, layout)) as source:
        for key, tensor in tensors.items():
            for _ in range(8):
                low = [int(torch.randint(0, n, (), generator=generator)) for n in tensor.shape]
                size = [int(torch.randint(1, n - o + 1, (), generator=generator)) for n, o in zip(tensor.shape, low)]
                box = tuple(slice(o, o + s) for o, s in zip(low, size))
                assert torch.equal(source.read(key, tuple(low), tuple(size)), tensor[box])


def test_tensors_saved_with_other_strides(tmp_path):
    tensor = torch.randn(5, 7, 3).permute(2, 0, 1)  # torch.save keeps the strides
    path = checkpoints.write(tmp_path / "c", {"w": tensor.contiguous()})
    file = io.BytesIO()
    torch.save(tensor, file)
    assert len(file.getvalue()) == len((path / "__0_0.distcp").read_bytes()), "the index still fits"
    (path / "__0_0.distcp").write_bytes(file.getvalue())
    assert torch.load(path / "__0_0.distcp").stride() == tensor.stride(), "the test's premise"
    with TorchDistReader(path) as source:
        assert torch.equal(source.read("w", (1, 2, 3), (2, 3, 4)), tensor[1:3, 2:5, 3:7])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64, torch.bool, torch.uint16])
def test_dtypes(tmp_path, dtype):
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    assert torch.equal(checkpoints.read(checkpoints.write(tmp_path / "c", {"w": tensor}))["w"], tensor)


def test_large_regions_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_bai.checkpoint.reader.READ_BYTES", 64)
    tensors = checkpoints.model(3)
    for layout in LAYOUTS:
        found = checkpoints.read(checkpoints.write(tmp_path / layout.__name__, tensors, layout))
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_index_is_refused_and_not_run(tmp_path):
    path = checkpoints.write(tmp_path / "c", checkpoints.model(0))
    (path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    with pytest.raises(UserError, match=r"\.metadata is not a checkpoint's index .*posix\.mkdir"):
        TorchDistReader(path)
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Attack(tmp_path / "owned")))
    assert (tmp_path / "owned").exists(), "the attack itself works"


@pytest.mark.parametrize("name", ["torch.load", "torch.hub.load", "builtins.eval", "torch.serialization.os.system"])
def test_nothing_but_the_listed_names_is_found(tmp_path, name):
    path = checkpoints.write(tmp_path / "c", checkpoints.model(0))
    module, attribute = name.split(".", 1) if name != "torch.hub.load" else ("torch.hub", "load")
    (path / ".metadata").write_bytes(
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
        + b"\x93."
    )
    with pytest.raises(UserError, match="nothing in it was run"):
        TorchDistReader(path)


def test_a_malicious_tensor_is_refused_and_not_run(tmp_path):
    path = checkpoints.write(tmp_path / "c", {"w": torch.ones(3)})
    torch.save(Attack(tmp_path / "owned"), tmp_path / "attack.pt")
    item = (tmp_path / "attack.pt").read_bytes()
    file = path / "__0_0.distcp"
    old = file.read_bytes()
    # an item of the same length that ends as the archive of the attack does
    file.write_bytes(item.rjust(len(old), b"\0") if len(item) < len(old) else item)
    with TorchDistReader(path) as source, pytest.raises(UserError, match="the item of w at byte 0 is damaged"):
        source.read("w", (0,), (3,))
    assert not (tmp_path / "owned").exists()


def test_a_truncated_file_is_named(tmp_path):
    path = checkpoints.write(tmp_path / "c", checkpoints.model(0))
    file = path / "__1_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=r"__1_0\.distcp has \d+ bytes of at least \d+"):
        TorchDistReader(path)


def test_a_missing_file_is_named(tmp_path):
    path = checkpoints.write(tmp_path / "c", checkpoints.model(0))
    (path / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp is missing"):
        TorchDistReader(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = checkpoints.write(tmp_path / "c", {"w": torch.full((64,), 1.5)})
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    at = data.index(torch.full((64,), 1.5).numpy().tobytes())
    data[at + 100] ^= 1
    file.write_bytes(data)
    assert not torch.equal(torch.load(file), torch.full((64,), 1.5)), "torch itself loads it without a word"
    for parts in ([(0, 64)], [(0, 30), (30, 34)], [(34, 30), (0, 34)], [(40, 3)], [(0, 40), (20, 44)]):
        with (
            TorchDistReader(path) as source,
            pytest.raises(UserError, match="the bytes of w are not those that were saved"),
        ):
            for start, size in parts:
                source.read("w", (start,), (size,))
            source.verify_records(["w"], RankGroup())


def test_an_unfinished_checkpoint_is_refused(tmp_path):
    path = checkpoints.write(tmp_path / "c", checkpoints.model(0))
    (path / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"has no metadata\.json: it was never finished"):
        TorchDistReader(path)
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(UserError, match="give the directory of one"):
        TorchDistReader(path)


def test_other_formats_and_damage_are_named(tmp_path):
    path = checkpoints.write(tmp_path / "c", checkpoints.model(0))
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(UserError, match="in the format zarr"):
        TorchDistReader(path)
    (path / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="metadata.json is damaged"):
        TorchDistReader(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        TorchDistReader(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],  # overlap and hole, in sum the right size
        [((0, 0), (2, 4))],
        [((0, 0), (4, 4)), ((2, 0), (2, 4))],
        [((0, 0), (1, 1)), ((0, 1), (1, 3)), ((0, 0), (3, 4))],
    ],
)
def test_holes_and_overlaps_are_refused(tmp_path, boxes):
    path = checkpoints.write(tmp_path / "c", {"w": torch.ones(4, 4)}, lambda key, shape: boxes)
    with pytest.raises(UserError, match="the chunks of w overlap or leave holes"):
        TorchDistReader(path)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0), (300, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn])
def test_items_are_archives_as_torch_save_makes_them(tmp_path, shape, dtype):
    """Two of a shape, so that the second reuses the first's frame; the zip's own checksums must hold."""
    for value in (1.0, 2.0):
        tensor = torch.full(shape, value).to(dtype)
        path = checkpoints.write(tmp_path / str(value), {"w": tensor})
        file = path / "__0_0.distcp"
        assert zipfile.ZipFile(file).testzip() is None
        assert torch.equal(torch.load(file, weights_only=True), tensor) and torch.load(file).dtype == dtype


def test_checksums_that_torch_did_not_compute_are_not_asked_for(tmp_path):
    path = checkpoints.write(tmp_path / "c", {"w": torch.ones(64), "v": torch.ones(64)})
    digests = []
    for compute in (False, True):
        file = io.BytesIO()
        torch.serialization.set_crc32_options(compute)
        torch.save(torch.full((64,), 2.0), file)
        (path / "__0_0.distcp").write_bytes(file.getvalue())
        with TorchDistReader(path) as source:
            assert torch.equal(source.read("w", (0,), (64,)), torch.full((64,), 2.0))
            assert (
                source.locate_record(source.tensors["w"], source.tensors["w"].chunks[0]).crc32 is not None
            ) == compute
            digests.append(source.verify_records(["w"], RankGroup()))
    assert digests[0] == digests[1], "the digest is of the content"
