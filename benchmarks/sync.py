"""How fast new weights reach a server, by each way they can travel.

    python benchmarks/sync.py --mib 256 --repeat 3

Serves a random Qwen3-MoE of about `--mib` MiB, and in turns brings it two sets of weights:

    copy      no server: the bytes, copied from one place in memory to another
    file      no server: the bytes, written to a file and read back
    disk      a checkpoint is written and the server reads it (`rollout.sync=disk`)
    tensors   over HTTP
    group     through a process group, gloo on a CPU

Seconds are those of the whole sync: pause, flush, transfer, load, proof of the version. The weights start in the
memory of this process, which plays rank 0 of a trainer; gathering them from other ranks is not part of it. The best of
`--repeat` counts. What was served after each sync is compared with the weights sent.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bai.config import Rollout
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers import weight_sync
from megatron_bai.rollout.servers.broadcast_transport import BroadcastTransport
from megatron_bai.rollout.servers.sglang_server import SGLangServer
from megatron_bai.routing.routes import RouteSignature

VOCAB, LAYERS, EXPERTS, TOPK = 512, 4, 16, 4
PROBE = [list(range(2, 40))]


def make(directory: Path, seed: int, mib: int) -> Path:
    """A checkpoint of about this size, most of it in its experts; each of its tensors is random."""
    hidden = 256
    width = max(32, (mib << 20) // (LAYERS * EXPERTS * 3 * hidden * 4) // 32 * 32)
    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # transformers knows head_dim, but not as a field
        vocab_size=VOCAB, hidden_size=hidden, moe_intermediate_size=width, intermediate_size=width, num_experts=EXPERTS,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts_per_tok=TOPK,
        norm_topk_prob=True, max_position_embeddings=256, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bucket-mib", type=int, default=Rollout().sync_bucket_mib)
    parser.add_argument("--dir", type=Path, help="where the checkpoints lie")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.dir) as root:
        _measure(Path(root), asked)


def _measure(root: Path, asked: argparse.Namespace) -> None:
    sources = [make(root / str(seed), seed, asked.mib) for seed in range(2)]
    shapes = weight_sync.tensor_shapes(sources[0])
    weights = [load_file(source / "model.safetensors") for source in sources]
    nbytes = sum(tensor.nbytes for tensor in weights[0].values())
    rollout, bucket = Rollout(max_total_tokens=1024, sync="tensors"), asked.bucket_mib << 20
    with SGLangServer(sources[0], rollout, root / "server.log") as server:
        urls = [server.url]
        signature = RouteSignature(moe_layers=LAYERS, num_experts=EXPERTS, topk=TOPK)
        client = RolloutClient(urls, rollout, RouteFormat(signature), VOCAB, 256)
        expected = []
        for which, source in enumerate(sources):
            weight_sync.sync_from_disk(urls, source, f"reference-{which}", shapes)
            expected.append(client.score(PROBE)[0])
        http = weight_sync.HttpTransport(urls, [1])
        with closing(BroadcastTransport(urls, [1], "127.0.0.1", torch.device("cpu"))) as group:
            ways: dict[str, Callable[[int, str], None]] = {
                "copy": lambda which, version: copy(weights[which]),
                "file": lambda which, version: through_file(weights[which], root / "file"),
                "disk": lambda which, version: through_disk(urls, weights[which], sources[which], version, shapes),
                "tensors": lambda which, version: weight_sync.sync_from_tensors(
                    urls, weights[which].items(), version, shapes, http, bucket
                ),
                "group": lambda which, version: weight_sync.sync_from_tensors(
                    urls, weights[which].items(), version, shapes, group, bucket
                ),
            }
            best = dict.fromkeys(ways, float("inf"))
            for turn in range(asked.repeat):
                for name, way in ways.items():
                    for which in range(2):  # so that every sync brings other weights than those served
                        began = time.perf_counter()
                        way(which, f"{name}-{turn}-{which}")
                        best[name] = min(best[name], time.perf_counter() - began)
                        if name not in ("copy", "file"):
                            np.testing.assert_array_equal(client.score(PROBE)[0], expected[which])
    print(f"{nbytes / 2**20:.0f} MiB in {len(shapes)} tensors, buckets of {asked.bucket_mib} MiB, best of "
          f"{2 * asked.repeat}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for name, seconds in best.items():
        print(f"{name:8} {seconds:8.3f} s {nbytes / seconds / 1e9:8.2f} GB/s {seconds / best['copy']:8.1f} × copy")


def copy(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.clone()


def through_file(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file(weights, path)
    for tensor in load_file(path).values():
        tensor.clone()


def through_disk(
    urls: list[str], weights: dict[str, torch.Tensor], directory: Path, version: str, shapes: weight_sync.Shapes
) -> None:
    """As the trainer does: the file is new each time, the server reads it."""
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    weight_sync.sync_from_disk(urls, directory, version, shapes)


if __name__ == "__main__":
    main()
