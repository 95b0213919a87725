"""A real HTTP server on loopback that answers as it is told, for a teacher elsewhere."""

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
class Asked:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at_s: float
    """On the monotonic clock."""


@dataclass
class Elsewhere:
    """What a server was asked, and what it says to that."""

    url: str
    says: Callable[[Asked, int], Answer]
    """By the request and its number, from 0."""
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, asked: Asked) -> Answer:
        with self._lock:
            number = len(self.asked)
            self.asked.append(asked)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.says(asked, number)
        finally:
            with self._lock:
                self._now -= 1

    def teacher(self, **endpoint: Any) -> Teacher:
        """A teacher that is asked here."""
        told = Endpoint.model_validate({"url": self.url, "max_retries": 1, **endpoint})
        return Teacher(model="raykd/demo-teacher", endpoint=told, timeout_s=20, batch_size=4, concurrency=2)


@contextmanager
def serving(says: Callable[[Asked, int], Answer]) -> Iterator[Elsewhere]:
    """Runs such a server for a `with` block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, more, said = elsewhere.answer(Asked(self.path, headers, body, time.monotonic()))
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **more}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                # Whoever asked has given up.
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    elsewhere = Elsewhere(f"http://127.0.0.1:{server.server_port}/v1", says)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield elsewhere
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def tokens(*ids: int, text: str = "It is 4.", finish: str = "stop", **more: Any) -> Answer:
    """An answer of `/completions` as vLLM's server gives it."""
    choice = {"index": 0, "text": text, "finish_reason": finish, "token_ids": list(ids), **more}
    return 200, {}, {"object": "text_completion", "choices": [choice]}


def message(text: str | None, finish: str = "stop") -> Answer:
    """An answer of `/chat/completions`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, {"object": "chat.completion", "choices": [choice]}


def scores(asked: Asked, number: int = 0) -> Answer:
    """What a teacher that is nearly sure of every token that it is given to score says of it, over its k best."""
    prompt, k = asked.body["prompt"], asked.body["prompt_logprobs"]
    each = [[token, *(other for other in range(k) if other != token)][:k] for token in prompt[1:]]
    best = [
        {str(token): {"logprob": -4.0 - rank if rank else -0.1, "rank": rank + 1} for rank, token in enumerate(ids)}
        for ids in each
    ]
    return tokens(0, prompt_logprobs=[None, *best])


def as_wanted(asked: Asked, number: int = 0) -> Answer:
    """An answer with all that was asked for, which does not depend on its number."""
    if asked.path.endswith("/chat/completions"):
        return message(f"{asked.body['messages'][-1]['content'][:9]}\n#### 4")
    top_k, scored_k, prompt = (asked.body.get(name) for name in ("logprobs", "prompt_logprobs", "prompt"))
    more: dict[str, Any] = {}
    if top_k:
        best = {f"token_id:{token}": -1.0 - token for token in range(top_k)}
        more["logprobs"] = {"top_logprobs": [best, best]}
    if scored_k:
        best = {str(token): {"logprob": -1.0 - token, "rank": token + 1} for token in range(scored_k)}
        more["prompt_logprobs"] = [None, *[best for _ in prompt[1:]]]
    return tokens(0, 1, text=f"{sum(prompt)}\n#### 4", **more)
