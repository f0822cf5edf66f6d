"""Rollouts by vLLM, in a process beside the trainer or on another machine; new weights are pushed into it in place, without a file.

The engine's process (`vllm_worker`) never sees the student's files: it builds the architecture from the student's configuration and gets
all weights, the first ones too, from the trainer. So a student that was read from GGUF, pruned, or just initialised needs no saving.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bbopd.errors import DataError, EngineError, ModelError
from bbopd.modeling import plain_sizes
from bbopd.rollouts.vllm_client import EngineClient, Written
from bbopd.rollouts.vllm_process import EngineProcess
from bbopd.rollouts.vllm_remote import EngineConnection, EngineServer
from bbopd.rollouts.vllm_weights import WeightWindow
from bbopd.types import Prompt, Rollout, Sampling
from bbopd.vllm_setup import engine_environment, kv_bytes_of_token, require_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_BATCH = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True, slots=True)
class VLLMOptions:
    """How an engine is set up. ``max_batch`` 0 takes what suits the device; ``gpu_memory`` is its share of a GPU."""

    max_sequence_tokens: int  # prompt and answer together
    dtype: torch.dtype = torch.float32  # of weights, activations and the KV cache
    max_batch: int = 0  # sequences written at a time
    gpu_memory: float = 0.4
    vocab_size: int | None = None  # ids from there on only pad the head and are never sampled; None: all are tokens
    timeout: float = 600.0  # seconds without a sign of life, loading included, before it counts as dead
    trust_remote_code: bool = False
    sleep_level: int = 0  # what `VLLMEngine.sleep` does; 1 keeps the weights in the host's memory, 2 forgets them, 0 allows no sleep


@dataclass(frozen=True, slots=True)
class _Stream:
    """One `VLLMEngine.generate` under way."""

    room: asyncio.Semaphore  # for prompts whose answers have not been taken yet
    written: Written = field(default_factory=asyncio.Queue)
    prompts: dict[int, tuple[Prompt, int]] = field(default_factory=dict)  # request -> prompt and draw


class VLLMEngine:
    """A `RolloutEngine` over vLLM; made by `start`, ended by `close`. It belongs to the event loop that started it."""

    def __init__(self, client: EngineClient, window: WeightWindow, options: VLLMOptions, eos_token_ids: Sequence[int]) -> None:
        self.version: int | None = None
        """Of the weights it has; None before the first, and while it sleeps."""
        self.notes: tuple[str, ...] = ()
        """What would make it quicker here, for a person to read."""
        self._client, self._window, self._options = client, window, options
        self._stop_ids = frozenset(eos_token_ids)
        self._pushing = asyncio.Lock()
        self._is_asleep = False

    @classmethod
    async def start(
        cls,
        model: PreTrainedModel,
        options: VLLMOptions,
        *,
        eos_token_ids: Sequence[int],
        folder: str | os.PathLike[str],
        server: EngineServer | None = None,
    ) -> VLLMEngine:
        """Start an engine for ``model``'s architecture, on its device or by ``server``; it can write once `load_weights` has been called.

        Parameters
        ----------
        model
            The student. Its configuration and the sizes of its parameters are read, its weights are not.
        eos_token_ids
            Tokens that end an answer; the one that did is the answer's last token.
        folder
            Takes the configuration and ``vllm.log`` of an engine on this machine.

        Raises
        ------
        EngineError
            vLLM is not installed, does not know the architecture, or was not ready in time.
        """
        device = next(model.parameters()).device
        sizes = plain_sizes(model)
        place = Path(folder).absolute()
        link: EngineProcess | EngineConnection
        notes: tuple[str, ...] = ()
        if server is not None:
            link = await EngineConnection.open(server)
            window = WeightWindow(sizes, options.dtype, torch.device("cpu"))
            device_type, what = link.device, {"configuration": _configuration(model).to_json_string(), "largest_parameter": max(sizes)}
        else:
            require_vllm("rollouts.engine is vllm", "set rollouts.engine=hf")
            environment = engine_environment(device.type)
            _write_configuration(model, place / "vllm-model")
            window = WeightWindow(sizes, options.dtype, device)
            try:
                shared = () if window.file is None else (window.file,)
                link = await EngineProcess.start(environment.variables, place / "vllm.log", shared_files=shared)
            except BaseException:
                window.close()
                raise
            device_type, notes = device.type, environment.notes
            what = {"model": str(place / "vllm-model"), "device": device_type, "window": window.describe()}
        options = options if options.max_batch else replace(options, max_batch=_MAX_BATCH.get(device_type, _MAX_BATCH["cuda"]))
        engine = cls(EngineClient(link, timeout=options.timeout), window, options, eos_token_ids)
        engine.notes = notes
        try:
            await engine._client.ask(
                op="start",
                dtype=str(options.dtype).removeprefix("torch."),
                max_sequence_tokens=options.max_sequence_tokens,
                max_batch=options.max_batch,
                kv_bytes_of_token=kv_bytes_of_token(model.config.get_text_config(decoder=True), options.dtype.itemsize),
                gpu_memory=options.gpu_memory,
                trust_remote_code=options.trust_remote_code,
                sleep_level=options.sleep_level,
                padding=_padding(model, options.vocab_size),
                **what,
            )
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None where that is another machine's."""
        return self._client.process.pid

    @property
    def room(self) -> int:
        """Prompts that it takes at a time: twice as many as are written, so that no place is empty where a consumer takes its time."""
        return 2 * self._options.max_batch

    def check(self) -> None:
        """Raises `EngineError` where it has failed."""
        self._client.check()

    async def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        """Write one answer to every prompt; each is yielded as it ends, in any order. ``draw`` is a prompt's place in the stream.

        As `write` in all else.
        """
        async with aclosing(self.write(_numbered(prompts), sampling)) as rollouts:
            async for rollout in rollouts:
                yield rollout

    async def write(self, prompts: AsyncIterator[tuple[int, Prompt]], sampling: Sampling) -> AsyncGenerator[Rollout, None]:
        """Write one answer to every prompt, each with its ``draw``; an answer is yielded as it ends.

        An answer's random numbers come from (``sampling.seed``, draw) alone; as its neighbours in the batch change the last bits of its
        logits, it repeats as far as those bits decide nothing. Closing or
        cancelling the iterator aborts what is being written.

        Raises
        ------
        DataError
            For a prompt that leaves no room for ``sampling.max_new_tokens`` within ``max_sequence_tokens``.
        ModelError
            For logprobs that are not finite.
        EngineError
            The engine has died, failed, said nothing for ``timeout`` seconds, or has no weights yet.
        """
        if sampling.temperature <= 0 or sampling.max_new_tokens < 1:
            raise ValueError(f"cannot sample {sampling}: temperature and max_new_tokens must be positive (top_k=1 always takes the best)")
        self._client.check()
        if self.version is None:
            raise EngineError("vLLM's engine has no weights yet, or is asleep: call load_weights before generate")
        stream = _Stream(asyncio.Semaphore(self.room))
        feeding = asyncio.create_task(self._feed(prompts, sampling, stream))
        is_fed = False
        try:
            while stream.prompts or not is_fed:
                answer = await stream.written.get()
                if answer is None:
                    is_fed = True
                    continue
                if isinstance(answer, Exception):
                    raise answer
                prompt, draw = stream.prompts.pop(answer["request"])
                stream.room.release()
                yield _rollout(prompt, draw, answer, sampling)
        finally:
            feeding.cancel()
            await asyncio.wait({feeding})
            self._client.abort(stream.prompts)

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Put ``weights`` (names and shapes of the Hugging Face model, a tied one once) into the engine and call them ``version``.

        The first call gives all of them; a later one may leave out what has not changed, but not one of several that vLLM keeps as one
        (queries, keys and values).
        Waits for the rollouts being written, so that each is of one version; forgets the prompts that were read with the old weights.

        Raises
        ------
        ModelError
            A name that the engine's model does not have, or a parameter that was left out.
        EngineError
            As `generate`; after a call that was cut off the engine is ended, since it would hold weights of two versions.
        """
        async with self._pushing:
            self._client.check()
            if self._window.device.type == "cuda" and self._is_asleep:
                torch.cuda.empty_cache()  # what the trainer has used meanwhile and keeps for itself
            try:
                await self._client.ask(op="drain")
                fills = self._window.fill(weights)
                while (tensors := await asyncio.to_thread(next, fills, None)) is not None:
                    await self._client.process.carry(self._window.memory[: self._window.end_of(tensors)])
                    await self._client.ask(op="load", tensors=tensors)
                await self._client.ask(op="finish", version=version)
            except BaseException as error:
                self._client.fail(EngineError(f"a push of weights to vLLM was cut off ({type(error).__name__}: {error})"))
                raise
            self.version, self._is_asleep = version, False

    async def sleep(self) -> None:
        """Give the memory on the GPU back until the next `load_weights`, which wakes it; what is still being written is aborted.

        At ``sleep_level`` 2 that call must give all weights. Harmless while it sleeps. Raises `EngineError` as `generate`.
        """
        assert self._options.sleep_level, "an engine has to be started for it"
        async with self._pushing:
            if self._is_asleep:
                return
            await self._client.ask(op="sleep")
            self.version, self._is_asleep = None, True

    async def close(self) -> None:
        """End the process and give its memory back. Harmless where it has ended."""
        await self._client.close()
        self._window.close()

    async def _feed(self, prompts: AsyncIterator[tuple[int, Prompt]], sampling: Sampling, stream: _Stream) -> None:
        """Send prompts as fast as there is room for them, and tell ``stream`` when that was all."""
        asked = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_ids": sorted(self._stop_ids | set(sampling.stop_token_ids)),
        }
        try:
            async for draw, prompt in prompts:
                self._check_length(prompt, sampling)
                await stream.room.acquire()
                seed = _seed_of(sampling.seed, draw)
                request = self._client.write(stream.written, prompt=prompt.token_ids, seed=seed, **asked)
                stream.prompts[request] = (prompt, draw)
        except Exception as error:
            stream.written.put_nowait(error)
        else:
            stream.written.put_nowait(None)

    def _check_length(self, prompt: Prompt, sampling: Sampling) -> None:
        length, room, limit = len(prompt.token_ids), sampling.max_new_tokens, self._options.max_sequence_tokens
        if not length:
            raise DataError(f"prompt {prompt.prompt_id} is empty: a model needs at least one token to go on from")
        if length + room > limit:
            raise DataError(
                f"prompt {prompt.prompt_id} has {length} tokens; with rollouts.max_new_tokens {room} that is more than the {limit} that "
                "this engine was started for: shorten the prompt, lower max_new_tokens, or raise train.max_seq_len"
            )


async def _numbered(prompts: AsyncIterator[Prompt]) -> AsyncIterator[tuple[int, Prompt]]:
    draw = 0
    async for prompt in prompts:
        yield draw, prompt
        draw += 1


def _configuration(model: PreTrainedModel) -> Any:
    """The student's configuration as vLLM reads it: its class named, and nothing of how its weights were stored."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of a GGUF file; the weights that are pushed are plain
    return config


