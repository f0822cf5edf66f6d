"""A process that speaks as `bbopd.rollouts.vllm_worker` does, without vLLM: a token is a function of the weights, the seed and its place.

So whoever knows the weights knows what it writes. Prompts that begin with special ids make it fail in ways of their own. It writes one
answer after another, and takes as many seconds over each as a file says that ``BBOPD_ENGINE_PACE`` names.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbopd.rollouts.vllm_worker import Wire

FAILS, DIES, HANGS = 250, 251, 252
VOCAB = 200
PACE = "BBOPD_ENGINE_PACE"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def fingerprint(weights: Mapping[str, tuple[tuple[int, ...], bytes]]) -> int:
    """Of names, shapes and every bit of the values."""
    found = hashlib.sha256()
    for name in sorted(weights):
        shape, values = weights[name]
        found.update(f"{name} {tuple(shape)}".encode())
        found.update(values)
    return int.from_bytes(found.digest()[:6], "big")


def written(weights: int, prompt: list[int], seed: int, count: int) -> list[int]:
    return [(weights + 31 * sum(prompt) + 7 * seed + 13 * place) % VOCAB for place in range(count)]


def main() -> None:
    wire = Wire(int(sys.argv[1]))
    settings = wire.get(wait=True)
    assert settings is not None
    if not os.path.exists(os.path.join(settings["model"], "config.json")):
        wire.put(event="failed", error="there is no config.json")
        wire.flush()
        return
    window, item_bytes = settings["window"], _ITEM_BYTES[settings["dtype"]]
    memory = mmap.mmap(window["file"], window["capacity"])
    received: dict[str, tuple[tuple[int, ...], bytes]] = {}
    weights, version = 0, 0
    wire.put(event="done")
    while True:
        message: dict[str, Any] = wire.get(wait=True) or {}
        operation = message["op"]
        if operation == "drain":
            received = {}
        elif operation == "load":
            if any("refused" in entry["name"] for entry in message["tensors"]):
                wire.put(event="refused", error="the model has no such parameter")
                continue
            for entry in message["tensors"]:
                size = math.prod(entry["shape"]) * item_bytes
                received[entry["name"]] = tuple(entry["shape"]), memory[entry["offset"] : entry["offset"] + size]
        elif operation == "finish":
            weights, version = fingerprint(received), message["version"]
        if operation in ("drain", "load", "finish"):
            wire.put(event="done")
        elif operation == "write":
            first = message["prompt"][0]
            if first == FAILS:
                raise RuntimeError("the fake was asked to fail")
            if first == DIES:
                os._exit(7)
            if first == HANGS:
                time.sleep(3600)
            if PACE in os.environ:
                time.sleep(float(Path(os.environ[PACE]).read_text()))
            ids = written(weights, message["prompt"], message["seed"], message["max_new_tokens"])
            answer = {"token_ids": ids, "logprobs": [-1.0] * len(ids), "finish_reason": "length", "version": version}
            wire.put(event="written", request=message["request"], **answer)


if __name__ == "__main__":
    main()
