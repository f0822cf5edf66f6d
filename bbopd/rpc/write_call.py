"""An open `Generate` call: its prompts are checked and taken, wait for the model, and come back as each is answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.backend import with_ids
from bbopd.rpc.calls import Item, OpenCall, Outcome, ProtocolError, check_version, refusal
from bbopd.rpc.codec import decode_prompt, decode_replay_id, decode_sampling, encode_completion, encode_failure
from bbopd.rpc.jobs import Answer
from bbopd.rpc.limits import RefusedError, check_prompt, check_sampling
from bbopd.types import Completion, Prompt, Rollout, Sampling

__all__ = ["Generation"]


class Generation(OpenCall):
    """A `Generate` call: all its prompts go to the scheduler at once, and come back as each is answered."""

    kind = "generate"

    async def responses(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        check_version(request.protocol_version)
        sampling = decode_sampling(request.sampling)
        try:
            check_sampling(sampling, self._served.info)
        except RefusedError as error:
            raise ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        for message in request.prompts:
            self._take(message, sampling)
        self._takes_more = False
        self.end_if_done()
        while (ready := await self._next()) is not None:
            yield ready.message
            self._retire(ready.item, ready.outcome)
            self.end_if_done()

    async def _next(self) -> Outcome | None:
        while not self._ready:
            self._changed.clear()
            await self._changed.wait()
        ready = self._ready.popleft()
        if isinstance(ready, ProtocolError):
            raise ready
        return ready

    def _take(self, message: pb.GeneratePrompt, sampling: Sampling) -> None:
        item = Item(message.request_id, "prompt", "text", message.ByteSize())
        self._accept(item)
        try:
            self._client.count_request(f"item {item.request_id}")
            prompt, replay_id = decode_prompt(message), decode_replay_id(message.replay_id)
            item.name = f"prompt {prompt.prompt_id}"
            item.prompt_tokens, item.tokens = len(prompt.token_ids), sampling.max_new_tokens
            check_prompt(prompt, sampling, self._served.info)
            if prompt.is_text:
                prompt = with_ids(prompt, self._served.backend)
                item.prompt_tokens = len(prompt.token_ids)
                check_prompt(prompt, sampling, self._served.info)
            self._submit(item, sampling, prompt, 0, replay_id, 0)
        except (ValueError, RefusedError) as error:
            self._deliver(item, Prompt("", ()), 0, 0, refusal(error))

    def _deliver(self, item: Item, payload: Rollout | Prompt, size: int, resume_from: int, answer: Answer) -> None:
        if isinstance(answer, RefusedError):
            failed = pb.GenerateResponse(failure=encode_failure(item.request_id, answer))
            self._put(Outcome(item, answer.code, failed))
            return
        assert isinstance(answer, Completion)
        item.tokens = len(answer.token_ids)
        written = pb.GenerateResponse(completion=encode_completion(item.request_id, answer, self._served.info.weights_version))
        self._put(Outcome(item, "ok", written))
