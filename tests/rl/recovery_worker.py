"""`python recovery_worker.py DIRECTORY`: what two replicas do when samples fail, each rank's account in a file.

Two processes with real collectives ask one server, over HTTP, that fails as no SGLang can be asked to; models and what
brings weights to servers are left out.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from aiohttp import web
from fake_sglang import NEW_TOKENS, SIGNATURE, STOP, good_reply, serve
from processes import fork_ranks

from megatron_bai.compat.releases import SGLANG
from megatron_bai.config import Config, Model, Rollout
from megatron_bai.data.task import Prompt
from megatron_bai.errors import UserError
from megatron_bai.rewards import Score
from megatron_bai.rl.experience.inference_engine import InferenceEngine
from megatron_bai.rollout import http_client
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.servers.fleet import FleetInfo, ServerFleet

PROMPTS, SIZE, VERSION = 3, 4, 7


class Server:
    """`broken` prompts are answered with 500; weights are of `version`, which `give` sets right."""

    def __init__(self, broken: set[int] = frozenset(), version: int = VERSION):
        self.broken, self.version, self.asked = broken, version, []

    def __call__(self, request: web.Request, body: dict[str, Any]) -> Any:
        if request.path != "/generate":
            fit = {"enable_return_routed_experts": True, "enable_deterministic_inference": True}
            return {"weight_version": str(self.version), "version": SGLANG, **fit}
        prompt = body["input_ids"][0]
        self.asked.append(prompt)
        if prompt in self.broken:
            return web.Response(status=500, text="out of memory")
        reply = good_reply(body["input_ids"])
        # Half of the samples are there before the server loses its weights.
        stale = self.version if prompt >= 10 or len(self.asked) > SIZE else VERSION
        reply["meta_info"]["weight_versions"][0]["version"] = str(stale)
        return reply


def inference(rank: int, url: str, server: Server, **rollout: Any) -> InferenceEngine:
    """Of a replica, without a model."""
    settings = Config(model=Model(vocab_size=64), rollout=Rollout(max_new_tokens=NEW_TOKENS, retries=0, **rollout))
    task = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: ""), end_tokens={STOP})
    made = InferenceEngine.__new__(InferenceEngine)
    made._session = SimpleNamespace(
        settings=settings, is_replica_leader=True, is_rank_0=rank == 0, task=task, signature=SIGNATURE,
        send_to_replica=lambda samples: samples,
        scorer=lambda items: [Score(1.0) for _ in items], environment=None,
    )  # fmt: skip
    made._servers = FleetInfo([url], [1], [url])
    made._fleet = ServerFleet(made._servers, settings.rollout) if rank == 0 else None
    made._client = RolloutClient([url], settings.rollout, RouteFormat(SIGNATURE), 64, 64)
    made.version, made._disk_version, made._memory = VERSION, VERSION, SimpleNamespace(close=lambda: None)

    def give(again: bool = False) -> None:
        assert again
        if rank == 0:
            server.version = VERSION
        dist.barrier()

    made._push_weights = give
    return made


def asked(rank: int, make: Callable[[], Server], **rollout: Any) -> dict[str, Any]:
    """One collective call of `sample`. Rank 0 has the server; its prompts begin with 2 to 4, rank 1's with 12 to 14."""
    prompts = [Prompt([10 * rank + 2 + i, 5], "", "") for i in range(PROMPTS)]
    server = make()
    url = [None]
    if rank == 0:
        with serve(server) as url[0]:
            return asking(rank, prompts, url, server, rollout)
    return asking(rank, prompts, url, server, rollout)


def asking(rank: int, prompts: list[Prompt], url: list, server: Server, rollout: dict[str, Any]) -> dict[str, Any]:
    dist.broadcast_object_list(url, src=0)
    own = inference(rank, url[0], server, concurrency=1, **rollout)
    try:
        samples = own.sample(prompts, SIZE, "train/0")
        found = {
            "prompts": [[sample.prompt_index, int(sample.tokens[0])] for sample in samples],
            "lost": [sample.failure for sample in samples],
            "rewards": [sample.reward for sample in samples],
            "versions": sorted({span.version for sample in samples for span in sample.spans}),
        }
    except UserError as error:
        found = {"error": str(error)}
    dist.barrier()  # the server goes with rank 0
    return found | {"asked": server.asked}


def work(directory: Path, rank: int) -> None:
    http_client._BACKOFF_S = 0.001
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    found = {
        "whole": asked(rank, Server),
        "stale": asked(rank, lambda: Server(version=0), max_failed_fraction=0.99),
        "spent": asked(rank, lambda: Server(version=0), restarts=0),
        "lost": asked(rank, lambda: Server({13}), max_failed_fraction=0.5),
        "too many": asked(rank, lambda: Server({13}), max_failed_fraction=0.2),
    }
    (directory / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(directory: Path) -> None:
    fork_ranks(partial(work, directory), 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
