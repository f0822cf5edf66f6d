"""A teacher served by vLLM: quantised and very large models that transformers runs slowly or not at all, at the levels that vLLM knows.

vLLM scores a prompt at temperature 1 and gives its best ids with their logprobs, no more: so there is no ``full``, T is 1, and the tail is
*derived* as 1 − Σp, which the offers say. Student-chosen ids need its V2 model runner, and are offered where the engine runs that.

Shape suffixes: ``L`` response tokens of one rollout, ``K`` top-k, ``M`` candidates, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bbopd.config import ServeConfig
from bbopd.errors import EngineError, ModelError
from bbopd.teachers.prompt_ids import prompt_ids
from bbopd.teachers.vllm_engine import MOST_ENTRIES, LoadedEngine, load_engine
from bbopd.types import Completion, FinishReason, Prompt, Rollout, Sampling, SignalSpec, TeacherSignal

__all__ = ["VLLMBackend", "read_scores", "tail_of"]

_TAIL_RESOLUTION = 2.0**-23  # of a sum of float32 probabilities: less than that is not known to be there


class VLLMBackend:
    """A vLLM engine in this process as a `TeacherBackend`; made by `from_config`."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self.info = loaded.info
        self._engine = loaded.engine
        self._tokenizer = loaded.tokenizer
        self._end_ids = loaded.end_ids
        self._numbers = itertools.count()

    @classmethod
    def from_config(cls, config: ServeConfig) -> VLLMBackend:
        """Load what a teacher's configuration names, and try it. Raises as `load_engine`."""
        backend = cls(load_engine(config))
        backend.score([Rollout("first", Prompt("first", (0,)), (0,))], SignalSpec("topk", top_k=1))  # the first one takes seconds longer
        return backend

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        """vLLM reads each rollout as a prompt; rows of the prompt proper are made too, and dropped."""
        width = want.top_k if want.level == "topk" else 0
        signals: list[TeacherSignal | None] = [None] * len(rollouts)

        def read(place: int, output: Any) -> None:
            signals[place] = read_scores(output, rollouts[place], want)

        asked = [(rollout.all_ids, self._scoring(rollout, want), len(rollout.all_ids) * (width + 1)) for rollout in rollouts]
        self._run(asked, read)
        return [signal for signal in signals if signal is not None]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Let it write. An answer's random numbers come from the seed and its prompt alone."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        completions: list[Completion | None] = [None] * len(prompts)

        def read(place: int, output: Any) -> None:
            completions[place] = self._completion(prompts[place], output.outputs[0])

        is_greedy = sampling.top_k == 1
        how = {} if is_greedy else {"top_p": sampling.top_p, "top_k": sampling.top_k}
        asked = [
            (
                prompt.token_ids,
                SamplingParams(
                    max_tokens=sampling.max_new_tokens,
                    temperature=0.0 if is_greedy else sampling.temperature,
                    seed=_mixed_seed(sampling.seed, prompt),
                    stop_token_ids=sorted({*self._end_ids, *sampling.stop_token_ids}),
                    ignore_eos=True,  # the ids above are all that end an answer
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    **how,
                ),
                0,
            )
            for prompt in prompts
        ]
        self._run(asked, read)
        return [completion for completion in completions if completion is not None]

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt that is text or messages (see `prompt_ids`)."""
        return prompt_ids(prompt, self._tokenizer, self.info.model)

    def _scoring(self, rollout: Rollout, want: SignalSpec) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        chosen: dict[str, Any] = {}
        if want.level == "candidates":
            chosen = {
                "prompt_logprob_token_ids": np.ascontiguousarray(rollout.candidate_ids, np.int32),
                "prompt_logprob_start": len(rollout.prompt.token_ids) - 1,
            }
        return SamplingParams(
            max_tokens=1,  # the least there is; it comes with the last row of the prompt
            temperature=0.0,
            prompt_logprobs=min(want.top_k, self.info.vocab_size) if want.level == "topk" else 0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **chosen,
        )

    def _run(self, asked: Sequence[tuple[tuple[int, ...], Any, int]], read: Callable[[int, Any], None]) -> None:
        """Run requests (ids, parameters, entries of logprobs that it will hold), as many at a time as memory allows, until all are read."""
        waiting, running, held = deque(enumerate(asked)), dict[str, tuple[int, int]](), 0
        try:
            while waiting or running:
                while waiting and (not running or held + waiting[0][1][2] <= MOST_ENTRIES):
                    place, (ids, parameters, entries) = waiting.popleft()
                    number = str(next(self._numbers))
                    self._engine.add_request(number, {"prompt_token_ids": list(ids)}, parameters)
                    running[number] = (place, entries)
                    held += entries
                for output in self._engine.step():
                    if output.finished:
                        place, entries = running.pop(output.request_id)
                        held -= entries
                        read(place, output)
        finally:
            if running:
                self._engine.abort_request(list(running))

    def _completion(self, prompt: Prompt, written: Any) -> Completion:
        reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
        if written.finish_reason not in reasons:
            raise EngineError(f"vLLM ended the answer to prompt {prompt.prompt_id} with {written.finish_reason!r}")
        ids = tuple(written.token_ids)
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return Completion(prompt, ids, text, reasons[written.finish_reason])


def read_scores(output: Any, rollout: Rollout, want: SignalSpec) -> TeacherSignal:
    """What vLLM said of one rollout's response tokens, as a signal.

    Parameters
    ----------
    output : a finished ``RequestOutput`` with ``FlatLogprobs``: nothing for the first token of the prompt; for each further one the
        token itself, then the best ids in falling order.

    Raises
    ------
    ModelError : it holds fewer rows than the prompt has tokens, or numbers that are no logprobs.
    """
    width = want.top_k + 1 if want.level == "topk" else 1
    count, first = len(rollout.all_ids), len(rollout.prompt.token_ids)
    flat = output.prompt_logprobs
    start = (first - 1) * width
    if flat is None or len(flat.logprobs) != (count - 1) * width:
        raise ModelError(f"rollout {rollout.rollout_id}: vLLM gave {0 if flat is None else len(flat.logprobs)} logprobs for {count} tokens")
    logprobs = np.array(flat.logprobs[start:], np.float32).reshape(-1, width)
    sampled = np.ascontiguousarray(logprobs[:, 0])
    if want.level == "sampled":
        return TeacherSignal("sampled", want.temperature, sampled=sampled)
    if want.level == "topk":
        ids = np.array(flat.token_ids[start:], np.int32).reshape(-1, width)
        found = np.ascontiguousarray(logprobs[:, 1:])
        return TeacherSignal(
            "topk", want.temperature, ids=np.ascontiguousarray(ids[:, 1:]), logprobs=found, log_tail=tail_of(found), sampled=sampled
        )
    assert rollout.candidate_ids is not None, "check_rollout comes first"
    found = np.array(output.prompt_token_id_logprobs, np.float32)
    ids = rollout.candidate_ids.astype(np.int32, copy=False)
    return TeacherSignal("candidates", want.temperature, ids=ids, logprobs=found, log_tail=tail_of(found), sampled=sampled)


def tail_of(logprobs: np.ndarray) -> np.ndarray:
    """log(1 − Σp) [L] float32 of ``logprobs`` [L, K], at least the resolution of such a sum: a tail that small is not told from none."""
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    return np.log(np.maximum(1.0 - mass, _TAIL_RESOLUTION)).astype(np.float32)


def _mixed_seed(seed: int, prompt: Prompt) -> int:
    """A seed of one answer: asking the same seed for another prompt must not repeat the same random numbers."""
    return zlib.crc32(repr((seed, prompt.prompt_id, prompt.token_ids)).encode())
