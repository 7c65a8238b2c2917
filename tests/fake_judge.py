"""A server with OpenAI's chat interface for examples/llm_judge.py."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def serve_judge(answer: Callable[[str], tuple[int, bytes | str]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve on a port of this machine for the length of a block.

    Args:
        answer: of a message: the HTTP status, and what the judge says, or bytes in place of the reply.

    Yields:
        The address, and the requests so far, with `path` and `key`.
    """
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"], **request})
            status, content = answer(request["messages"][0]["content"])
            if isinstance(content, str):
                content = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            with suppress(ConnectionError):  # its client was stopped; the traceback would be in another test
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
