"""A prompt that is text or messages as ids, by a teacher's own tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bbopd.rpc.limits import RefusedError
from bbopd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["prompt_ids"]


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, model: str) -> tuple[int, ...]:
    """Ids as the tokenizer makes them by default, or as its chat template writes messages down.

    Raises
    ------
    RefusedError : teacher ``model`` has no chat template, or that refuses the messages.
    """
    if not prompt.messages:
        return tuple(tokenizer(prompt.text)["input_ids"])
    if not tokenizer.chat_template:
        raise RefusedError("not_offered", f"teacher {model} has no chat template for messages: send the prompt as text")
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    try:
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a template raises what it likes, most often jinja2's own errors
        raise RefusedError("invalid", f"the chat template of teacher {model} refuses these messages: {error}") from None
