"""Several real servers with the same weights, and weights that reach them out of memory."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB

from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers import control, fleet, weight_sync
from megatron_bai.rollout.servers.broadcast_transport import BroadcastTransport
from megatron_bai.rollout.servers.fleet import FleetInfo
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]
PROBE = [list(range(2, 22))]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def both(
    server: SGLangServer, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FleetInfo]:
    """The session's server, and one of two tensor-parallel ranks."""
    logs, rollout = tmp_path_factory.mktemp("second"), replace(ROLLOUT, tensor=2)
    with fleet.start_servers(checkpoints["v0"], rollout, logs, "cpu") as second:
        yield fleet.connect_servers(replace(ROLLOUT, urls=[server.url, f"{second.fleet.urls[0]}/"])).fleet


@pytest.fixture(params=["tensors", "group"])
def carrier(request: pytest.FixtureRequest, both: FleetInfo) -> Iterator[weight_sync.WeightTransport]:
    if request.param == "tensors":
        yield weight_sync.HttpTransport(both.urls, both.tp_sizes)
        return
    with closing(BroadcastTransport(both.urls, both.tp_sizes, "127.0.0.1", torch.device("cpu"), timeout_s=60)) as group:
        yield group


def weights(checkpoints: dict[str, Path], version: str) -> Weights:
    return load_file(checkpoints[version] / "model.safetensors")


def scores(url: str) -> np.ndarray:
    return RolloutClient([url], ROLLOUT, RouteFormat(SIGNATURE), VOCAB, LENGTH).score(PROBE)[0]


def test_weights_out_of_memory_are_those_on_disk(
    both: FleetInfo, carrier: weight_sync.WeightTransport, checkpoints: dict[str, Path]
) -> None:
    """Bit for bit, in buckets of a few tensors; and no bucket is larger than asked for."""
    sent: list[int] = []

    class Seen:
        def start(self, bucket: weight_sync.Bucket) -> Callable[[], object]:
            sent.append(sum(tensor.nbytes for _, tensor in bucket))
            return carrier.start(bucket)

    assert both.tp_sizes == [1, 2]
    shapes = weight_sync.tensor_shapes(checkpoints["v0"])
    for version in ("v1", "v0"):
        weight_sync.sync_from_disk(both.urls, checkpoints[version], version, shapes)
        expected = [scores(url) for url in both.urls]
        other = "v0" if version == "v1" else "v1"
        weight_sync.sync_from_disk(both.urls, checkpoints[other], other, shapes)
        assert all(np.abs(scores(url) - was).max() > 0.1 for url, was in zip(both.urls, expected))
        weight_sync.sync_from_tensors(
            both.urls, weights(checkpoints, version).items(), f"{version}-again", shapes, Seen(), 1 << 16
        )
        for url, was in zip(both.urls, expected):
            np.testing.assert_array_equal(scores(url), was)
            assert control.weight_version(url) == f"{version}-again"
    assert len(sent) > 4 and max(sent) <= 1 << 16


def without(named: Weights) -> None:
    del named["model.norm.weight"]


def renamed(named: Weights) -> None:
    named["model.nrom.weight"] = named.pop("model.norm.weight")


def cut(named: Weights) -> None:
    named["model.norm.weight"] = named["model.norm.weight"][:-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without, "1 tensors were not sent, first model.norm.weight"),
        (renamed, "model.nrom.weight has shape .*, the servers' has none"),
        (cut, r"model.norm.weight has shape \(63,\), the servers' has \(64,\)"),
    ],
)
def test_servers_with_some_of_the_weights_stay_paused(
    both: FleetInfo, checkpoints: dict[str, Path], damage: Callable[[Weights], None], says: str
) -> None:
    """What SGLang itself would take without a word, or die of."""
    shapes, named = weight_sync.tensor_shapes(checkpoints["v1"]), weights(checkpoints, "v1")
    damage(named)
    with pytest.raises(UserError, match=says):
        weight_sync.sync_from_tensors(
            both.urls, named.items(), "v9", shapes, weight_sync.HttpTransport(both.urls, both.tp_sizes), 1 << 16
        )
    hurried = replace(ROLLOUT, request_timeout_s=1.0, retries=0)
    with pytest.raises(UserError, match="no answer within"):
        RolloutClient(both.urls[:1], hurried, RouteFormat(SIGNATURE), VOCAB, LENGTH).generate([[5]], 1, 0, [STOP])
    for url in both.urls:  # a whole set of weights makes them good again
        control.post(url, "/end_weight_update", {})
    weight_sync.sync_from_disk(both.urls, checkpoints["v0"], "v0", shapes)
    assert RolloutClient(both.urls[:1], ROLLOUT, RouteFormat(SIGNATURE), VOCAB, LENGTH).generate([[5]], 1, 0, [STOP])


def test_both_answer_alike_and_each_is_asked(
    both: FleetInfo, checkpoints: dict[str, Path], server: SGLangServer
) -> None:
    weight_sync.sync_from_disk(both.urls, checkpoints["v0"], "v0", weight_sync.tensor_shapes(checkpoints["v0"]))
    before = server.log_path.read_text().count("POST /generate")
    found = [
        RolloutClient(urls, ROLLOUT, RouteFormat(SIGNATURE), VOCAB, LENGTH).generate(
            [[5, 6], [7], [9, 8]], 2, 3, [STOP]
        )
        for urls in (both.sampling_urls, both.sampling_urls[1:])
    ]
    assert server.log_path.read_text().count("POST /generate") - before == 4  # the first and the third prompt's
    for one, other in zip(*found):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_a_server_without_what_rollouts_need_is_refused(both: FleetInfo, server: SGLangServer) -> None:
    with pytest.raises(UserError, match="does not answer /server_info"):
        fleet.connect_servers(replace(ROLLOUT, urls=["http://127.0.0.1:9"]))
    routed = fleet.connect_servers(replace(ROLLOUT, urls=[server.url], router="http://127.0.0.1:9/")).fleet
    assert (routed.urls, routed.sampling_urls) == ([server.url], ["http://127.0.0.1:9"])
