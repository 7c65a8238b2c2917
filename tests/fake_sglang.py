"""A server that answers as SGLang does, except where a test wants a fault that no real server can be asked for."""

import asyncio
import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from aiohttp import web

from megatron_bai.routing.routes import RouteSignature

SIGNATURE = RouteSignature(moe_layers=2, num_experts=8, topk=2)
NEW_TOKENS = 4
STOP = 1
Handler = Callable[[web.Request, dict[str, Any]], Any]


def good_reply(prompt: list[int]) -> dict[str, Any]:
    """What SGLang 0.5.21 returns, as far as the client reads it."""
    output = [5] * NEW_TOKENS
    routes = np.tile(np.array([3, 6], dtype="<i4"), (len(prompt) + NEW_TOKENS - 1, SIGNATURE.moe_layers, 1))
    return {
        "output_ids": output,
        "meta_info": {
            "finish_reason": {"type": "length", "length": NEW_TOKENS},
            "weight_versions": [{"version": "v0", "start": 0, "end": NEW_TOKENS}],
            "output_token_logprobs": [[-1.5, token, None] for token in output],
            "routed_experts": base64.b64encode(routes.tobytes()).decode(),
        },
    }


@contextmanager
def serve(handler: Handler) -> Iterator[str]:
    """Run `handler(request, body)` behind every path in another thread; yields the URL."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        reply = handler(request, body)
        if asyncio.iscoroutine(reply):
            reply = await reply
        return reply if isinstance(reply, web.StreamResponse) else web.json_response(reply)

    started, url = threading.Event(), []
    loop = asyncio.new_event_loop()

    def run() -> None:
        asyncio.set_event_loop(loop)
        app = web.Application(client_max_size=1 << 30)  # as SGLang takes weights of any size
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        loop.run_until_complete(site.start())
        url.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
