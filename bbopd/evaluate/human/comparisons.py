"""What people compare: the answers of two models to one prompt, on sides that a seed has shuffled, under names that tell nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, TypeGuard

from bbopd.errors import DataError

SIDES = ("A", "B")
_KEY_FORMAT = "bbopd human key 1"


@dataclass(frozen=True, slots=True)
class Comparison:
    """``models`` and ``answers`` are those of side A and of side B."""

    item_id: str
    prompt: str
    models: tuple[str, str]
    answers: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Key:
    """Who wrote what of one page: for each item the number of its prompt, and the models of side A and of side B."""

    page_id: str
    prompts: Mapping[str, int]
    models: Mapping[str, tuple[str, str]]


def read_answers(paths: Sequence[str | Path]) -> dict[str, dict[str, str]]:
    """Prompt -> model -> answer, from JSONL files with lines ``{"prompt": "...", "answers": {"model": "text", ...}}``.

    Lines of one prompt are put together, so that each model may have a file of its own. Raises `DataError` for a line that is no such
    object, two answers of one model to a prompt, and a prompt that only one model has answered.
    """
    found: dict[str, dict[str, str]] = {}
    for path in map(Path, paths):
        for where, line in read_lines(path):
            prompt, answers = line.get("prompt"), line.get("answers")
            if not isinstance(prompt, str) or not _are_answers(answers):
                raise DataError(f'{where} needs {{"prompt": "...", "answers": {{"model": "text"}}}}, and holds {json.dumps(line)[:200]}')
            known = found.setdefault(prompt, {})
            for model, text in answers.items():
                if known.setdefault(model, text) != text:
                    raise DataError(f"{where}: {model} has answered this prompt differently before; leave one of the two answers out")
    if not found:
        raise DataError(f"no line in {', '.join(map(str, paths))}: there is nothing to compare")
    for prompt, by_model in found.items():
        if len(by_model) < 2:
            raise DataError(f"only {next(iter(by_model))} has answered {prompt[:80]!r}: a comparison needs the answers of two models")
    return found


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a JSONL file with lines ``{"prompt": "..."}``, each once. Raises `DataError`."""
    prompts: dict[str, None] = {}
    for where, line in read_lines(Path(path)):
        if not isinstance(line.get("prompt"), str) or not line["prompt"].strip():
            raise DataError(f'{where} needs {{"prompt": "..."}}, and holds {json.dumps(line)[:200]}')
        prompts[line["prompt"]] = None
    if not prompts:
        raise DataError(f"no line in {path}: there is nothing to answer")
    return list(prompts)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it is, and the object there, for each line of a JSONL file that is not blank. Raises `DataError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON ({error}); each line must be one object") from error
        if not isinstance(line, dict):
            raise DataError(f"{path}:{number} holds {text[:80]!r}, not an object")
        yield f"{path}:{number}", line


def _are_answers(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and bool(value) and all(isinstance(text, str) for text in value.values())


def shuffled_comparisons(answers: Mapping[str, Mapping[str, str]], seed: int, *, most: int | None = None) -> list[Comparison]:
    """Every pair of models on every prompt, in random order; ``most`` takes a random part of the prompts.

    Of one pair, each model stands on side A as often as the other, give or take one.
    """
    generator = random.Random(seed)
    prompts = list(answers)
    if most is not None and most < len(prompts):
        prompts = generator.sample(prompts, most)
    pairs: dict[tuple[str, str], list[str]] = {}
    for prompt in prompts:
        for pair in combinations(sorted(answers[prompt]), 2):
            pairs.setdefault(pair, []).append(prompt)
    comparisons = []
    for pair, compared in sorted(pairs.items()):
        first = generator.getrandbits(1)
        swaps = [(first + index) % 2 for index in range(len(compared))]
        generator.shuffle(swaps)
        for prompt, swap in zip(compared, swaps, strict=True):
            sides = (pair[1], pair[0]) if swap else pair
            item_id = f"{generator.getrandbits(40):010x}"
            comparisons.append(Comparison(item_id, prompt, sides, (answers[prompt][sides[0]], answers[prompt][sides[1]])))
    generator.shuffle(comparisons)
    return comparisons


def page_id(comparisons: Sequence[Comparison]) -> str:
    """A hash of what the page shows, which ties exports and key to it."""
    shown = [[item.item_id, item.prompt, *item.answers] for item in comparisons]
    return sha256(json.dumps(shown).encode()).hexdigest()[:16]


def key_to_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(item.prompt for item in comparisons))}
    items = {item.item_id: {"prompt": numbers[item.prompt], **dict(zip(SIDES, item.models, strict=True))} for item in comparisons}
    return {"format": _KEY_FORMAT, "page": page_id(comparisons), "items": items}


def read_key(path: str | Path) -> Key:
    """Raises `DataError` where the file is not the key of a page."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != _KEY_FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_KEY_FORMAT!r}")
        items = content["items"]
        return Key(
            str(content["page"]),
            {name: int(item["prompt"]) for name, item in items.items()},
            {name: (str(item["A"]), str(item["B"])) for name, item in items.items()},
        )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not the key of a page ({error}): give the .key.json file that was written beside it") from error
