"""Fake OpenAI server: an HTTP server on loopback with scripted answers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from raykd.config.engine import Endpoint
from raykd.config.sections import Teacher

KEY_ENV, KEY = "RAYKD_TEST_KEY", "sk-planted1bm90aGluZyB0byBzZWU"
# Status, headers and body: JSON, or bytes as they are.
Answer = tuple[int, dict[str, str], Any]


@dataclass
class ReceivedRequest:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at_s: float
    """On the monotonic clock."""


@dataclass
class FakeServer:
    """A server's requests so far, and the function that answers them."""

    url: str
    respond: Callable[[ReceivedRequest, int], Answer]
    """Takes the request and its number, from 0."""
    requests: list[ReceivedRequest] = field(default_factory=list)
    max_concurrent: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: ReceivedRequest) -> Answer:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._now += 1
            self.max_concurrent = max(self.max_concurrent, self._now)
        try:
            return self.respond(request, number)
        finally:
            with self._lock:
                self._now -= 1

    def teacher(self, **endpoint: Any) -> Teacher:
        """Return a teacher behind this server."""
        section = Endpoint.model_validate({"url": self.url, "max_retries": 1, **endpoint})
        return Teacher(model="raykd/demo-teacher", endpoint=section, timeout_s=20, batch_size=4, concurrency=2)


@contextmanager
def serving(respond: Callable[[ReceivedRequest, int], Answer]) -> Iterator[FakeServer]:
    """Run a server during a `with` block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, more, content_or_json = server.answer(ReceivedRequest(self.path, headers, body, time.monotonic()))
            content = content_or_json if isinstance(content_or_json, bytes) else json.dumps(content_or_json).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **more}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                # The client has closed the connection.
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    server = FakeServer(f"http://127.0.0.1:{http_server.server_port}/v1", respond)
    thread = threading.Thread(target=http_server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        thread.join()
        http_server.server_close()


def tokens(*ids: int, text: str = "It is 4.", finish: str = "stop", **more: Any) -> Answer:
    """Return an answer of `/completions` in the form of vLLM's server."""
    choice = {"index": 0, "text": text, "finish_reason": finish, "token_ids": list(ids), **more}
    return 200, {}, {"object": "text_completion", "choices": [choice]}


def message(text: str | None, finish: str = "stop") -> Answer:
    """Return an answer of `/chat/completions`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, {"object": "chat.completion", "choices": [choice]}


def scores(request: ReceivedRequest, number: int = 0) -> Answer:
    """Return the k best log-probabilities at each token, by a teacher that is nearly certain of every token."""
    prompt, k = request.body["prompt"], request.body["prompt_logprobs"]
    ranked = [[token, *(other for other in range(k) if other != token)][:k] for token in prompt[1:]]
    best = [
        {str(token): {"logprob": -4.0 - rank if rank else -0.1, "rank": rank + 1} for rank, token in enumerate(ids)}
        for ids in ranked
    ]
    return tokens(0, prompt_logprobs=[None, *best])


def complete_answer(request: ReceivedRequest, number: int = 0) -> Answer:
    """Return an answer with all log-probabilities that the request contains; it does not depend on the number."""
    if request.path.endswith("/chat/completions"):
        return message(f"{request.body['messages'][-1]['content'][:9]}\n#### 4")
    top_k, scored_k, prompt = (request.body.get(name) for name in ("logprobs", "prompt_logprobs", "prompt"))
    more: dict[str, Any] = {}
    if top_k:
        best = {f"token_id:{token}": -1.0 - token for token in range(top_k)}
        more["logprobs"] = {"top_logprobs": [best, best]}
    if scored_k:
        best = {str(token): {"logprob": -1.0 - token, "rank": token + 1} for token in range(scored_k)}
        more["prompt_logprobs"] = [None, *[best for _ in prompt[1:]]]
    return tokens(0, 1, text=f"{sum(prompt)}\n#### 4", **more)
