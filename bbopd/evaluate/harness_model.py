"""A `Subject` as lm-evaluation-harness sees a model: its likelihoods through the fused ops, its answers from the rollout engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bbopd.errors import DataError
from bbopd.evaluate.subject import Subject
from bbopd.types import Sampling

_KNOWN = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k"}
_WRITTEN_TOKENS = 256  # where a task does not say, as in lm-evaluation-harness


class HarnessModel(LM):
    """Called from a thread of its own; ``loop`` is where ``subject`` lives."""

    def __init__(self, subject: Subject, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._subject, self._loop = subject, loop

    @property
    def tokenizer_name(self) -> str:
        return str(self._subject.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self._subject.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self._subject.tokenizer.chat_template:
            raise DataError(f"{self._subject.name} has no chat template: leave --chat out")
        return str(
            self._subject.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        found = self._subject.likelihoods([self._subject.pair(*request.args) for request in requests])
        return [(likelihood.nats, likelihood.is_greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """In windows as wide as the model, of which the last alone overlaps the one before: the harness's own rule."""
        windows = [
            (index, tuple(context), tuple(continuation))
            for index, request in enumerate(requests)
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    list(self._subject.encode(request.args[0])), self._subject.start_token, self._subject.positions, context_len=1
                ),
            )
        ]
        found = self._subject.likelihoods([(context, continuation) for _, context, continuation in windows])
        nats = [0.0] * len(requests)
        for (index, _, _), likelihood in zip(windows, found, strict=True):
            nats[index] += likelihood.nats
        return nats

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Requests of one way of writing together. Raises `DataError` for one that the engine does not know."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        for places in groups.values():
            given = normalize_gen_kwargs(requests[places[0]].args[1], _WRITTEN_TOKENS)
            texts = self._write([requests[place].args[0] for place in places], given)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return answers

    def _write(self, prompts: Sequence[str], given: Any) -> list[str]:
        if unknown := sorted(set(given) - _KNOWN):
            raise DataError(f"the task wants answers written with {', '.join(unknown)}, which the hf engine does not know")
        count = int(given["max_gen_toks"])
        sampling = Sampling(count, top_k=1)
        if given["do_sample"]:
            sampling = Sampling(count, float(given["temperature"]), float(given.get("top_p", 1.0)), int(given.get("top_k", 0)))
        writing = self._subject.write(prompts, max_new_tokens=count, stop=given["until"], sampling=sampling)
        return asyncio.run_coroutine_threadsafe(writing, self._loop).result()
