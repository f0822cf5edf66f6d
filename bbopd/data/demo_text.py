"""Text for a first run without any download: the reference topics inside Python itself, and the project's own chat prompts."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

from bbopd.data.demo_chat import CHAT_PROMPTS

_SHARED_PARAGRAPHS = 0.3
_PARAGRAPH_CHARACTERS = 80  # shorter ones (headings, one-line examples) are alike without being copies


def demo_topics() -> dict[str, str]:
    """Topics of Python's own help by name, without those that a longer topic repeats.

    Some topics are sections of others (``if`` of ``compound``); held-out text must not be part of the training text.
    """
    paragraphs = {name: _paragraphs(text) for name, text in topics.items()}
    return {name: text.strip() for name, text in topics.items() if not _is_repeated(name, paragraphs)}


def demo_chat() -> dict[str, str]:
    """The project's chat prompts, by a name made of their place."""
    return {f"{index:03d}": text for index, text in enumerate(CHAT_PROMPTS)}


def _paragraphs(text: str) -> frozenset[str]:
    blocks = (re.sub(r"\s+", " ", block).strip() for block in text.split("\n\n"))
    return frozenset(block for block in blocks if len(block) > _PARAGRAPH_CHARACTERS)


def _is_repeated(name: str, paragraphs: dict[str, frozenset[str]]) -> bool:
    own = paragraphs[name]
    rank = (len(own), name)
    return any(
        len(own & other) >= _SHARED_PARAGRAPHS * max(1, len(own)) and rank < (len(other), other_name)
        for other_name, other in paragraphs.items()
        if other_name != name
    )
