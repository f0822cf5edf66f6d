"""One model on one file of questions, measured item by item, in a process of its own: ``python -m bbopd.compare.measure REQUEST``.

The request is a JSON object (`MeasureRequest`), and what follows `MARK` in the answer another one. An error of a person's making goes to
the error output, with its exit status.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbopd.errors import BbopdError, DataError

MARK = "measured: "
_SHOWN = 3  # answers kept to be looked at


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    model: str
    questions: str
    limit: int | None
    exact_match: bool
    pattern: str | None
    max_new_tokens: int
    device: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """All but the model: what figures that are compared must have in common. Raises `DataError` for a file that cannot be read."""
        try:
            content = Path(self.questions).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.questions}: {error.strerror or error}") from error
        settings = {**self.to_json(), "sha256": hashlib.sha256(content).hexdigest()}
        return {name: value for name, value in settings.items() if name not in ("model", "questions", "device")}


async def measure(request: MeasureRequest) -> dict[str, Any]:
    """Both measures as far as the file has what they need, each with its items, numerators and denominators. Raises `BbopdError`."""
    from bbopd.evaluate.bits_per_byte import score_text, token_byte_counts
    from bbopd.evaluate.exact_match import exact_match, read_answers
    from bbopd.evaluate.student import StudentView
    from bbopd.modeling import compute_dtype, load_model, load_tokenizer, resolve_device, used_vocabulary
    from bbopd.pipeline.student import end_of_answer_ids
    from bbopd.rollouts.hf import HFEngine

    answers = read_answers(request.questions) if request.exact_match else {}
    tokenizer = load_tokenizer(request.model)
    prompts = _prompts(request, tokenizer)
    model = load_model(request.model, device=request.device, dtype=compute_dtype(request.dtype, resolve_device(request.device)))
    end_ids = end_of_answer_ids(model, tokenizer)
    vocab_size = used_vocabulary(tokenizer, model.get_output_embeddings().weight.shape[0])
    measures: dict[str, Any] = {}
    start = time.monotonic()
    if any(prompt.reference_ids for prompt in prompts):
        scores = score_text(StudentView(model, vocab_size=vocab_size), prompts, token_byte_counts(tokenizer)).scores()
        measures["bits_per_byte"] = _items(scores.items, scores.table[:, 0].tolist(), scores.table[:, 1].tolist())
    shown: list[dict[str, str]] = []
    if request.exact_match:
        engine = HFEngine(model, eos_token_ids=end_ids, pad_token_id=end_ids[0], vocab_size=vocab_size)
        answered = await exact_match(
            engine,
            prompts,
            answers,
            pattern=request.pattern,
            max_new_tokens=request.max_new_tokens,
            decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        )
        measures["exact_match"] = _items(
            [item.prompt_id for item in answered], [float(item.is_right) for item in answered], [1.0] * len(answered)
        )
        shown = [asdict(item) for item in answered[:_SHOWN]]
    return {
        "settings": request.settings(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "measures": measures,
        "shown": shown,
        "seconds": round(time.monotonic() - start, 2),
    }


def _prompts(request: MeasureRequest, tokenizer: Any) -> list[Any]:
    """The first ``limit`` questions, in the order of the file."""
    from bbopd.config import DataConfig, PromptSource
    from bbopd.data.prompts import load_prompts

    config = DataConfig(prompts=(PromptSource(jsonl=request.questions),), held_out=0.5)
    found = load_prompts(config, tokenizer, max_seq_len=2**31, eos_token_id=tokenizer.eos_token_id)
    ordered = sorted((*found.train, *found.held_out), key=lambda prompt: int(prompt.prompt_id.rpartition(":")[2]))
    return ordered[: request.limit]


def _items(names: Sequence[str], numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    return {"items": list(names), "numerators": [round(value, 6) for value in numerators], "denominators": list(denominators)}


def main() -> int:
    request = MeasureRequest(**json.loads(sys.argv[1]))
    try:
        print(MARK + json.dumps(asyncio.run(measure(request))), flush=True)
    except BbopdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
