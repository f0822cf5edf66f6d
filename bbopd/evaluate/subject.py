"""A model that is asked tasks: how likely it finds texts, and what it writes, with the time that takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from bbopd.data.streams import each
from bbopd.errors import DataError, ModelError
from bbopd.evaluate.memory import peak_bytes, reset_peak
from bbopd.evaluate.student import PACKED_TOKENS, StudentView
from bbopd.modeling import max_positions
from bbopd.modeling.vocabulary import token_table
from bbopd.rpc.limits import RefusedError
from bbopd.teachers.prompt_ids import prompt_ids
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TIMED = 3  # requests that are repeated one by one for their latency
_DEFAULT_POSITIONS = 2048

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of a continuation: its log-probability in nats, and whether each of its tokens is the likeliest. ``tokens`` of it were scored."""

    nats: float
    is_greedy: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one task: tokens through the model (read and written), over seconds in it; a request alone, the median of a few."""

    tokens: int
    seconds: float
    latency_seconds: float | None
    peak_memory_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def figures(self) -> dict[str, float | None]:
        """What models are compared by: tokens a second, latency and peak memory."""
        return {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "latency_seconds": self.latency_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(slots=True)
class Counts:
    """Of the task under way: tokens through the model, and seconds in it."""

    tokens: int = 0
    seconds: float = 0.0


class Subject:
    """One model under evaluation.

    Parameters
    ----------
    name : what results call it.
    engine : writes with the weights of ``model``; prompt and answer of ``engine_tokens`` at most (None: as the model's positions allow).
    vocab_size : logits from there on are padding.
    compute_dtype : as in `StudentView`.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: RolloutEngine,
        vocab_size: int,
        compute_dtype: torch.dtype | None = None,
        engine_tokens: int | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.compute_dtype = compute_dtype
        self.positions = max_positions(model) or _DEFAULT_POSITIONS
        self.engine_positions = min(engine_tokens or self.positions, self.positions)  # for a prompt and what is written
        self.truncated = 0  # requests of this task whose beginning did not fit
        self.engine = engine
        self._view: StudentView | None = None
        self._counts = Counts()
        self._timed: list[Callable[[], Awaitable[object]]] = []
        special = set(tokenizer.all_special_ids)  # these put nothing into an answer
        self._spellings = {index: spelt for index, spelt in token_table(tokenizer, vocab_size).items() if index not in special}

    @property
    def start_token(self) -> int:
        """What a text begins after: the token that begins a sequence, or else the one that ends it. Raises `ModelError` without either."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError(f"{self.name}: its tokenizer has no token that begins or ends a text, so nothing precedes a text's first token")

    # ------------------------------------------------------------ a task's time

    def begin(self) -> None:
        """A task begins: counts start anew, with the weights as they are now."""
        self._view = StudentView(self.model, compute_dtype=self.compute_dtype, vocab_size=self.vocab_size)
        self._counts, self.truncated = Counts(), 0
        self._timed = []
        reset_peak(self.model.device)

    async def finish(self, *, with_latency: bool) -> Speed:
        """What the task took. ``with_latency`` repeats a few of its requests one by one."""
        counts, peak, timed = self._counts, peak_bytes(self.model.device), self._timed
        self._counts = Counts()  # what is repeated does not count
        took = []
        for ask in timed if with_latency else []:
            start = time.monotonic()
            await ask()
            took.append(time.monotonic() - start)
        self._view, self._timed = None, []
        return Speed(counts.tokens, counts.seconds, statistics.median(took) if took else None, peak)

    @contextmanager
    def timed(self) -> Iterator[Counts]:
        """Add the time of what is done inside to the task's; tokens are the caller's to add."""
        start = time.monotonic()
        yield self._counts
        self._counts.seconds += time.monotonic() - start

    def repeat(self, requests: Sequence[Callable[[], Awaitable[object]]]) -> None:
        """Requests that `finish` may time, each by itself."""
        self._timed.extend(requests[: _TIMED - len(self._timed)])

    # ------------------------------------------------------------ likelihoods

    def encode(self, text: str) -> Ids:
        """Ids as the tokenizer makes them by default; a text that begins with its first token gets no second one."""
        start = self.tokenizer.bos_token
        has_start = bool(start) and text.startswith(start)
        return tuple(self.tokenizer.encode(text, add_special_tokens=not has_start, verbose=False))

    def pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of both, cut where those of the whole text have the context's length; spaces at the seam go to the continuation, as models
        learnt to spell words (lm-evaluation-harness does the same). Without a context, the start token is one."""
        if not context:
            return (self.start_token,), tuple(self.tokenizer.encode(continuation, add_special_tokens=False, verbose=False))
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        if not context:
            return self.pair("", continuation)
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    def exchange(self, prompt: str, answer: str, *, chat: bool, delimiter: str) -> tuple[Ids, Ids]:
        """Ids of a prompt and of an answer to it. With ``chat`` the prompt is a user's and the answer ends with the end of a text."""
        if not chat:
            return self.pair(prompt, delimiter + answer)
        end = self.tokenizer.eos_token_id
        ids = self.tokenizer.encode(answer, add_special_tokens=False, verbose=False)
        return self._prompt_ids(prompt, chat=True), (*ids, *(() if end is None else (end,)))

    def likelihoods(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Likelihood]:
        """Of each continuation after its context, both as ids; equal contexts that follow each other are read once.

        Where both are too long for the model's positions, the context loses its beginning. Raises `DataError` for a continuation that is
        empty or too long by itself.
        """
        asked = [self._fit(context, continuation) for context, continuation in pairs]
        self.repeat([partial(self._one, pair) for pair in asked[:_TIMED]])
        with self.timed():
            return [likelihood for batch in _batches(asked) for likelihood in self._score(batch)]

    def _fit(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        if not continuation:
            raise DataError("a continuation of no token has no likelihood: a choice is empty, or the prompt's last token swallows it")
        room = self.positions + 1 - len(continuation)  # the last token is predicted, and not read
        if room < 1:
            raise DataError(f"a continuation of {len(continuation)} tokens is longer than the {self.positions} positions of {self.name}")
        self.truncated += len(context) > room
        return context[-room:], continuation

    async def _one(self, pair: tuple[Ids, Ids]) -> list[Likelihood]:
        return self._score([pair])

    def _score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Likelihood]:
        assert self._view is not None, "begin comes first"
        rollouts = [
            Rollout(str(index), Prompt(str(index), context), continuation, origin="reference", finish_reason="reference")
            for index, (context, continuation) in enumerate(pairs)
        ]
        found = self._view.score(rollouts, top_k=1)
        assert found.sampled is not None, "token_ids were given"
        assert found.topk_ids is not None, "top_k was asked for"
        lengths = [len(continuation) for _, continuation in pairs]
        own_N = torch.tensor([token for _, continuation in pairs for token in continuation])
        is_best_N = found.topk_ids[:, 0].cpu() == own_N
        self._counts.tokens += sum(len(next(iter(same))[0]) for _, same in groupby(pairs, key=lambda pair: pair[0])) + sum(lengths)
        return [
            Likelihood(float(nats.sum()), bool(best.all()), len(nats))
            for nats, best in zip(found.sampled.double().cpu().split(lengths), is_best_N.split(lengths), strict=True)
        ]

    # ------------------------------------------------------------ answers

    def prompt_room(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have before an answer of ``max_new_tokens``. Raises `DataError` where there are none."""
        room = self.engine_positions - max_new_tokens
        if room < 1:
            raise DataError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the {self.engine_positions} tokens of {self.name}"
            )
        return room

    def prompt_lengths(self, prompts: Sequence[str], *, chat: bool) -> list[int]:
        """Tokens of each, as `write` asks. Raises `DataError` where the chat template refuses one."""
        return [len(self._prompt_ids(prompt, chat)) for prompt in prompts]

    async def write(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = (), chat: bool = False, sampling: Sampling | None = None
    ) -> list[str]:
        """An answer to each prompt, without special tokens and cut before the first of ``stop``; greedy, unless ``sampling`` says how.

        A prompt that leaves no room for ``max_new_tokens`` loses its beginning. Raises `DataError` where that does not help, or the chat
        template refuses a prompt.
        """
        room = self.prompt_room(max_new_tokens)
        ids = [self._prompt_ids(prompt, chat) for prompt in prompts]
        self.truncated += sum(len(tokens) > room for tokens in ids)
        asked = [Prompt(str(index), tokens[-room:]) for index, tokens in enumerate(ids)]
        how = sampling or Sampling(max_new_tokens, top_k=1)
        how = Sampling(max_new_tokens, how.temperature, how.top_p, how.top_k, how.seed, self._stop_ids(stop))
        self.repeat([partial(self._write, [prompt], how) for prompt in asked[:_TIMED]])
        with self.timed() as counts:
            written = await self._write(asked, how)
            counts.tokens += sum(len(prompt.token_ids) for prompt in asked) + sum(map(len, written))
        return [_before(self.tokenizer.decode(list(tokens), skip_special_tokens=True), stop) for tokens in written]

    async def _write(self, prompts: Sequence[Prompt], how: Sampling) -> list[Ids]:
        answers = {rollout.draw: rollout.token_ids async for rollout in self.engine.generate(each(prompts), how)}
        return [answers[place] for place in range(len(prompts))]

    def _prompt_ids(self, prompt: str, chat: bool) -> Ids:
        if not chat:
            return self.encode(prompt) or (self.start_token,)
        try:
            return prompt_ids(Prompt("", (), messages=(("user", prompt),)), self.tokenizer, self.name)
        except RefusedError as error:
            raise DataError(f"{self.name} cannot be asked with chat: {error}") from None

    def _stop_ids(self, stop: Sequence[str]) -> Ids:
        """Tokens in which one of ``stop`` is spelt whole: what they end need not be written on. Others are cut off afterwards."""
        wanted = [text.encode() for text in stop]
        return tuple(index for index, spelt in self._spellings.items() if any(text in spelt for text in wanted)) if wanted else ()


def _batches(pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[list[tuple[Ids, Ids]]]:
    """In order, at most `PACKED_TOKENS` tokens each, where a context that is the one before's counts once."""
    batch: list[tuple[Ids, Ids]] = []
    size = 0
    for context, continuation in pairs:
        is_same = bool(batch) and batch[-1][0] == context
        length = len(continuation) + (0 if is_same else len(context))
        if batch and size + length > PACKED_TOKENS:
            yield batch
            batch, size, length = [], 0, len(continuation) + len(context)
        batch.append((context, continuation))
        size += length
    if batch:
        yield batch


def _before(text: str, stop: Sequence[str]) -> str:
    for end in stop:
        text = text.partition(end)[0]
    return text
