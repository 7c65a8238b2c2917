"""The seams of conversations with a real server: prefix caches, retries, restarts, parts and new weights between turns.

Each time every token's log-probability and route are those of a fresh forward of the whole conversation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversing import ENDS, Toy, converse, make_requests, require_fresh
from model.families import published
from tiny import LENGTH, ROLLOUT, SIGNATURE, VOCAB
from transformers_forward import Reference

from megatron_bai.model.architecture import read_architecture
from megatron_bai.rollout import client as client_module
from megatron_bai.rollout import http_client
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.servers.sglang_server import SGLangServer
from megatron_bai.rollout.servers.weight_sync import sync_from_disk, tensor_shapes
from megatron_bai.routing.layout import ServedColumns
from megatron_bai.routing.routes import RouteSignature

pytestmark = [pytest.mark.live, pytest.mark.long, pytest.mark.usefixtures("forked_servers")]


class CachingServer(SGLangServer):
    """With a prefix cache, as a server that others started may have."""

    def _arguments(self) -> list[str]:
        return [word for word in super()._arguments() if word != "--disable-radix-cache"]


@contextmanager
def serve(model: Path, log: Path, cached: bool) -> Iterator[SGLangServer]:
    kind = CachingServer if cached else SGLangServer
    with kind(model, ROLLOUT, log) as running:
        assert ("radix" not in str(running._arguments())) == cached
        yield running


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_other_families_conversations_are_one_forward(name: str, cached: bool, tmp_path: Path) -> None:
    """DeepSeek-V3 has a dense layer first, shared experts and a sigmoid router; Mixtral neither."""
    directory = published.make(name, tmp_path / "model")
    model = read_architecture(directory)
    total, moe = model.family.route_columns(model)
    signature = RouteSignature(len(moe), model.num_experts, model.moe_topk)

    def forward(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logprobs, routes = published.logprobs(name, directory, tokens=torch.from_numpy(ids)[None])
        found = routes[0, :-1].sort(-1).values.numpy()
        return logprobs[0, :-1].numpy(), found, np.ones(len(ids) - 1, dtype=bool)

    with serve(directory, tmp_path / "log", cached) as server:
        rollout = replace(ROLLOUT, max_new_tokens=40, request_timeout_s=600.0)
        form = RouteFormat(signature, ServedColumns(total, tuple(moe)))
        client = RolloutClient([server.url], rollout, form, model.vocab_size, 64)
        for sample in converse(client):
            require_fresh(sample, forward)


@pytest.fixture(scope="module", params=[False, True], ids=["uncached", "cached"])
def running(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SGLangServer]:
    with serve(checkpoints["v0"], tmp_path_factory.mktemp("running") / "log", request.param) as server:
        yield server


@pytest.fixture
def client(running: SGLangServer) -> RolloutClient:
    return RolloutClient(
        [running.url],
        replace(ROLLOUT, max_new_tokens=60, request_timeout_s=600.0),
        RouteFormat(SIGNATURE),
        VOCAB,
        LENGTH,
    )


@pytest.fixture
def bring(running: SGLangServer, checkpoints: dict[str, Path]) -> Callable[[str], None]:
    def sync(version: str) -> None:
        sync_from_disk([running.url], checkpoints[version], version, tensor_shapes(checkpoints[version]))

    return sync


@pytest.fixture(scope="module")
def forward(checkpoints: dict[str, Path]) -> dict[str, Reference]:
    return {version: Reference(path) for version, path in checkpoints.items()}


def same(one: Sample, other: Sample) -> None:
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.full_sampled_mask, other.full_sampled_mask)
    np.testing.assert_array_equal(np.sort(one.routes, -1), np.sort(other.routes, -1))
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4, rtol=0)
    assert (one.finish, one.turns, one.spans) == (other.finish, other.turns, other.spans)


def in_rounds(client: RolloutClient, budget: int, before: Callable[[int], Any] = lambda number: None) -> list[Sample]:
    """The conversations of `converse`, sampled in rounds of so many tokens."""
    requests, number = make_requests(), 0
    while waiting := [r for r in requests if r.partial is None or not r.partial.complete]:
        before(number)
        results = client.sample(waiting, ENDS, environment=Toy(), budget=budget)
        found = dict(zip(map(id, waiting), results, strict=True))
        requests = [replace(r, partial=found.get(id(r), r.partial)) for r in requests]
        number += 1
    return [r.partial for r in requests if r.partial]


def test_after_a_retry_a_restart_and_in_parts_it_is_the_same_conversation(
    client: RolloutClient,
    running: SGLangServer,
    bring: Callable[[str], None],
    forward: dict[str, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bring("v0")
    whole = converse(client)
    for sample in whole:
        require_fresh(sample, forward["v0"])
    with monkeypatch.context() as patch:  # every reply is lost on its way once, and asked for again
        parse, lost = client_module.parse_sample, set()

        def lossy(reply: Any, index: int, ids: list[int], *arguments: Any) -> Sample:
            key = (*ids, *reply["output_ids"])
            if key not in lost:
                lost.add(key)
                raise ValueError("lost")
            return parse(reply, index, ids, *arguments)

        patch.setattr(client_module, "parse_sample", lossy)
        patch.setattr(http_client, "_BACKOFF_S", 0.01)
        retried = client.sample(make_requests(), ENDS, environment=Toy())
    assert len(lost) > len(whole), "the test's premise: later turns, too"
    for one, other in zip(retried, whole, strict=True):
        same(one, other)
    for one, other in zip(in_rounds(client, 5), whole, strict=True):
        same(one, other)

    def restart(number: int) -> None:
        if number == 2:
            running.stop()
            running.start()
            bring("v0")

    for one, other in zip(in_rounds(client, 5, restart), whole, strict=True):
        same(one, other)


def test_rows_are_of_the_weights_that_computed_them(
    client: RolloutClient, bring: Callable[[str], None], forward: dict[str, Reference]
) -> None:
    """New weights come within turns and between them; a reply is of those that the turn after it was sampled with."""
    samples = in_rounds(client, 6, lambda number: bring(f"v{number % 2}"))
    between = 0
    for sample in samples:
        versions = [span.version for span in sample.spans]
        assert all(one != other for one, other in zip(versions, versions[1:], strict=False))
        for version in set(versions):
            require_fresh(sample, forward[version], version)
        starts = {span.start for span in sample.spans}
        between += sum(turn.end in starts for turn in sample.turns[:-1])
    assert between, "the test's premise: new weights came between a turn and the reply to it"
