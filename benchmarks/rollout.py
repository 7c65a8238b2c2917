"""What routes cost a rollout: tokens per second with and without them, and how much of it is our side's work.

    python benchmarks/rollout.py --samples 64 --tokens 128 --concurrency 1,4,16,64

Serves a random Qwen3-MoE of 8 layers with 32 experts, and samples with 1 to 64 requests in flight:

    plain     a request without routes, whose reply nobody looks at
    routes    with routes, whose reply nobody looks at
    checked   with routes, decoded and checked by the client: what a run gets

    python benchmarks/rollout.py --alone            # no server: the checks of one reply, in processor's seconds

The three take turns; the best of `--repeat` counts. `of which checks` are the seconds that decoding and checking the
same replies takes in this process, one after the other, as a share of the rollout's.
"""

import argparse
import asyncio
import base64
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bai.config import Rollout
from megatron_bai.rollout.client import RolloutClient
from megatron_bai.rollout.parse_reply import parse_sample
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.servers.sglang_server import SGLangServer
from megatron_bai.routing.routes import RouteSignature

VOCAB, LAYERS, EXPERTS, TOPK = 512, 8, 32, 4
NEVER = 1 << 20  # ends a response, and is no token: so all are of one length
PROMPT = list(range(2, 34))


def make(directory: Path) -> Path:
    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # transformers knows head_dim, but not as a field
        vocab_size=VOCAB, hidden_size=128, moe_intermediate_size=64, intermediate_size=64, num_experts=EXPERTS,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts_per_tok=TOPK,
        norm_topk_prob=True, max_position_embeddings=4096, eos_token_id=NEVER, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


async def ask(url: str, samples: int, tokens: int, concurrency: int, routes: bool) -> list[Any]:
    """Raw replies, at most `concurrency` requests at once."""
    gate = asyncio.Semaphore(concurrency)
    params = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "return_routed_experts": routes}

    async def one(session: aiohttp.ClientSession) -> Any:
        async with gate, session.post(url + "/generate", json=body) as reply:
            return await reply.json()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await asyncio.gather(*(one(session) for _ in range(samples)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="only decoding and checking, on made replies")
    asked = parser.parse_args()
    if asked.alone:
        alone(RouteSignature(LAYERS, EXPERTS, TOPK), len(PROMPT), 128, 20)
        alone(RouteSignature(48, 128, 8), 1024, 8192, 2)  # a long response of Qwen3-30B-A3B
        return
    signature = RouteSignature(moe_layers=LAYERS, num_experts=EXPERTS, topk=TOPK)
    rollout = Rollout(max_new_tokens=asked.tokens, deterministic=False)
    with tempfile.TemporaryDirectory() as root:
        with SGLangServer(make(Path(root) / "model"), rollout, Path(root) / "server.log") as server:
            asyncio.run(ask(server.url, 4, asked.tokens, 4, True))  # warm
            print(f"{asked.samples} samples of {asked.tokens} tokens, {LAYERS} layers, {TOPK} of {EXPERTS} experts, "
                  f"best of {asked.repeat}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
            print(f"{'in flight':>10}{'plain':>12}{'routes':>12}{'checked':>12} tokens/s{'of which checks':>18}")
            for concurrency in map(int, asked.concurrency.split(",")):
                report(server.url, rollout, signature, concurrency, asked)


def report(url: str, rollout: Rollout, signature: RouteSignature, concurrency: int, asked: argparse.Namespace) -> None:
    samples = max(concurrency, asked.samples * min(concurrency, 16) // 16)  # fewer where they come one by one
    best: dict[str, float] = {}
    for _ in range(asked.repeat):
        for name in ("plain", "routes", "checked"):
            began = time.perf_counter()
            if name == "checked":
                limited = Rollout(**(vars(rollout) | {"concurrency": concurrency}))
                client = RolloutClient([url], limited, RouteFormat(signature), VOCAB, 4096)
                found = client.generate([PROMPT], samples, 0, [NEVER])
                for each in found:
                    assert isinstance(each, Sample) and len(each.response) == asked.tokens, "a response ended early"
            else:
                asyncio.run(ask(url, samples, asked.tokens, concurrency, name == "routes"))
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - began)
    replies = asyncio.run(ask(url, samples, asked.tokens, concurrency, True))
    began = time.perf_counter()
    for reply in replies:
        parse_sample(reply, 0, PROMPT, RouteFormat(signature), asked.tokens, [NEVER])
    checks = time.perf_counter() - began
    speeds = "".join(f"{samples * asked.tokens / best[name]:12.0f}" for name in ("plain", "routes", "checked"))
    print(f"{concurrency:>10}{speeds}{'':9}{checks / best['checked']:>17.1%}", flush=True)


def alone(signature: RouteSignature, prompt: int, tokens: int, repeat: int) -> None:
    """Processor's milliseconds of one reply, which other programs on the machine change little."""
    scores = np.random.default_rng(0).random(
        (prompt + tokens - 1, signature.moe_layers, signature.num_experts), np.float32
    )
    ids = scores.argpartition(signature.topk, -1)[..., : signature.topk].astype("<i4")
    meta = {
        "finish_reason": {"type": "length"},
        "weight_versions": [{"version": "0", "start": 0, "end": tokens}],
        "output_token_logprobs": [[-1.5, 5, None]] * tokens,
        "routed_experts": base64.b64encode(ids.tobytes()).decode(),
    }
    text = json.dumps({"output_ids": [5] * tokens, "meta_info": meta})
    parsing, checking = [], []
    for _ in range(repeat):
        began = time.process_time()
        reply = json.loads(text)
        parsed = time.process_time()
        parse_sample(reply, 0, [2] * prompt, RouteFormat(signature), tokens, [NEVER])
        parsing.append(parsed - began)
        checking.append(time.process_time() - parsed)
    print(f"{prompt} + {tokens} tokens, {signature.moe_layers} layers, {signature.topk} of "
          f"{signature.num_experts} experts: {len(text) / 1e6:.2f} MB, JSON {1e3 * min(parsing):.2f} ms, "
          f"checks {1e3 * min(checking):.2f} ms, "
          f"together {1e6 * (min(parsing) + min(checking)) / tokens:.1f} µs a sampled token")  # fmt: skip


if __name__ == "__main__":
    main()
