"""A teacher's own answers from an OpenAI-compatible endpoint: from token ids where it takes them, from messages elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bbopd.rpc.limits import RefusedError
from bbopd.teachers.openai_client import ApiClient, Question
from bbopd.types import Completion, FinishReason, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Writer"]

_BYTES_PER_TOKEN = 256
_ANSWER_BYTES = 65_536  # beside its tokens
_PLACE = "\N{BLACK QUESTION MARK ORNAMENT}place of the question\N{BLACK QUESTION MARK ORNAMENT}"


class Writer:
    """Makes requests for answers, and answers out of what comes.

    Parameters
    ----------
    tokenizer : the student's: prompts are its ids, and text that comes without ids is turned into them.
    by_ids : prompts of token ids go to ``/completions`` as they are; else to ``/chat/completions``, as the message in them.
    by_text : prompts that are text go to ``/completions``; else they are messages too.
    takes_more : the endpoint knows ``top_k``, ``stop_token_ids`` and ``return_token_ids``, which OpenAI's does not.
    """

    def __init__(
        self, client: ApiClient, model: str, tokenizer: PreTrainedTokenizerBase, *, by_ids: bool, by_text: bool, takes_more: bool
    ) -> None:
        self._client = client
        self._model = model
        self._tokenizer = tokenizer
        self._by_ids = by_ids
        self._by_text = by_text
        self._takes_more = takes_more
        self._frame = _chat_frame(tokenizer)

    def question(self, prompt: Prompt, sampling: Sampling) -> Question[Completion]:
        """The request for one answer. Raises `RefusedError` for what this endpoint cannot be asked."""
        if prompt.is_text:
            is_chat = bool(prompt.messages) or not self._by_text
            asked: dict[str, Any] = {"messages": self._messages(prompt)} if is_chat else {"prompt": prompt.text}
        else:
            is_chat = not self._by_ids
            asked = {"messages": self._messages(prompt)} if is_chat else {"prompt": list(prompt.token_ids)}
        return Question(
            name=f"prompt {prompt.prompt_id}",
            url=f"{self._client.address.url}/{'chat/completions' if is_chat else 'completions'}",
            body={"model": self._model, **asked, **self._how(sampling, is_chat=is_chat)},
            read=lambda said: self._completion(said, prompt, sampling, is_chat=is_chat),
            prompt_tokens=prompt.most_tokens,
            answer_tokens=sampling.max_new_tokens,
            max_bytes=_ANSWER_BYTES + _BYTES_PER_TOKEN * (sampling.max_new_tokens + prompt.most_tokens),
        )

    def _how(self, sampling: Sampling, *, is_chat: bool) -> dict[str, Any]:
        is_greedy = sampling.top_k == 1
        how: dict[str, Any] = {
            "max_completion_tokens" if is_chat and not self._takes_more else "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if is_greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if self._takes_more:
            more = {"top_k": 0 if is_greedy else sampling.top_k, "stop_token_ids": list(sampling.stop_token_ids), "repetition_penalty": 1.0}
            return how | more | {"return_token_ids": True}
        if sampling.top_k > 1:
            raise RefusedError(
                "not_offered", f"teacher {self._model} does not know top_k {sampling.top_k}: set it to 0 (none) or 1 (greedy)"
            )
        return how

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """The prompt's own messages; else the question of one in the student's chat format; a prompt in none is the question itself."""
        if prompt.messages:
            return [{"role": role, "content": content} for role, content in prompt.messages]
        if prompt.is_text:
            return [{"role": "user", "content": prompt.text}]
        text = str(self._tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))
        before, after = self._frame
        if before and text.startswith(before):
            question = text.removeprefix(before)
            if not question.endswith(after) or before in question:
                raise RefusedError(
                    "invalid",
                    f"prompt {prompt.prompt_id} is a conversation of several messages in the student's format, of which a chat endpoint "
                    "can be given one: use an endpoint that takes token ids (teacher.api.writing=completions), or prompts of one message",
                )
            text = question.removesuffix(after)
        return [{"role": "user", "content": text}]

    def _completion(self, said: Any, prompt: Prompt, sampling: Sampling, *, is_chat: bool) -> Completion:
        (choice,) = said["choices"]
        text = choice["message"]["content"] if is_chat else choice["text"]
        reason = choice["finish_reason"]
        if not isinstance(text, str) or reason not in ("stop", "length", "eos"):
            raise ValueError(f"finish_reason is {reason!r} and the text a {type(text).__name__}: expected stop or length, and a text")
        is_whole = reason != "length"
        ids = self._ids(choice, text, is_whole=is_whole)
        if ids and not 0 <= min(ids) <= max(ids) < 2**31:
            raise ValueError(f"it holds token ids {min(ids)}..{max(ids)}")
        if len(ids) > sampling.max_new_tokens:
            if "token_ids" in choice:
                raise ValueError(f"it has {len(ids)} tokens, asked were at most {sampling.max_new_tokens}")
            ids = ids[: sampling.max_new_tokens]  # the student's tokens are not the teacher's, whose limit it kept to: the text is whole
        finish: FinishReason = "stop" if is_whole else "length"
        return Completion(prompt, ids, text, finish)

    def _ids(self, choice: Mapping[str, Any], text: str, *, is_whole: bool) -> tuple[int, ...]:
        given = choice.get("token_ids")
        if given is not None:
            return tuple(int(token) for token in given)
        ids: Sequence[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        return (*ids, int(end)) if is_whole and end is not None else tuple(ids)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and after the one question of a conversation; empty where there is no template."""
    if not tokenizer.chat_template:
        return "", ""
    messages = [{"role": "user", "content": _PLACE}]
    before, _, after = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)).partition(_PLACE)
    return before, after
