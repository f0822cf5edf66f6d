"""The text that needs no download: enough of it, varied, and no document inside another."""

from __future__ import annotations

import re

from bbopd.data.demo_text import demo_chat, demo_topics


def test_topics_are_long_enough_for_a_run() -> None:
    topics = demo_topics()
    assert len(topics) >= 40
    assert sum(map(len, topics.values())) > 250_000
    assert all(text == text.strip() and text for text in topics.values())


def test_no_topic_repeats_paragraphs_of_a_longer_one() -> None:
    paragraphs = {
        name: {re.sub(r"\s+", " ", block) for block in text.split("\n\n") if len(re.sub(r"\s+", " ", block)) > 100}
        for name, text in demo_topics().items()
    }
    for name, own in paragraphs.items():
        for other_name, other in paragraphs.items():
            assert name == other_name or len(own & other) <= 0.35 * min(len(own), len(other)), (name, other_name)


def test_chat_prompts_are_distinct_short_questions() -> None:
    prompts = list(demo_chat().values())
    assert len(prompts) >= 60
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert all((10 < len(prompt) < 200 and prompt[-1] in ".?!") or ":" in prompt for prompt in prompts)
    assert len({prompt.split()[0] for prompt in prompts}) >= 20
