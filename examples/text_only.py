"""A student learns from any OpenAI-compatible endpoint that answers in words: one command, from questions to a saved model.

vllm serve Qwen/Qwen2.5-7B-Instruct --port 8000
python examples/text_only.py openai://localhost:8000/v1 questions.jsonl --student HuggingFaceTB/SmolLM2-135M-Instruct

A provider elsewhere wants a key and a limit of what may be spent; prices are for a million tokens:

python examples/text_only.py https://api.example.com/v1 questions.jsonl --teacher a-model --key-env KEY --prices 0.15 0.60 --limit 5

A line of the questions is {"prompt": "..."}. Every answer that was paid for is kept beside the model, and the same command goes on where
it stopped: at Ctrl-C, or when the money is spent and --limit is raised.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bbopd.cli.execute import execute
from bbopd.config import RunConfig
from bbopd.errors import BbopdError


def run_of(args: argparse.Namespace) -> RunConfig:
    """The run as a configuration; `bbopd distill` takes the same as a YAML file."""
    teacher: dict[str, Any] = {
        "target": args.endpoint,
        "model": args.teacher,
        "token_env": args.key_env,
        "signal": "text",  # nothing but words: no probabilities, and any tokenizer
        "answers": {"max_new_tokens": args.answer_tokens, "temperature": 1.0},
        "cache": {"path": str(Path(args.output) / "answers.db")},
    }
    if args.prices is not None:
        teacher |= {"prices": dict(zip(("prompt", "answer"), args.prices, strict=True)), "budget": {"limit": args.limit}}
    return RunConfig.model_validate(
        {
            "student": {"model": args.student, "dtype": args.dtype},
            "teacher": teacher,
            "objective": {"name": "seqkd"},  # cross-entropy on what the teacher writes; `verbal` and `gad` go on from here
            "rollouts": {"max_new_tokens": args.answer_tokens},
            "train": {
                "lr": args.lr,
                "batch_tokens": 512,
                "max_seq_len": args.prompt_tokens + args.answer_tokens,
                "labelled_tokens": args.tokens,
            },
            "data": {"prompts": [{"jsonl": args.questions}], "prompt_tokens": args.prompt_tokens, "response_tokens": args.answer_tokens},
            "eval": {"sequences": 16, "rollouts": 16, "max_new_tokens": args.answer_tokens},
            "output": args.output,
        }
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", help="openai://host:port/v1 on this machine, https://host/v1 anywhere")
    parser.add_argument("questions", help="JSON lines with a prompt each")
    parser.add_argument("--student", required=True, help="hub id, folder or GGUF file")
    parser.add_argument("--teacher", help="its name at the endpoint (default: the only one there)")
    parser.add_argument("--key-env", help="the environment variable that holds the key")
    parser.add_argument("--prices", type=float, nargs=2, metavar=("PROMPT", "ANSWER"))
    parser.add_argument("--limit", type=float, default=1.0, help="what may be spent, where there are prices (default 1)")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens of answers to train on (default 50,000)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--dtype", default="auto", help="of the student: float32, bfloat16 or auto")
    parser.add_argument("--output", default="runs/text_only")
    args = parser.parse_args(arguments)
    config = run_of(args)
    with Path(args.questions).open(encoding="utf-8") as lines:
        first = json.loads(next(lines))["prompt"]
    try:
        status = execute(config, plain=True, sample_prompts=(first,))  # prints measures and an answer, before and after
    except BbopdError as error:
        parser.exit(error.exit_code, f"{error}\n")
    if status == 0:
        summary = json.loads((Path(args.output) / "summary.json").read_text())
        if args.prices is not None:
            print(f"paid: {summary['teacher_cost']['paid']:.4f}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
