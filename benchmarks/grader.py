"""A teacher that only grades, as a small OpenAI-compatible server in this process: brevity, by a rule that anyone can check."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

LONGEST = 30  # words from which on an answer has the lowest grade
CRITERION = f"How brief is the answer? 10 for one word, 1 from {LONGEST} words on or for none, and evenly in between."


def grade(text: str) -> float:
    """From 1 to 10, to one decimal."""
    words = len(text.split())
    return round(1 + 9 * max(0.0, 1 - (words - 1) / (LONGEST - 1)), 1) if words else 1.0


@contextmanager
def grading() -> Iterator[str]:
    """An address that grades answers for as long as the context is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"openai://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "grader", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = asked["messages"][0]["content"]
        answer = message.split("<answer>\n", 1)[1].rsplit("\n</answer>", 1)[0]
        choice = {"message": {"role": "assistant", "content": f"score: {grade(answer)}"}, "finish_reason": "stop"}
        self._reply({"choices": [choice], "usage": {"prompt_tokens": len(message.split()), "completion_tokens": 2}})

    def _reply(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing for every request."""
