"""A server that talks as SGLang 0.5.21 does and samples by a rule: every head that asks gets the same samples.

It imports nothing of the package, so that it serves the heads of the past as well. A response depends on its prompt and
its seed alone: with an odd seed it is the arithmetic task's right answer, else random text that ends sooner or later.
Log-probabilities and routes are random, too. Weights that it is sent are ignored, but for their version.
"""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from struct import pack
from typing import Any

VERSION = "0.5.21"
END, ASSISTANT = 1, 4  # ids that the task's tokenizer gives the end of a response and the end of a prompt


class Recorded:
    """The state and the replies of one server.

    Args:
        tokenizer: `tokenizer.json` of the task, which need not be there before the first sample is asked for.
        layers, experts, topk: of the model's routes.
        vocab_size: of the model.
        seen: called with the version of the weights whenever there are new ones.
    """

    def __init__(
        self,
        tokenizer: Path,
        layers: int,
        experts: int,
        topk: int,
        vocab_size: int,
        seen: Callable[[str], None] = lambda version: None,
    ):
        self.layers, self.experts, self.topk, self.vocab_size, self.seen = layers, experts, topk, vocab_size, seen
        self._file, self._tokenizer, self._version = tokenizer, None, "none"

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the server answers at `path`."""
        if path == "/server_info":
            can = ("enable_return_routed_experts", "enable_deterministic_inference")
            return {"version": VERSION, "tp_size": 1, "dp_size": 1, **dict.fromkeys(can, True)}
        if path == "/model_info":
            return {"weight_version": self._version}
        if path == "/update_weight_version":
            self._version = body["new_version"]
            self.seen(self._version)
        if path != "/generate":
            return {"success": True}
        ids, limit = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        if not limit:
            named = [token if token < self.vocab_size - 1 else 0 for token in ids]
            logprobs = [[None, named[0], None], *([-4.0, token, None] for token in named[1:])]
            return {"output_ids": [], "meta_info": {"input_token_logprobs": logprobs}}
        return self._sample(ids, limit, body["sampling_params"]["sampling_seed"], body)

    def _sample(self, ids: list[int], limit: int, seed: int, body: dict[str, Any]) -> dict[str, Any]:
        prompt = ids.index(ASSISTANT) + 1
        whole = self._response(ids[:prompt], seed)
        output = whole[len(ids) - prompt :][:limit]
        ended = len(ids) + len(output) == prompt + len(whole)
        first = body.get("routed_experts_start_len", 0)
        rows = range(first, len(ids) + len(output) - 1)
        logprobs = [[Random(f"{seed} {len(ids) + i}").gauss(-4.1, 0.3), token, None] for i, token in enumerate(output)]
        return {
            "output_ids": output,
            "meta_info": {
                "finish_reason": {"type": "stop" if ended else "length"},
                "weight_versions": [{"version": self._version, "start": 0, "end": len(output)}],
                "output_token_logprobs": logprobs,
                "routed_experts": base64.b64encode(b"".join(self._routes(seed, row) for row in rows)).decode(),
            },
        }

    def _response(self, prompt: list[int], seed: int) -> list[int]:
        """All of it, its end included."""
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer = self._tokenizer or Tokenizer.from_file(str(self._file))
        if seed % 2:
            numbers = tokenizer.decode(prompt, skip_special_tokens=True).split("+")
            return [*tokenizer.encode(f"answer:{sum(map(int, numbers))}").ids, END]
        random = Random(f"{seed}")
        return [*(random.randrange(ASSISTANT + 1, tokenizer.get_vocab_size()) for _ in range(seed // 2 % 20)), END]

    def _routes(self, seed: int, row: int) -> bytes:
        random = Random(f"{seed} {row}")
        drawn = [random.sample(range(self.experts), self.topk) for _ in range(self.layers)]
        return pack(f"<{self.layers * self.topk}i", *sum(drawn, []))


@contextmanager
def serve(recorded: Recorded) -> Iterator[str]:
    """Answer in threads of this process; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            reply = json.dumps(recorded.reply(self.path.partition("?")[0], body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_POST = do_GET  # noqa: N815, the name that the standard library calls

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
