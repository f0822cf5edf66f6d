"""A small OpenAI-compatible HTTP server around any `TeacherBackend`, in this process, whose answers a test can spoil.

It knows ``/v1/models``, ``/v1/completions`` with token ids (``prompt_logprobs`` as vLLM gives them, ``echo``), ``/v1/chat/completions``,
``/generate`` as SGLang has it, and ``/detokenize``.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bbopd.rpc.backend import TeacherBackend
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec

VLLM, SGLANG, ECHO, CHAT = "prompt_logprobs", "sglang", "echo", "chat"


@dataclass
class Reply:
    """What a request is answered: a spoiler changes it, or says what else shall happen to the connection."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # in place of the body's JSON
    cut_after: int | None = None  # bytes of the body after which the connection is closed
    silent: bool = False  # nothing is ever sent
    delay: float = 0.0


Spoiler = Callable[[str, dict[str, Any], Reply], None]


class OpenAIServer:
    """Parameters
    ----------
    backend : the model; scores at temperature 1, writes.
    decode : token ids to text; what ``/detokenize`` says. None: it does not know that path.
    encode : text to token ids, for chat.
    ways : which ways of scoring it knows.
    max_top_k : more is refused with 400.
    key : what a request must bring.
    grade : what chat is answered, from its messages; None: what the backend writes.
    """

    def __init__(
        self,
        backend: TeacherBackend,
        *,
        decode: Callable[[list[int]], str] | None = None,
        encode: Callable[[str], list[int]] | None = None,
        ways: Collection[str] = (VLLM,),
        max_top_k: int = 20,
        key: str | None = None,
        grade: Callable[[list[dict[str, str]]], str] | None = None,
    ) -> None:
        self.spoil: Spoiler | None = None
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """Path and body of all requests so far."""
        self.paid: Counter[str] = Counter(prompt=0, answer=0)
        """Tokens of all requests that were answered with 200."""
        self.running = 0
        self.most_at_once = 0
        self._backend, self._decode, self._encode = backend, decode, encode
        self._ways, self._max_top_k, self._key = ways, max_top_k, key
        self._grade = grade

    @asynccontextmanager
    async def serving(self, port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
        connections: set[asyncio.Task[None]] = set()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                while await self._answer_one(reader, writer):
                    pass
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                connections.discard(task)
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", port, ssl=tls)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in list(connections):
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            await server.wait_closed()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request of a connection; whether there may be another."""
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        path = first.split()[1]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(content) if content else {}
        self.requests.append((path, body))
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            reply = self._reply(path, body, headers)
            if self.spoil is not None:
                self.spoil(path, body, reply)
            await asyncio.sleep(reply.delay)
        finally:
            self.running -= 1
        if reply.silent:
            await asyncio.sleep(3600)
        if reply.status == 200:
            usage = reply.body.get("usage") or reply.body.get("meta_info") or {} if isinstance(reply.body, dict) else {}
            self.paid.update(prompt=usage.get("prompt_tokens", 0), answer=usage.get("completion_tokens", 0))
        data = json.dumps(reply.body).encode() if reply.raw is None else reply.raw
        extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
        writer.write(f"HTTP/1.1 {reply.status} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n".encode())
        writer.write(data if reply.cut_after is None else data[: reply.cut_after])
        await writer.drain()
        return reply.cut_after is None

    # ------------------------------------------------------------ what it answers

    def _reply(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        if self._key is not None and headers.get("authorization") != f"Bearer {self._key}":
            return _refusal(401, f"Incorrect API key provided: {headers.get('authorization', '').removeprefix('Bearer ')}")
        if path == "/v1/models":
            limit = self._backend.info.max_sequence_tokens
            return Reply(body={"data": [{"id": self._backend.info.model, "object": "model", "max_model_len": limit}]})
        if path == "/detokenize" and self._decode is not None:
            return Reply(body={"prompt": self._decode(body["tokens"])})
        if path == "/v1/completions" and "prompt" in body:
            return self._completion(body)
        if path == "/generate" and SGLANG in self._ways:
            return self._sglang(body)
        if path == "/v1/chat/completions" and self._grade is not None:
            text, words = self._grade(body["messages"]), sum(len(message["content"].split()) for message in body["messages"])
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return Reply(body={"choices": [choice], "usage": {"prompt_tokens": words, "completion_tokens": len(text.split())}})
        if path == "/v1/chat/completions" and self._encode is not None:
            longest = body.get("max_completion_tokens") or body["max_tokens"]
            written = self._write(self._encode(body["messages"][-1]["content"]), body, longest)
            choice = {"message": {"role": "assistant", "content": written.text}, "finish_reason": written.finish_reason}
            return Reply(body={"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": len(written.token_ids)}})
        return _refusal(404, f"no such path: {path}")

    def _completion(self, body: dict[str, Any]) -> Reply:
        ids = body["prompt"]
        if isinstance(ids, str):
            assert self._encode is not None, "text needs a tokenizer"
            ids = self._encode(ids)
        if (k := body.get("prompt_logprobs")) is not None and VLLM in self._ways:
            if k > self._max_top_k:
                return _refusal(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self._max_top_k}")
            given: list[Any] = [None]
            for token, own, best in self._rows(ids, k):
                entries = {str(other): {"logprob": value, "rank": rank + 1} for rank, (other, value) in enumerate(best)}
                given.append({str(token): {"logprob": own, "rank": 99}} | entries)
            return self._completed(ids, {"text": "x", "prompt_logprobs": given, "finish_reason": "length"}, 1)
        if body.get("echo") and ECHO in self._ways:
            k = body["logprobs"]
            if k > self._max_top_k:
                return _refusal(400, f"logprobs must be at most {self._max_top_k}")
            rows = list(self._rows(ids, k))
            names = [f"token_id:{token}" for token in ids]
            top = [None] + [{f"token_id:{other}": value for other, value in best} for _, _, best in rows]
            logprobs = {
                "tokens": [*names, "token_id:1"],
                "token_logprobs": [None, *(own for _, own, _ in rows), -1.0],
                "top_logprobs": [*top, {}],
            }
            return self._completed(ids, {"text": "x", "logprobs": logprobs, "finish_reason": "length"}, 1)
        written = self._write(ids, body, body["max_tokens"])
        choice = {"text": written.text, "finish_reason": written.finish_reason}
        if body.get("return_token_ids") and VLLM in self._ways:
            choice["token_ids"] = list(written.token_ids)
        return self._completed(ids, choice, len(written.token_ids))

    def _sglang(self, body: dict[str, Any]) -> Reply:
        ids, k = body["input_ids"], body["top_logprobs_num"]
        rows = list(self._rows(ids, k))
        meta: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": 1}
        meta["input_token_logprobs"] = [[None, ids[0], None], *([own, token, None] for token, own, _ in rows)]
        if k:
            meta["input_top_logprobs"] = [None, *([[value, other, None] for other, value in best] for _, _, best in rows)]
        return Reply(body={"text": "x", "meta_info": meta})

    def _completed(self, ids: list[int], choice: dict[str, Any], written: int) -> Reply:
        usage = {"prompt_tokens": len(ids), "completion_tokens": written}
        return Reply(body={"object": "text_completion", "choices": [{"index": 0, **choice}], "usage": usage})

    def _rows(self, ids: list[int], k: int) -> Any:
        """Of every token but the first: it, its logprob, and the likeliest k with theirs."""
        rollout = Rollout("asked", Prompt("asked", (ids[0],)), tuple(ids[1:]))
        want = SignalSpec("topk", top_k=max(1, k))
        (signal,) = self._backend.score([rollout], want)
        for token, own, others, values in zip(ids[1:], signal.sampled, signal.ids, np.asarray(signal.logprobs, np.float64), strict=True):
            yield token, float(own), [(int(other), float(value)) for other, value in zip(others, values, strict=True)][:k]

    def _write(self, ids: list[int], body: dict[str, Any], longest: int) -> Any:
        is_greedy = body["temperature"] == 0
        sampling = Sampling(
            longest,
            temperature=1.0 if is_greedy else body["temperature"],
            top_k=1 if is_greedy else 0,
            seed=body.get("seed", 0),
            stop_token_ids=tuple(body.get("stop_token_ids", ())),
        )
        return self._backend.generate([Prompt("asked", tuple(ids))], sampling)[0]


def _refusal(status: int, message: str) -> Reply:
    return Reply(status, {"error": {"message": message, "type": "invalid_request_error", "code": None}})
