"""What the runs of `benchmarks.objectives` and `benchmarks.adoption` begin with, made once in a folder: teachers, a student, prompts.

* ``teacher``: SmolLM2-135M-Instruct; ``pirate``: the same weights behind a system prompt with three examples, which its chat template puts
  in front; ``other_tokens``: the same weights behind a tokenizer that has unlearned half of its merges, so that ids and cuts differ.
* ``student``: 20 of its 30 layers after a short cold start on labelled text, by ``bbopd distill``'s own code.
* ``questions.jsonl``: short questions, with the teacher's answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbopd.cli.demo import KEPT_LAYERS, find_model
from bbopd.cli.execute import execute
from bbopd.config import RunConfig
from bbopd.modeling import load_model, load_tokenizer
from bbopd.teachers.hf import HFBackend
from bbopd.types import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLD_START_TOKENS = 20_000
KEPT_TOKENS = 24_576
"""Of the 49,152 tokens of SmolLM2, those that ``other_tokens`` still has: BPE learns the commonest first."""
ANSWER_TOKENS = 48

SYSTEM = "You are a pirate. You answer in one short sentence."
EXAMPLES = (
    ("What is a river?", "Arrr, a river be water that runs down to the sea, matey."),
    ("How do I boil an egg?", "Arrr, drop the egg in boiling water and wait seven minutes, matey."),
    ("Why do leaves fall?", "Arrr, the tree be saving its strength for the winter, matey."),
)

_SUBJECTS = (
    "bridge candle clock compass desert diary dictionary dolphin earthquake eclipse engine feather festival forest garden glacier "
    "guitar hammer harbour heart helicopter island kite ladder lamp library magnet map market microscope mirror museum onion "
    "orchestra owl passport pencil piano planet poem potato rainbow recipe robot school shadow ship storm teacher telescope "
    "thermometer tiger train tunnel umbrella village violin volcano whale window"
)
_FORMS = (
    "What is {}?",
    "What is {} good for?",
    "Tell me one thing about {}.",
    "How would you describe {} to a child?",
    "Why would I need {}?",
)


def prepare(folder: Path, *names: str) -> None:
    """Make those of `PARTS` that ``folder`` does not hold yet; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).exists():
            continue
        unfinished = folder / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        PARTS[name](folder, unfinished)
        unfinished.rename(folder / name)


def distill(config: dict[str, Any], output: Path) -> None:
    """What ``bbopd distill`` does with ``config``, into ``output``; what it says goes into a file beside it. Raises `BbopdError`."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = RunConfig.model_validate({**config, "output": str(output)})
    with output.with_suffix(".log").open("w") as log, redirect_stdout(log):
        if execute(settings, plain=True) != 0:
            raise KeyboardInterrupt


def _teacher(folder: Path, output: Path) -> None:
    source = find_model()
    load_model(source, dtype=torch.float32).save_pretrained(output)
    load_tokenizer(source).save_pretrained(output)


def _pirate(folder: Path, output: Path) -> None:
    shutil.copytree(folder / "teacher", output)
    with_examples(load_tokenizer(folder / "teacher")).save_pretrained(output)


def with_examples(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """``tokenizer`` with a chat template that lays `SYSTEM` and `EXAMPLES` in front of every conversation."""
    turns = [turn for question, answer in EXAMPLES for turn in (("user", question), ("assistant", answer))]
    ahead = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in [("system", SYSTEM), *turns])
    tokenizer.chat_template = (
        "{{ " + json.dumps(ahead) + " }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def _other_tokens(folder: Path, output: Path) -> None:
    forget_merges(folder / "teacher", output, KEPT_TOKENS)


def forget_merges(source: Path, output: Path, kept_tokens: int) -> None:
    """The model of ``source`` with tokens of its byte-level BPE from ``kept_tokens`` on forgotten (special ones apart), and other ids.

    The row of the embedding of every token left moves along with it.
    """
    shutil.copytree(source, output)
    files = json.loads((source / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = files["model"]["vocab"]
    special = {token["content"]: token["id"] for token in files["added_tokens"]}
    kept = sorted((index, token) for token, index in vocabulary.items() if index < kept_tokens and token not in special)
    order = [*sorted((index, token) for token, index in special.items()), *reversed(kept)]
    ids = {token: place for place, (_, token) in enumerate(order)}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in files["model"]["merges"]]
    files["model"]["vocab"] = ids
    files["model"]["merges"] = [pair for pair in merges if all(part in ids for part in (*pair, "".join(pair)))]
    for token in files["added_tokens"]:
        token["id"] = ids[token["content"]]
    (output / "tokenizer.json").write_text(json.dumps(files, ensure_ascii=False))
    model = load_model(source, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.detach()[[index for index, _ in order]].clone()
    model.resize_token_embeddings(len(order))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
    places = {index: place for place, (index, _) in enumerate(order)}
    for settings in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(before := getattr(settings, name, None), int):
                setattr(settings, name, places[before])
    model.save_pretrained(output)


def _questions(folder: Path, output: Path) -> None:
    """The teacher's answers at temperature 0.7; written 50 at a time."""
    tokenizer = load_tokenizer(folder / "teacher")
    teacher = HFBackend(load_model(folder / "teacher"), tokenizer)
    asked = short_questions()
    lines = []
    for number, start in enumerate(range(0, len(asked), 50)):
        part = asked[start : start + 50]
        chats = [[{"role": "user", "content": question}] for question in part]
        prompts = [
            Prompt(question, tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)))
            for question, chat in zip(part, chats, strict=True)
        ]
        answers = teacher.generate(prompts, Sampling(ANSWER_TOKENS, temperature=0.7, seed=number))
        lines += [json.dumps({"messages": chat, "response": answer.text}) for chat, answer in zip(chats, answers, strict=True)]
    output.write_text("\n".join(lines) + "\n")


def short_questions() -> list[str]:
    """A few about each of some subjects."""
    return [form.format(_with_article(word)) for form in _FORMS for word in _SUBJECTS.split()]


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _student(folder: Path, output: Path) -> None:
    config = {
        "student": {"model": str(folder / "teacher"), "init": {"keep_layers": KEPT_LAYERS}},
        "objective": {"name": "sft"},
        "train": {
            "labelled_tokens": COLD_START_TOKENS,
            "batch_tokens": 512,
            "max_seq_len": 512,
            "lr": 3e-4,
            "schedule": "linear",
            "warmup": 0.05,
            "checkpoint_every": 1000,
        },
        "rollouts": {"max_new_tokens": 64},
        "data": {
            "prompts": [{"demo": True, "weight": 3}, {"jsonl": str(folder / "questions.jsonl"), "weight": 1}],
            "prompt_tokens": 48,
            "response_tokens": 96,
        },
        "eval": {"sequences": 8, "rollouts": 1, "max_new_tokens": 1},
    }
    distill(config, folder / "cold_start")
    shutil.copytree(folder / "cold_start" / "model", output)


PARTS: dict[str, Callable[[Path, Path], None]] = {
    "teacher": _teacher,
    "pirate": _pirate,
    "other_tokens": _other_tokens,
    "questions.jsonl": _questions,
    "student": _student,
}
"""Each is made of those before it."""
