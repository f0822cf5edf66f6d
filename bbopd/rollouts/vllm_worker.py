"""vLLM's process: ``python -m bbopd.rollouts.vllm_worker FD``, started by `vllm_process` with the environment that vLLM wants.

One loop: hear what the trainer asks, make one step of the engine, tell what has finished. Reading and writing the wire have a thread
each, so that neither a long step nor a busy trainer holds up the other.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from typing import Any

_SIGN_OF_LIFE = 1.0  # seconds
_STEP_TOKENS = 2048  # prompts read in one step, on a CPU: whole ones
_NEVER = -100.0  # added to a logit: as low as vLLM goes


class Wire:
    """Lines of JSON both ways. Where the trainer is gone this process ends at once: there is nothing here to keep."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._told = 0.0
        threading.Thread(target=self._hear, daemon=True).start()
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def get(self, *, wait: bool) -> dict[str, Any] | None:
        """The next message; None where there is none yet and ``wait`` is not set."""
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return None

    def put(self, **message: Any) -> None:
        self._told = time.monotonic()
        self._outbox.put(message)

    def show_life(self) -> None:
        if time.monotonic() - self._told > _SIGN_OF_LIFE:
            self.put(event="alive")

    def flush(self) -> None:
        """Return once everything has been sent; nothing can be sent after."""
        self._outbox.put(None)
        self._teller.join(timeout=10.0)

    def _hear(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    self._inbox.put(json.loads(line))
        finally:
            os._exit(0)

    def _tell(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            except OSError:
                os._exit(0)


class Worker:
    """The engine, and what it has been asked and has not yet answered."""

    def __init__(self, wire: Wire, settings: dict[str, Any]) -> None:
        self._wire = wire
        self._version = 0
        self._engine = make_engine(settings)
        self._sleep_level = settings["sleep_level"]
        self._padding = dict.fromkeys(range(*settings["padding"]), _NEVER) or None
        self._engine.collective_rpc("init_weight_transfer_engine", args=(settings["window"],))
        self._is_draining = self._is_pushing = self._is_asleep = False
        self._held: list[dict[str, Any]] = []  # asked while weights were on their way

    def serve(self) -> None:
        """Forever; the wire ends the process."""
        self._wire.put(event="done")
        while True:
            message = self._wire.get(wait=not (self._is_draining or self._engine.has_unfinished_requests()))
            while message is not None:
                self._handle(message)
                message = self._wire.get(wait=False)
            if self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    self._tell(output)
                self._wire.show_life()
            elif self._is_draining:
                self._begin_push()

    def _handle(self, message: dict[str, Any]) -> None:
        operation = message["op"]
        if operation == "write":
            if self._is_draining or self._is_pushing:
                self._held.append(message)
            else:
                self._write(message)
        elif operation == "abort":
            requests = set(message["requests"])
            self._held = [held for held in self._held if held["request"] not in requests]
            self._engine.abort_request([str(request) for request in requests])
        elif operation == "drain":
            self._is_draining = True
        elif operation == "sleep":
            self._engine.sleep(self._sleep_level)
            self._is_asleep = True
            self._wire.put(event="done")
        elif operation == "load":
            self._try("update_weights", {"tensors": message["tensors"]})
        elif operation == "finish" and self._try("finish_weight_update"):
            self._version, self._is_pushing = message["version"], False
            if self._is_asleep:
                self._engine.wake_up(["kv_cache"])
                self._is_asleep = False
            held, self._held = self._held, []
            for asked in held:
                self._write(asked)

    def _begin_push(self) -> None:
        """Nothing is being written: what was read with the old weights is forgotten, and the new ones may come.

        An engine that sleeps gets memory for weights first, and that for keys and values once the push is over.
        """
        if self._is_asleep:
            self._engine.wake_up(["weights"])
            if self._sleep_level > 1:
                self._engine.collective_rpc("expect_all_weights")
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM would not reset its prefix cache: prompts would be answered from the old weights")
        self._is_draining, self._is_pushing = False, True
        self._try("start_weight_update")

    def _try(self, method: str, *arguments: Any) -> bool:
        """One part of a push; weights that do not fit are the trainer's mistake, and refused."""
        try:
            self._engine.collective_rpc(method, args=arguments)
        except (KeyError, ValueError, AssertionError) as error:
            traceback.print_exc()
            self._wire.put(event="refused", error=f"vLLM refused the student's weights ({type(error).__name__}: {error})")
            return False
        self._wire.put(event="done")
        return True

    def _write(self, message: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=message["max_new_tokens"],
            temperature=message["temperature"],
            top_p=message["top_p"],
            top_k=message["top_k"],
            seed=message["seed"],
            stop_token_ids=message["stop_ids"],
            ignore_eos=True,  # the trainer's stop ids are all there are
            logit_bias=self._padding,
            logprobs=0,  # the sampled token's alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(str(message["request"]), {"prompt_token_ids": message["prompt"]}, params)

    def _tell(self, output: Any) -> None:
        (answer,) = output.outputs
        if not output.finished or answer.finish_reason == "abort":
            return
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {output.request_id} with {answer.finish_reason!r}")
        self._wire.put(
            event="written",
            request=int(output.request_id),
            token_ids=list(answer.token_ids),
            logprobs=list(answer.logprobs.logprobs),
            finish_reason=answer.finish_reason,
            version=self._version,
        )


def make_engine(settings: dict[str, Any]) -> Any:
    """A vLLM engine in this process, with random weights: the trainer pushes its own before the first prompt."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from bbopd.rollouts import vllm_transfer
    from bbopd.vllm_setup import cpu_cache_bytes

    vllm_transfer.register()
    on_cpu = settings["device"] == "cpu"
    cache_bytes = cpu_cache_bytes(
        settings["kv_bytes_of_token"], sequence_tokens=settings["max_sequence_tokens"], sequences=settings["max_batch"]
    )
    arguments = EngineArgs(
        model=settings["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",  # sampling is what the trainer asks, not what a file suggests
        dtype=settings["dtype"],
        max_model_len=settings["max_sequence_tokens"],
        max_num_seqs=settings["max_batch"],
        kv_cache_memory_bytes=cache_bytes if on_cpu else None,
        gpu_memory_utilization=settings["gpu_memory"],
        enable_chunked_prefill=False if on_cpu else None,  # vLLM would turn a request's generator back, which one on a CPU cannot
        max_num_batched_tokens=max(_STEP_TOKENS, settings["max_sequence_tokens"]) if on_cpu else None,
        enforce_eager=on_cpu,  # compiling takes longer than it saves
        enable_prefix_caching=True,
        enable_sleep_mode=bool(settings["sleep_level"]) and not on_cpu,  # the CPU build refuses it here, and ignores the calls
        logprobs_mode="processed_logprobs",  # those sampled from: at the temperature, renormalised over top-k and top-p
        max_logprobs=1,
        weight_transfer_config=WeightTransferConfig(backend=vllm_transfer.BACKEND),
        worker_extension_cls="bbopd.rollouts.vllm_sampler.SamplerExtension",
        hf_overrides={}
        if on_cpu
        else {"head_dtype": "float32"},  # logits as the trainer has them; vLLM on a CPU would convert the head each step
        trust_remote_code=settings["trust_remote_code"],
        disable_log_stats=True,
    )
    engine = LLMEngine.from_engine_args(arguments)
    if on_cpu:
        engine.collective_rpc("draw_one_number_a_token")
    return engine


def main() -> None:
    wire = Wire(int(sys.argv[1]))
    try:
        settings = wire.get(wait=True)
        assert settings is not None
        Worker(wire, settings).serve()
    except Exception as error:
        traceback.print_exc()
        sys.stdout.flush()
        wire.put(event="failed", error=f"{type(error).__name__}: {error}")
        wire.flush()
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
