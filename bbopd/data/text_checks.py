"""Filters that read an answer's text: its characters, its language, and what somebody's own function says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import regex

from bbopd.config import FiltersConfig
from bbopd.data.hooks import in_words, load_hook
from bbopd.data.rejected import Rejection
from bbopd.errors import ConfigError
from bbopd.extras import need
from bbopd.types import Rollout

TextCheck: TypeAlias = Callable[[Rollout, str], Rejection | None]

_GARBLED = r"\uFFFD\p{Cc}\p{Co}\p{Cn}\p{Cs}"  # undecodable bytes, control characters, private use, unassigned, lone surrogates
_SPACES = r"\t\n\r"
_LETTERS_TO_JUDGE = 20  # fewer say too little of a language


def text_checks(config: FiltersConfig) -> tuple[TextCheck, ...]:
    """The checks that ``config`` asks for. Raises `ConfigError` for one that cannot work: a library, code, script, hook or plug-in."""
    checks: list[TextCheck] = []
    if config.charset:
        checks.append(_charset_check(config.charset, config.max_foreign))
    if config.languages:
        checks.append(_language_check(config.languages, config.min_language))
    checks.extend(load_hook(name) for name in config.hooks)
    checks.extend(in_words(use.make().check, use.name, str(use.check())) for use in config.plugin_uses)
    if config.near_duplicates is not None:
        need("rensa", "data.filters.near_duplicates")  # now, and not when the first rollout has been paid for
    return tuple(checks)


def _charset_check(charset: tuple[str, ...], limit: float) -> TextCheck:
    foreign = _foreign_characters(charset)

    def check(rollout: Rollout, text: str) -> Rejection | None:
        found = foreign.findall(text)
        share = len(found) / max(1, len(text))
        if share <= limit:
            return None
        shown = ", ".join(f"U+{ord(character):04X}" for character in list(dict.fromkeys(found))[:5])
        return Rejection("charset", round(share, 4), limit, detail=f"first of them: {shown}")

    return check


def _foreign_characters(charset: tuple[str, ...]) -> regex.Pattern[str]:
    """One character that is garbled, or in none of the scripts of ``charset``; digits, punctuation and emoji are of every script."""
    if "any" in charset:
        return regex.compile(f"(?![{_SPACES}])[{_GARBLED}]")
    if charset == ("ascii",):
        return regex.compile(rf"(?![{_SPACES}])[^\x20-\x7E]")
    allowed = [r"\p{Script=Common}", r"\p{Script=Inherited}"]
    for script in charset:
        try:
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error as error:
            raise ConfigError(
                f"data.filters.charset: {script!r} is no script of Unicode: write any, ascii alone, or names such as Latin, Cyrillic, Han"
            ) from error
        allowed.append(rf"\p{{Script={script}}}")
    return regex.compile(f"(?![{_SPACES}])(?:[{_GARBLED}]|[^{''.join(allowed)}])")


@cache
def _language_identifier() -> Any:
    """py3langid's own model, 2 MB, with probabilities; a process loads it once."""
    langid = need("py3langid.langid", "data.filters.languages")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _language_check(languages: tuple[str, ...], limit: float) -> TextCheck:
    identifier = _language_identifier()
    unknown = sorted(set(languages) - set(identifier.labels))
    if unknown:
        raise ConfigError(
            f"data.filters.languages: {', '.join(unknown)} is not known: the codes are {' '.join(sorted(identifier.labels))} (ISO 639)"
        )

    def check(rollout: Rollout, text: str) -> Rejection | None:
        if sum(map(str.isalpha, text)) < _LETTERS_TO_JUDGE:
            return None
        ranked = identifier.rank(text)
        probability = sum(share for language, share in ranked if language in languages)
        if probability >= limit:
            return None
        return Rejection("language", round(probability, 4), limit, detail=f"most likely {ranked[0][0]} ({ranked[0][1]:.2f})")

    return check
