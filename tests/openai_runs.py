"""Whole runs of a tiny student with an OpenAI-compatible endpoint as their teacher: the endpoint, and a run's configuration."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bbopd.config import RunConfig
from tests.openai_server import OpenAIServer
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer


@contextmanager
def served(server: OpenAIServer, at: int = 0) -> Iterator[int]:
    """The server on a thread of its own: a run blocks the event loop while it trains."""
    ports: list[int] = []
    is_up, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def run() -> None:
        async with server.serving(at) as port:
            ports.append(port)
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert is_up.wait(30)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def run_config(folder: Path, port: int, **sections) -> RunConfig:
    """A run of a tiny student on a few lines of text, within ``folder``."""
    model = folder / "model"
    if not model.exists():
        save_folder(model, tiny_llama(vocab_size=262), tiny_tokenizer())
        lines = (f"{n} the thin thing in there, then {n * n} more of them and so on" for n in range(40))
        (folder / "text.txt").write_text("\n\n\n".join(lines))
    base = {
        "student": {"model": str(model), "dtype": "float32"},
        "teacher": {"target": f"openai://127.0.0.1:{port}/v1", "prices": {"prompt": 2.0, "answer": 6.0, "currency": "EUR"}},
        "objective": {"temperature": 1.0},
        "rollouts": {"per_update": 4, "samples_per_prompt": 1, "max_new_tokens": 10, "max_staleness": 0},
        "train": {"batch_tokens": 40, "max_seq_len": 48, "on_policy_tokens": 120, "checkpoint_every": 1},
        "data": {
            "prompts": [{"text": str(folder / "text.txt")}],
            "prompt_tokens": 8,
            "response_tokens": 10,
            "filters": {"min_tokens": 1, "max_repetition": 1.0, "reject_duplicates": False},
        },
        "eval": {"sequences": 2, "rollouts": 2, "max_new_tokens": 8},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        base[name] = {**base[name], **values}
    return RunConfig.model_validate(base)
