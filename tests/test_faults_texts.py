"""A teacher that writes wrongly, and questions that no teacher should see: each is named, and the others are answered."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import bbopd.rpc.teacher_pb2 as pb
from bbopd.data.streams import each
from bbopd.errors import TeacherError
from bbopd.rpc.codec import decode_prompt, decode_sampling, encode_completion
from bbopd.rpc.tensors import fill_tensor
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec
from tests.fault_registry import fault
from tests.fault_server import FaultyTeacher, serving
from tests.faults import connected, score_all

VOCAB = 97
SAMPLING = Sampling(8)
PROMPT = Prompt("p", (1, 2))

Spoil = Callable[[pb.GeneratedText], object]


class Writing(FaultyTeacher):
    """Writes as its backend does, but that the first text is spoilt."""

    def __init__(self, spoil: Spoil) -> None:
        super().__init__(FakeBackend(VOCAB, levels=("topk", "text"), max_top_k=16, max_sequence_tokens=40))
        self._spoil_text = spoil

    async def Generate(self, request, context):  # noqa: N802
        for prompt in request.prompts:
            self.asked.append((prompt.prompt_id, 0))
            (completion,) = self.backend.generate([decode_prompt(prompt)], decode_sampling(request.sampling))
            written = encode_completion(prompt.request_id, completion, self.backend.info.weights_version)
            if len(self.asked) == 1:
                self._spoil_text(written)
            yield pb.GenerateResponse(completion=written)


TEXT_FAULTS: dict[str, Spoil] = {
    "oversized text": lambda written: setattr(written, "text", "a" * 200_000),
    "a text that ended in no known way": lambda written: setattr(written, "finish_reason", 0),
    "ids of a text ≥ V": lambda written: fill_tensor(written.token_ids, np.array([VOCAB], np.int32)),
    "a text longer than asked": lambda written: fill_tensor(written.token_ids, np.zeros(SAMPLING.max_new_tokens + 1, np.int32)),
    "a text under another number": lambda written: setattr(written, "request_id", 7),
}


@pytest.mark.parametrize("name", TEXT_FAULTS)
async def test_a_bad_text(name):
    service = Writing(TEXT_FAULTS[name])
    prompts = [Prompt(f"p{number}", (number, 5)) for number in range(4)]
    async with serving(service) as port, connected(port) as teacher:
        written = [one async for one in teacher.complete(each(prompts), SAMPLING)]
    assert (teacher.counters["bad_answers"], teacher.counters["retries"]) == (1, 1)
    assert len(service.asked) == 5
    assert sorted(one.prompt.prompt_id for one in written) == ["p0", "p1", "p2", "p3"]
    for completion in written:
        assert service.backend.generate([completion.prompt], SAMPLING) == [completion]


for _name in TEXT_FAULTS:
    fault(_name, "refuses the text by name, counts it, asks again")(test_a_bad_text)


@fault("empty, over-long or out-of-vocabulary requests", "refuses them by name, before anything is sent")
@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (Rollout("odd", PROMPT, ()), "rollout odd has no response tokens"),
        (Rollout("odd", Prompt("p", ()), (1,)), "rollout odd has no prompt"),
        (Rollout("odd", PROMPT, (1,) * 39), "rollout odd has 41 tokens, more than teacher .* 40 tokens a sequence"),
        (Rollout("odd", PROMPT, (1, VOCAB)), f"rollout odd holds token id {VOCAB}, outside"),
        (Rollout("odd", PROMPT, (-1, 3)), "rollout odd holds token id -1, outside"),
    ],
)
async def test_a_request_that_cannot_be_answered(rollout, message):
    service = Writing(lambda written: None)
    async with serving(service) as port, connected(port) as teacher:
        with pytest.raises(TeacherError, match=message):
            await score_all(teacher, [rollout], SignalSpec("topk", 1.0, 8))
    assert not service.asked


@fault("a level, temperature or number of ids that is not offered", "refuses it, naming what is offered, before anything is sent")
@pytest.mark.parametrize(
    ("want", "message"),
    [
        (SignalSpec("full"), "does not offer level 'full'; it offers topk, text"),
        (SignalSpec("topk", 1e9, 8), r"temperature 1000000000.0 is outside"),
        (SignalSpec("topk", 1.0, 17), r"top_k 17 is outside 1\.\.16"),
    ],
)
async def test_what_is_not_offered(want, message):
    service = Writing(lambda written: None)
    async with serving(service) as port, connected(port) as teacher:
        with pytest.raises(TeacherError, match=message):
            await score_all(teacher, [Rollout("r", PROMPT, (1,))], want)
    assert not service.asked