def _write_configuration(model: PreTrainedModel, folder: Path) -> None:
    try:
        _configuration(model).save_pretrained(folder)
    except OSError as error:
        raise EngineError(f"cannot write vLLM's configuration to {folder}: {error.strerror or error}; set output=") from error


def _seed_of(seed: int, draw: int) -> int:
    """A generator's seed in 63 bits for one rollout, a function of (seed, draw) alone."""
    return int(np.random.SeedSequence([seed % 2**64, draw]).generate_state(1, np.uint64)[0] >> 1)


def _rollout(prompt: Prompt, draw: int, answer: dict[str, Any], sampling: Sampling) -> Rollout:
    logprobs = np.asarray(answer["logprobs"], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise ModelError(
            "the student's logits are NaN or infinite: its weights have diverged; lower train.lr, or resume an older checkpoint"
        )
    return Rollout(
        rollout_id=f"{prompt.prompt_id}#{draw}",
        prompt=prompt,
        token_ids=tuple(answer["token_ids"]),
        finish_reason=answer["finish_reason"],
        logprobs=logprobs,
        temperature=sampling.temperature,
        weights_version=answer["version"],
        draw=draw,
    )


def _padding(model: PreTrainedModel, vocab_size: int | None) -> tuple[int, int]:
    """The ids, from the first up to but without the second, that stand for no token."""
    rows = model.get_output_embeddings().weight.shape[0]
    return (rows if vocab_size is None else vocab_size, rows)
