"""Any OpenAI-compatible endpoint as a teacher: vLLM, SGLang, a router, a provider. What it offers is found out before it is used."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from bbopd.config import ApiConfig, TeacherConfig
from bbopd.errors import BadAnswerError, BudgetSpentError, ConfigError, TeacherError
from bbopd.rpc.limits import RefusedError, check_prompt, check_rollout, check_sampling, check_want
from bbopd.teachers.budget import Budget
from bbopd.teachers.openai_address import ApiAddress
from bbopd.teachers.openai_client import ApiClient
from bbopd.teachers.openai_pass import Pass
from bbopd.teachers.openai_scoring import STYLES, ScoringStyle, find_style, scoring_question
from bbopd.teachers.openai_vocabulary import endpoint_vocabulary_sha256
from bbopd.teachers.openai_writing import Writer
from bbopd.types import Completion, Offer, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["OpenAITeacher"]

_PROBE_TEXT = "The capital of France is Paris, and water boils at a lower temperature on a mountain."
_PROBE_TOKENS = 16
_REACH_SECONDS = 30.0  # to go on trying to reach it

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class OpenAITeacher:
    """The `Teacher` protocol over one endpoint; made by `connect`."""

    def __init__(
        self,
        client: ApiClient,
        info: TeacherInfo,
        style: ScoringStyle | None,
        writer: Writer,
        config: TeacherConfig,
        counters: Counter[str],
    ) -> None:
        self.info = info
        self.target = client.address.target
        self.counters = counters
        """How often something was asked again, and how many answers failed validation."""
        self._client = client
        self._style = style
        self._writer = writer
        self._config = config
        self.notes: tuple[str, ...] = ()
        """How it was asked to score tokens in vain, and what it said."""

    @classmethod
    async def connect(
        cls, config: TeacherConfig, *, tokenizer: PreTrainedTokenizerBase, vocab_size: int, budget: Budget | None = None
    ) -> OpenAITeacher:
        """Find out what is at ``config.target``, by asking: its model, how it scores tokens, how many ids a token, whose vocabulary.

        Parameters
        ----------
        tokenizer, vocab_size : the student's, whose ids the endpoint is asked about.
        budget : where it costs money; the first questions are paid from it too.

        Raises
        ------
        ConfigError : the address, the key or the model's name cannot be used.
        TeacherError : it cannot be reached; it numbers tokens differently, or does not say how.
        """
        counters = Counter(retries=0, bad_answers=0)
        client = ApiClient(
            ApiAddress.from_config(config), config.api or ApiConfig(), timeout=config.timeout, counters=counters, budget=budget
        )
        seconds = min(_REACH_SECONDS, config.start_timeout)
        try:
            async with asyncio.timeout(seconds):
                model, said = await _find_model(client, config.model)
            seconds = config.start_timeout
            async with asyncio.timeout(seconds):
                teacher = await cls._connect(client, config, model, said, tokenizer, vocab_size, budget, counters)
            counters.update({name: -count for name, count in counters.items()})  # what was found out in vain is no fault of a run
            return teacher
        except TimeoutError:
            await client.close()
            trouble = f" ({client.health.trouble})" if client.health.trouble else ""
            raise TeacherError(
                f"no OpenAI-compatible endpoint at {client.address.target} answered within {seconds:g} s{trouble}: is it running, at this "
                "address, and with TLS just where the target is https://?"
            ) from None
        except (RefusedError, BadAnswerError) as error:
            await client.close()
            raise TeacherError(f"teacher at {client.address.target} cannot be used: {error}") from None
        except BaseException:
            await client.close()
            raise

    @classmethod
    async def _connect(
        cls,
        client: ApiClient,
        config: TeacherConfig,
        model: str,
        said: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        budget: Budget | None,
        counters: Counter[str],
    ) -> OpenAITeacher:
        api = config.api or ApiConfig()
        style, width, troubles = await _find_scoring(client, model, api, config.topk, tokenizer, vocab_size)
        is_known, vocab_sha256 = style is not None or config.signal != "text", ""
        if style is not None:
            try:
                vocab_sha256 = await endpoint_vocabulary_sha256(client, model, tokenizer, vocab_size, config.tokenizer)
            except TeacherError as error:
                if config.signal != "text" or isinstance(error, BudgetSpentError):
                    raise
                is_known = False
                troubles.append(f"token ids: {error}")
        offers = [Offer("text", 0, 0.01, 2.0, "none")]
        if style is not None and is_known:
            offers.insert(0, Offer("sampled", 0, tail="none"))
            if width:
                offers.insert(0, Offer("topk", width, tail="derived"))
        limit = api.max_sequence_tokens or _count(said.get("max_model_len"))
        prices = budget.prices if budget is not None else None
        info = TeacherInfo(
            model=model,
            vocab_size=vocab_size if is_known else 0,
            offers=tuple(offers),
            vocab_sha256=vocab_sha256,
            max_sequence_tokens=max(0, limit - 1) if style is not None else limit,  # what scores a text writes a token after it
            price_per_million_tokens=prices.prompt if prices is not None else 0.0,
            currency=prices.currency if prices is not None else "",
            takes_text=True,
        )
        completes = api.writing == "completions" or (api.writing == "auto" and style is not None)
        takes_more = style is not None and style.name != "echo"
        writer = Writer(client, model, tokenizer, by_ids=completes and is_known, by_text=completes, takes_more=takes_more)
        teacher = cls(client, info, style, writer, config, counters)
        teacher.notes = tuple(troubles)
        return teacher

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """Scores as each is ready, in any order; ``teacher.inflight_tokens`` are asked about at once.

        Raises
        ------
        RefusedError : not offered, or an item is outside the limits.
        TeacherError : refused by the endpoint, always answered badly, or no answer for ``teacher.timeout``.
        BudgetSpentError : the money is spent; what was paid has been answered before.
        """
        check_want(want, self.info)
        style = self._style
        assert style is not None, "without a way of scoring, no level but text is offered"

        def tokens_of(rollout: Rollout) -> int:
            check_rollout(rollout, want, self.info)
            return len(rollout.all_ids)

        async def ask(rollout: Rollout) -> ScoredRollout:
            question = scoring_question(self._client, style, self.info.model, rollout, want, self.info.vocab_size)
            with self._named(question.name):
                return ScoredRollout(rollout, await self._client.ask(question))

        async with aclosing(self._pass(ask, tokens_of).run(rollouts)) as answers:
            async for scored in answers:
                yield scored

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """The teacher's own answers, as each is ready, in any order. Raises as `score` does."""
        check_sampling(sampling, self.info)

        def tokens_of(prompt: Prompt) -> int:
            check_prompt(prompt, sampling, self.info)
            return prompt.most_tokens + sampling.max_new_tokens

        async def ask(prompt: Prompt) -> Completion:
            question = self._writer.question(prompt, sampling)
            with self._named(question.name):
                return await self._client.ask(question)

        async with aclosing(self._pass(ask, tokens_of).run(prompts)) as answers:
            async for completion in answers:
                yield completion

    async def close(self) -> None:
        """Close the connections; requests still open are cancelled."""
        await self._client.close()

    def _pass(self, ask: Callable[[Item], Awaitable[Answer]], tokens_of: Callable[[Item], int]) -> Pass[Item, Answer]:
        return Pass(self._client, ask, tokens_of, timeout=self._config.timeout, inflight_tokens=self._config.inflight_tokens)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Let the error that ends a pass say which item it was, and where."""
        try:
            yield
        except (RefusedError, BadAnswerError) as error:
            raise TeacherError(f"teacher at {self.target} did not answer {name}: {error}") from None


async def _find_model(client: ApiClient, named: str | None) -> tuple[str, Mapping[str, Any]]:
    """The name of the model, and what ``/models`` says of it. Raises `ConfigError` where there are several, or not this one."""
    said = await client.get("models")
    cards = said.get("data") if isinstance(said, Mapping) else None
    known = {str(card["id"]): card for card in cards or () if isinstance(card, Mapping) and "id" in card}
    if named is None and len(known) != 1:
        raise ConfigError(f"teacher.target {client.address.target} has {_listed(known)}: set teacher.model to one of them")
    if named is None:
        ((named, card),) = known.items()
        return named, card
    if known and named not in known:
        raise ConfigError(f"teacher.model {named!r} is not at {client.address.target}, which has {_listed(known)}")
    return named, known.get(named, {})


async def _find_scoring(
    client: ApiClient, model: str, api: ApiConfig, top_k: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[ScoringStyle | None, int, list[str]]:
    """How it scores, how many ids a token it gives, and what was answered where it does not."""
    if api.scoring == "none":
        return None, 0, []
    ids = tuple(token for token in tokenizer(_PROBE_TEXT)["input_ids"] if token < vocab_size)[:_PROBE_TOKENS]
    probe = Rollout("probe", Prompt("probe", ids[:1]), ids[1:])
    styles = [style for style in STYLES if api.scoring in ("auto", style.name)]
    found, width, troubles = await find_style(client, model, probe, min(top_k, vocab_size), styles, vocab_size)
    if found is None and api.scoring != "auto":
        raise TeacherError(f"teacher {model} at {client.address.target} does not score by teacher.api.scoring={api.scoring}: {troubles[0]}")
    return found, width, troubles


def _listed(known: Mapping[str, Any]) -> str:
    shown = ", ".join(list(known)[:10]) or "no model that it names"
    return f"{shown} and {len(known) - 10} more" if len(known) > 10 else shown


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
