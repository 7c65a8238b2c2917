"""Turns of a real server: log-probabilities and routes of every token are those of one forward of the conversation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conversing import PROMPTS, converse, require_fresh
from tiny import LENGTH, ROLLOUT, SIGNATURE, VOCAB
from transformers_forward import Reference

from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = pytest.mark.live


def test_a_conversation_is_one_forward_of_its_tokens(
    server: SGLangServer, serving: Callable[[str], None], checkpoints: dict[str, Path]
) -> None:
    serving("v0")
    client = RolloutClient([server.url], ROLLOUT, RouteFormat(SIGNATURE), VOCAB, LENGTH)
    reference = Reference(checkpoints["v0"])
    samples = converse(client, version="v0")
    scores = client.score([sample.tokens.tolist() for sample in samples])
    for sample, score in zip(samples, scores, strict=True):
        require_fresh(sample, reference)
        own, mask = score[sample.prompt_length - 1 :], sample.full_sampled_mask
        np.testing.assert_allclose(sample.logprobs[mask], own[mask], atol=1e-4, rtol=0)
        assert sample.tokens[: sample.prompt_length].tolist() == PROMPTS[sample.prompt_index]
        assert [(span.version, span.start, span.end) for span in sample.spans] == [("v0", 0, len(sample.response))]
