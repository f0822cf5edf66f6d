"""The unit that is either trained on or held out."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text.

    ``text`` alone is running text, to be cut into prefixes and continuations. ``prompt`` (raw text) or ``messages`` (for the chat
    template) is a question, with its ``response`` where one is known. ``where`` is for error messages.
    """

    name: str
    where: str
    text: str | None = None
    prompt: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    response: str | None = None

    @property
    def content(self) -> str:
        """All of it, as one string that does not depend on where it was found."""
        return json.dumps([self.text, self.prompt, self.messages, self.response], ensure_ascii=False)

    @property
    def asked(self) -> str:
        """What the student reads: the text, or the question without its answer."""
        if self.messages is not None:
            return "\n\n".join(content for _, content in self.messages)
        return self.text or self.prompt or ""
