"""``bbopd eval human``: a blind page for people to rate answers on, and what their ratings come to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from bbopd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from bbopd.evaluate.human.results import HumanResult, Interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--answers", nargs="+", metavar="FILE.jsonl", help='answers to compare: lines {"prompt": "...", "answers": {"model": "text", ...}}'
    )
    source.add_argument("--models", nargs="+", metavar="MODEL", help="hub ids, folders or GGUF files that answer --prompts first")
    source.add_argument("--collect", nargs="+", metavar="EXPORT.json", help="what people have exported from the page; needs --key")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help='for --models: lines {"prompt": "..."}')
    parser.add_argument("--max-new-tokens", type=int, default=256, help="for --models: length of an answer (default: 256)")
    parser.add_argument("--device", default="auto", help="for --models: auto, cpu, cuda (default: auto)")
    parser.add_argument("--limit", type=int, metavar="N", help="compare on N prompts, chosen by the seed (default: on all)")
    parser.add_argument("--seed", type=int, default=0, help="of sides and order (default: 0)")
    parser.add_argument("--output", default="human.html", metavar="PAGE.html", help="the page; its key is written beside it")
    parser.add_argument("--key", metavar="KEY.json", help="for --collect: the key that was written with the page")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines and tables")


def run(args: argparse.Namespace) -> int:
    return _collect(args) if args.collect else _make(args)


def _make(args: argparse.Namespace) -> int:
    from bbopd.evaluate.human.comparisons import read_answers, shuffled_comparisons
    from bbopd.evaluate.human.page import check_free, write_page

    if args.key:
        raise ConfigError("--key belongs to --collect: leave it out to make a page")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit} leaves no prompt: give at least 1")
    check_free(args.output)
    if args.models:
        answers = read_answers([_write_answers(args)])
    elif args.prompts:
        raise ConfigError("--prompts are for --models to answer: leave it out, as --answers has prompts of its own")
    else:
        answers = read_answers(args.answers)
    comparisons = shuffled_comparisons(answers, args.seed, most=args.limit)
    files = write_page(args.output, comparisons)
    if args.json:
        print(json.dumps({"page": str(files.page), "key": str(files.key), "pairs": len(comparisons)}))
        return 0
    print(f"page  {files.page}  {len(comparisons)} pairs, for whoever rates")
    print(f"key   {files.key}  for you alone: bbopd eval human --collect EXPORT.json... --key {files.key}")
    return 0


def _write_answers(args: argparse.Namespace) -> Path:
    """Have every model answer every prompt; the answers are kept beside the page."""
    from bbopd.evaluate.human.answers import model_answers
    from bbopd.evaluate.human.comparisons import read_prompts

    if len(set(args.models)) < 2:
        raise ConfigError(f"--models {' '.join(args.models)}: a comparison needs two different models")
    if not args.prompts:
        raise ConfigError("--models need --prompts: a JSONL file with the prompts to answer")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} leaves no answer: give at least 1")
    prompts = read_prompts(args.prompts)
    by_model = {
        model: model_answers(model, prompts, max_new_tokens=args.max_new_tokens, device=args.device) for model in dict.fromkeys(args.models)
    }
    path = Path(args.output).with_suffix(".answers.jsonl")
    lines = [
        json.dumps({"prompt": prompt, "answers": {model: texts[number] for model, texts in by_model.items()}}, ensure_ascii=False)
        for number, prompt in enumerate(prompts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _collect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from bbopd.evaluate.human.comparisons import read_key
    from bbopd.evaluate.human.ratings import read_ratings
    from bbopd.evaluate.human.results import collect

    if not args.key:
        raise DataError("--collect needs --key: the .key.json file that was written beside the page says who wrote what")
    key = read_key(args.key)
    result = collect(read_ratings(args.collect, key), key)
    if args.json:
        print(json.dumps(result.to_json()))
    else:
        _print(Console(), result)
    return 0


def _print(console: Console, result: HumanResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    people = ", ".join(f"{rater} {count}" for rater, count in result.raters.items())
    wins = Table(title="Preferred, ties counted half", title_justify="left", box=SIMPLE_HEAD)
    for title in ("Model", "against", "win rate", "95% interval", "won", "tied", "lost"):
        wins.add_column(title, justify="left" if title in ("Model", "against") else "right")
    for won in result.win_rates:
        counts = (str(count) for count in (won.wins, won.ties, won.losses))
        wins.add_row(won.model, won.against, f"{won.rate.value:.1%}", _span(won.rate, "{:.1%}"), *counts)
    scores = Table(title="Scores, 1 to 5", title_justify="left", box=SIMPLE_HEAD)
    for title in ("Model", "question", "mean", "95% interval", "ratings"):
        scores.add_column(title, justify="left" if title in ("Model", "question") else "right")
    for mean in result.scores:
        scores.add_row(mean.model, mean.question, f"{mean.score.value:.2f}", _span(mean.score, "{:.2f}"), str(mean.ratings))
    console.print(f"{result.items} pairs, rated by {people}", highlight=False)
    console.print(wins)
    console.print(scores)
    if result.rated_twice:
        alphas = ", ".join(f"{name} {'undefined' if alpha is None else f'{alpha:.2f}'}" for name, alpha in result.agreement.items())
        console.print(
            f"Agreement on {result.rated_twice} pairs that several rated (Krippendorff's alpha, ordinal): {alphas}", highlight=False
        )
    else:
        console.print("No pair was rated by two people: how far they agree is not known", highlight=False)
    console.print(
        f"Side A was preferred at {result.side_a.value:.1%} ({_span(result.side_a, '{:.1%}')}); 50% means that sides did not matter",
        highlight=False,
    )


def _span(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return "one prompt"
    return f"{form.format(interval.low)} to {form.format(interval.high)}"
