"""A server with preferences of its own samples what any other does, and its log-probabilities are the policy's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB

from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers import fleet, sglang_server
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = [pytest.mark.live, pytest.mark.long]
PREFERENCES = """{"repetition_penalty": 1.5, "min_p": 0.3, "top_k": 3, "presence_penalty": 1.0, "temperature": 0.2}"""


class Opinionated(SGLangServer):
    """A server that somebody else started."""

    def _arguments(self) -> list[str]:
        return [*super()._arguments(), "--preferred-sampling-params", PREFERENCES]


@pytest.fixture(scope="module")
def url(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        environment = sglang_server._environment
        patch.setattr(
            sglang_server, "_environment", lambda *where: environment(*where) | {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
        )
        with Opinionated(checkpoints["v0"], ROLLOUT, tmp_path_factory.mktemp("server") / "sglang.log") as running:
            yield running.url


def test_its_samples_are_of_the_policy_that_its_log_probabilities_are_of(url: str) -> None:
    """At temperature 1 the scores of a response are the log-probabilities it was sampled with."""
    fleet.connect_servers(replace(ROLLOUT, urls=[url]))
    client = RolloutClient([url], ROLLOUT, RouteFormat(SIGNATURE), VOCAB, LENGTH)
    samples = client.generate([[5, 6, 7], [9]], 8, 0, [STOP])
    assert len({tuple(sample.tokens) for sample in samples}) > 8
    for sample, scores in zip(samples, client.score([sample.tokens.tolist() for sample in samples]), strict=True):
        np.testing.assert_allclose(sample.logprobs, scores[sample.prompt_length - 1 :], atol=1e-4)


def test_log_probabilities_at_another_temperature_than_the_samples_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="at temperature 1 for samples at 0.7: start it without SGLANG_RETURN_ORIGINAL"):
        fleet.connect_servers(replace(ROLLOUT, urls=[url], temperature=0.7))
