"""The same prompts answered by the student before and after and by its teacher, to be read side by side, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.errors import TeacherError
from bbopd.evaluate.agreement import signal_to_measure, teacher_best
from bbopd.evaluate.student import StudentView
from bbopd.modeling import to_device
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.session import Session
from bbopd.pipeline.texts import chat_ids
from bbopd.types import Completion, Prompt, Rollout, RolloutEngine, Sampling, Teacher

Decode = Callable[[Sequence[int]], str]

_FILE = "samples.json"
_TOKENS = 64  # of an answer, at most
_GARBLED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of an answer, or several where only together they spell characters.

    ``kl`` is KL(teacher‖student) there, in nats at temperature 1 (the largest of several), ``teacher`` the token that the teacher held most
    likely; both None where the teacher was not heard.
    """

    text: str
    kl: float | None = None
    teacher: str | None = None


class RunSamples:
    """Answers of one run to ``texts`` and then to the first held-out prompts, kept in its samples.json.

    A teacher that fails here is left out of them, with a note: the samples are for people to look at, and must not end a run.
    """

    def __init__(self, session: Session, texts: Sequence[str], note: Callable[[str], None]) -> None:
        self._session, self._note = session, note
        tokenizer = session.tokenizer
        held_out = session.prompts.held_out[: session.config.eval.samples]
        asked = [Prompt(f"sample-{index}", tuple(chat_ids(tokenizer, text))) for index, text in enumerate(texts)]
        asked += [Prompt(f"held-out-{index}", prompt.token_ids, prompt.reference_ids) for index, prompt in enumerate(held_out)]
        self._prompts = asked
        self._titles = [*texts, *(self._decode(prompt.token_ids) for prompt in held_out)]

    async def write(self, when: str) -> None:
        """Keep the student's answers of this moment, ``before`` or ``after``, and with the latter the teacher's own.

        Raises what the engine raises.
        """
        if not self._prompts:
            return
        session = self._session
        config = session.config  # an engine was started for answers as long as the run's own, a teacher asked for room for them
        room = max(config.rollouts.max_new_tokens, config.eval.max_new_tokens)
        greedy = Sampling(max_new_tokens=min(_TOKENS, room), top_k=1)
        known = session.folder.read_json(_FILE) or {
            "prompts": self._titles,
            "reference": [self._decode(prompt.reference_ids) if prompt.reference_ids else None for prompt in self._prompts],
        }
        rollouts = await student_rollouts(session.parts.engine, self._prompts, greedy)
        known[when] = [self._decode(rollout.token_ids) if rollout is not None else "" for rollout in rollouts]
        try:
            if session.teacher is not None:
                known[f"{when}_pieces"] = await self._pieces(session.teacher, rollouts)
            if when == "after" and session.teacher is not None and session.teacher.info.offer("text") is not None:
                known["teacher"] = await teacher_answers(session.teacher, self._prompts, greedy)
        except TeacherError as error:
            self._note(f"the teacher is left out of the sample answers: {error}")
        session.folder.write_json(_FILE, known)

    async def _pieces(self, teacher: Teacher, rollouts: Sequence[Rollout | None]) -> list[list[list[Any]]]:
        session = self._session
        student = StudentView(session.model, compute_dtype=session.compute_dtype, vocab_size=session.vocab_size)
        found = await disagreement(student, teacher, [rollout for rollout in rollouts if rollout is not None], self._decode_all)
        return [
            [[piece.text, piece.kl, piece.teacher] for piece in found.get(rollout.rollout_id, ())] if rollout is not None else []
            for rollout in rollouts
        ]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._session.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _decode_all(self, ids: Sequence[int]) -> str:
        return str(self._session.tokenizer.decode(list(ids)))


def read_samples(folder: RunFolder) -> list[dict[str, Any]]:
    """A mapping for each prompt of a run's samples.json: ``prompt``, ``reference``, ``before``, ``before_pieces`` …, None where unknown."""
    known = folder.read_json(_FILE)
    if known is None:
        return []
    columns = ("reference", "before", "before_pieces", "after", "after_pieces", "teacher")
    return [
        {"prompt": prompt, **{column: known[column][index] if column in known else None for column in columns}}
        for index, prompt in enumerate(known["prompts"])
    ]


async def student_rollouts(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout | None]:
    """The answers of the student as ``engine`` holds it now, in the order of ``prompts``; the same seed gives the same answers."""
    rollouts: dict[str, Rollout] = {rollout.prompt.prompt_id: rollout async for rollout in engine.generate(each(prompts), sampling)}
    return [rollouts.get(prompt.prompt_id) for prompt in prompts]


async def teacher_answers(teacher: Teacher, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
    """The teacher's own answers, in the order of ``prompts``."""
    answers: dict[str, Completion] = {answer.prompt.prompt_id: answer async for answer in teacher.complete(each(prompts), sampling)}
    return [answers[prompt.prompt_id].text if prompt.prompt_id in answers else "" for prompt in prompts]


async def disagreement(
    student: StudentView, teacher: Teacher, rollouts: Sequence[Rollout], decode: Decode
) -> Mapping[str, Sequence[Piece]]:
    """Where ``student`` and ``teacher`` differ in each of ``rollouts``, by its id; without KL where the teacher gives no distributions.

    Raises `TeacherError` as the teacher does.
    """
    written = [rollout for rollout in rollouts if len(rollout)]
    want = signal_to_measure(teacher.info)
    if want is None or not written:
        return {rollout.rollout_id: spelled(rollout.token_ids, decode) for rollout in written}
    found: dict[str, Sequence[Piece]] = {}
    async for scored in teacher.score(each(written), want):
        batch = assemble([scored], want)
        assert batch.teacher is not None, "a scored rollout makes a batch with a teacher"
        signal = to_device(batch.teacher, student.device)
        kl_N = student.divergence(student.hidden(batch), signal, "forward_kl").double().cpu()
        is_valid_N = signal.valid.cpu() if signal.valid is not None else kl_N.isfinite()
        ids = scored.rollout.token_ids
        values = [float(kl) if is_valid else None for kl, is_valid in zip(kl_N, is_valid_N, strict=True)]
        best = [decode([index]) for index in teacher_best(signal).tolist()]
        found[scored.rollout.rollout_id] = spelled(ids, decode, values, best)
    return found


def spelled(ids: Sequence[int], decode: Decode, kl: Sequence[float | None] | None = None, best: Sequence[str] | None = None) -> list[Piece]:
    """``ids`` as the fewest tokens each that decode to whole characters; their texts are the decoded text, cut up."""
    pieces: list[Piece] = []
    begin, so_far = 0, ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if text.endswith(_GARBLED) and end < len(ids):
            continue  # part of a character
        known = [value for value in (kl[begin:end] if kl is not None else ()) if value is not None]
        shown = best[begin] if best is not None and known else None
        pieces.append(Piece(text[len(so_far) :], round(max(known), 4) if known else None, shown))
        begin, so_far = end, text
    return pieces
