"""What reaches a server is all that decides a sample: beside SGLang's own class and the way it fills in defaults."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_sglang import NEW_TOKENS, SIGNATURE, STOP, good_reply, serve

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient, SampleRequest
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers import fleet

# Set by SGLang itself from other parameters; a server that prefers one is refused.
INTERNAL = {
    "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized", "ebnf_full_assistant",
}  # fmt: skip
# What a server may prefer in each place, unlike what a request wants.
PREFERRED = {
    "max_new_tokens": 1, "stop": "x", "stop_token_ids": [3], "stop_regex": "x+", "temperature": 0.3, "top_p": 0.5,
    "top_k": 3, "min_p": 0.2, "frequency_penalty": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.5,
    "min_new_tokens": 1, "n": 2, "beam_width": 2, "json_schema": "{}", "regex": "a*", "ebnf": "root ::= \"a\"",
    "structural_tag": "{}", "ignore_eos": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    "no_stop_trim": True, "stream_interval": 7, "logit_bias": {"1": 5.0}, "sampling_seed": 9, "custom_params": {"a": 1},
}  # fmt: skip
ITS_INFO = {"version": "0.5.21", "enable_return_routed_experts": True, "enable_deterministic_inference": True}


@pytest.fixture(scope="module")
def sglang() -> Path:
    (directory,) = importlib.util.find_spec("sglang").submodule_search_locations
    return Path(directory) / "srt"


@pytest.fixture(scope="module")
def its_class(sglang: Path) -> Any:
    """SGLang's `SamplingParams`, whose file needs nothing else of SGLang."""
    spec = importlib.util.spec_from_file_location("its_params", sglang / "sampling" / "sampling_params.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SamplingParams


def asked(**settings: Any) -> dict[str, dict[str, Any]]:
    """The sampling parameters of each kind of request: a sample, its continuation, an evaluation's, and a score."""
    bodies: list[dict[str, Any]] = []

    def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        ids = body["input_ids"]
        if not body["sampling_params"]["max_new_tokens"]:
            return {"meta_info": {"input_token_logprobs": [[-1.0, token, None] for token in ids]}}
        return good_reply(ids)

    with serve(answer) as url:
        rollout = Rollout(**({"max_new_tokens": NEW_TOKENS, "temperature": 0.7} | settings))
        client = RolloutClient([url], rollout, RouteFormat(SIGNATURE), vocab_size=16, max_length=64)
        client.sample([SampleRequest(0, [2, 3], 77)], [STOP])
        client.sample([SampleRequest(0, [2, 3], 77)], [STOP], budget=NEW_TOKENS)
        client.generate([[2, 3]], 1, seed=5, stop_token_ids=[STOP], temperature=0.2)
        client.score([[2, 3]])
    kinds = ("sample", "partial", "evaluation", "score")
    return {kind: body["sampling_params"] for kind, body in zip(kinds, bodies, strict=True)}


def test_a_request_sets_every_parameter_that_sglang_has(its_class: Any) -> None:
    """A release that adds one makes this red: decide what is neutral, and add it to `sampling_params.py`."""
    wanted = set(its_class.__struct_fields__) - INTERNAL
    assert wanted == set(PREFERRED)
    for kind, params in asked().items():
        assert set(params) == wanted, kind


@pytest.mark.parametrize("deterministic", [True, False])
def test_no_preference_of_a_server_reaches_a_sample(sglang: Path, its_class: Any, deterministic: bool) -> None:
    source = (sglang / "managers" / "tokenizer_manager.py").read_text()
    assert "{**self.preferred_sampling_params, **obj.sampling_params}" in source, (
        "the server fills in defaults otherwise"
    )
    for kind, params in asked(deterministic=deterministic).items():
        plain = its_class(**params)
        for preferred in [PREFERRED, *({name: value} for name, value in PREFERRED.items())]:
            assert its_class(**{**preferred, **params}) == plain, (kind, preferred)


def test_what_is_sent_is_neutral_but_for_temperature_length_stop_and_seed(its_class: Any) -> None:
    temperatures = {"sample": 0.7, "partial": 0.7, "evaluation": 0.2, "score": 1.0}
    for kind, params in asked().items():
        own = {"temperature": temperatures[kind], "max_new_tokens": 0 if kind == "score" else NEW_TOKENS}
        if kind != "score":
            own |= {"stop_token_ids": [STOP], "sampling_seed": params["sampling_seed"]}
            assert isinstance(params["sampling_seed"], int)
        assert its_class(**params) == its_class(**own), kind
        its_class(**params).verify(16)


@pytest.mark.parametrize("preferred", [{"is_normalized": True}, {"stop_strs": ["x"], "top_p": 0.5}, "{}", {"new": 1}])
def test_a_server_that_prefers_what_no_request_can_take_back_is_refused(preferred: Any) -> None:
    named = next(iter(preferred)) if isinstance(preferred, dict) else "{}"
    with pytest.raises(UserError, match=f"--preferred-sampling-params.*{named}.*: start it without"):
        connect(ITS_INFO | {"preferred_sampling_params": preferred})


def test_a_server_whose_preferences_requests_replace_is_used() -> None:
    connect(ITS_INFO | {"preferred_sampling_params": PREFERRED})
    connect(ITS_INFO | {"preferred_sampling_params": None})


def connect(info: dict[str, Any], temperature: float = 1.0, power: float = 0.0, spread: float = 3.0) -> None:
    """Connect to a server whose log-probabilities are the logits over temperature ** power."""

    def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        if request.path != "/generate":
            return info
        logits = [spread, spread / 2, spread / 3, 0.0]
        scaled = [value / body["sampling_params"]["temperature"] ** power for value in logits]
        norm = math.log(sum(map(math.exp, scaled)))
        entries = [[value - norm, i, None] for i, value in enumerate(scaled)]
        return {"meta_info": {"output_top_logprobs": [entries[: body["top_logprobs_num"]]]}}

    with serve(answer) as url:
        fleet.connect_servers(Rollout(urls=[url], temperature=temperature))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 0.95, 1.3])
def test_a_server_that_returns_log_probabilities_at_temperature_1_is_refused(temperature: float) -> None:
    connect(ITS_INFO, temperature, power=1)
    with pytest.raises(UserError, match="at temperature 1 for samples at .*: start it without SGLANG_RETURN_ORIGINAL"):
        connect(ITS_INFO, temperature, power=0)


def test_at_temperature_1_or_for_a_uniform_model_nothing_is_decided() -> None:
    connect(ITS_INFO, 1.0, power=0)
    connect(ITS_INFO, 0.7, power=0, spread=1e-4)
