"""Settings of servers that contradict each other, and servers that cannot do what a run asks, are named."""

from typing import Any

import pytest
from aiohttp import web
from fake_sglang import serve

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.servers import fleet

GOOD = {"version": "0.5.21", "enable_return_routed_experts": True, "enable_deterministic_inference": True, "tp_size": 4}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"servers": 0}, "rollout.servers is 0"),
        ({"tensor": 0}, "rollout.tensor is 0"),
        ({"sync_bucket_mib": 0}, "rollout.sync_bucket_mib is 0"),
        ({"sync": "carrier pigeon"}, "rollout.sync is 'carrier pigeon': choose disk, tensors or group"),
        ({"urls": ["http://a"], "servers": 2, "port": 7}, "leave out rollout.servers, rollout.port$"),
        ({"urls": ["http://a"], "mem_fraction_static": 0.5}, "leave out rollout.mem_fraction_static$"),
        ({"mem_fraction_static": 1.0}, "rollout.mem_fraction_static is 1: it must be above 0 and below 1"),
        ({"base_gpu_id": -1}, "rollout.base_gpu_id is -1"),
        ({"moe_runner_backend": "flashinfer_trtllm"}, "rollout.moe_runner_backend is 'flashinfer_trtllm': "),
        ({"moe_runner_backend": "auto"}, "rollout.moe_runner_backend is 'auto': choose triton, "),
        ({"router": "http://a"}, "rollout.router needs rollout.urls"),
        ({"urls": ["http://a", "http://a"]}, "rollout.urls names a server twice"),
        ({"urls": ["http://a:1", "http://A:1/"]}, "rollout.urls names a server twice"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        fleet.validate(Rollout(**settings))


def test_defaults_are_fine() -> None:
    fleet.validate(Rollout())
    fleet.validate(Rollout(urls=["http://127.0.0.1:1", "http://localhost:2"], router="http://127.0.0.1:3"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("base_gpu_id", 4), ("mem_fraction_static", 0.5), ("moe_runner_backend", "deep_gemm")],
)
def test_what_is_for_gpus_is_refused_on_a_cpu(name: str, value: Any) -> None:
    rollout = Rollout(**{name: value})
    fleet.validate(rollout)
    fleet.validate_kind(rollout, "cuda")
    fleet.validate_kind(Rollout(), "cpu")
    with pytest.raises(UserError, match=rf"rollout\.{name} is {value}: it is for servers on GPUs"):
        fleet.validate_kind(rollout, "cpu")


def found(info: dict[str, Any], **settings: Any) -> fleet.FleetInfo:
    def answer(request: web.Request, body: dict[str, Any]) -> dict[str, Any]:
        return info

    with serve(answer) as url:
        return fleet.connect_servers(Rollout(urls=[url], **settings)).fleet


def test_a_server_says_what_it_is() -> None:
    assert found(GOOD).tp_sizes == [4]
    assert found(GOOD | {"enable_deterministic_inference": False}, deterministic=False).tp_sizes == [4]


def test_a_server_of_a_release_without_a_row_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(GOOD).untested == ()
    monkeypatch.setattr("megatron_bai.compat.releases._admits_untested", True)
    assert found(GOOD | {"version": "0.6.0"}).untested == ("0.6.0",)


def test_one_that_comes_back_as_another_release_without_a_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has verified the rows of the release before it."""
    monkeypatch.setattr("megatron_bai.compat.releases._admits_untested", True)
    monkeypatch.setattr(fleet.control, "wait_until_healthy", lambda *_: True)
    release = ["0.6.0"]
    with serve(lambda request, body: GOOD | {"version": release[0]}) as url:
        servers = fleet.connect_servers(Rollout(urls=[url]))
        servers._wait_for_server(url)
        release[0] = "0.6.1"
        with pytest.raises(UserError, match=f"SGLang 0.6.1 answers at {url}, another release than this run has"):
            servers._wait_for_server(url)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "0.5.18"}, r"SGLang 0.5.18 answers at http.*, and its replies do not say .*: use one of .*0.5.21"),
        ({"speculative_algorithm": "EAGLE"}, "was started with --speculative-algorithm, under which routes may"),
        ({"enable_hierarchical_cache": True}, "was started with --enable-hierarchical-cache, under which routes may"),
        ({"enable_dp_attention": True}, "was started with --enable-dp-attention, under which routes may"),
        ({"enable_return_routed_experts": False}, "was started without --enable-return-routed-experts"),
        ({"enable_deterministic_inference": False}, "was started without --enable-deterministic-inference"),
        ({"dp_size": 2}, "has --dp-size 2: start 2 servers"),
        ({"moe_runner_backend": "triton_kernel"}, "has --moe-runner-backend triton_kernel, .* records no routes"),
    ],
)
def test_a_server_that_cannot_be_used_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        found(GOOD | change)
