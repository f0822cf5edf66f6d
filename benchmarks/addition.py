"""Additions with their carries written out: a task that is checked exactly, for the experiment of docs/addition.md.

    786+593=  ->  6+3+0=09;8+9+0=17;7+5+1=13;1379

Column by column from the right: the two digits, the carry that came in, and their sum, of which the first digit is the carry that goes out.

    python -m benchmarks.addition runs/addition

writes ``teacher.jsonl``, ``train.jsonl``, ``unlimited.jsonl``, ``development.jsonl`` and ``test.jsonl``: lines with ``prompt``,
``response`` and ``answer``, no addition in more than one line of all of them; and two untrained models that read and write bytes, a Llama
of 0.82 million parameters in ``teacher-start`` and one of 0.16 million in ``student-start``. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHAPES = {"teacher-start": (128, 4, 4), "student-start": (64, 3, 4)}  # hidden size, layers, heads
SIZES = {"test": 1000, "development": 200, "train": 1000, "unlimited": 6000, "teacher": 20_000}


def scratchpad(first: int, second: int, digits: int) -> str:
    """The whole answer to ``first+second=``, both of ``digits`` digits."""
    columns, carry = [], 0
    for place in range(digits):
        left, right = first // 10**place % 10, second // 10**place % 10
        total = left + right + carry
        columns.append(f"{left}+{right}+{carry}={total:02d}")
        carry = total // 10
    return ";".join([*columns, str(first + second)])


def additions(digits: int, seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of numbers of ``digits`` digits, each pair once. Raises `ValueError` where there are too few of them to choose from."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    if (high - low) ** 2 < 4 * sum(SIZES.values()):
        raise ValueError(
            f"{digits} digits make {(high - low + 1) ** 2:,} additions, too few for {sum(SIZES.values()):,} lines: take 3 or more"
        )
    draws, seen = random.Random(seed), set()
    while True:
        pair = draws.randint(low, high), draws.randint(low, high)
        if pair not in seen:
            seen.add(pair)
            yield pair


def write_files(folder: Path, digits: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = additions(digits, seed)
    for name, size in SIZES.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(size):
                first, second = next(pairs)
                line = {"prompt": f"{first}+{second}=", "response": scratchpad(first, second, digits), "answer": str(first + second)}
                file.write(json.dumps(line) + "\n")


def write_models(folder: Path, seed: int) -> None:
    """Untrained models with their tokenizer, in Hugging Face format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for number, (name, (hidden, layers, heads)) in enumerate(SHAPES.items()):
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
        torch.manual_seed(seed + number)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, one before a text and one at its end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = ["<|start|>", "<|end|>", *bytes_to_unicode().values()]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|start|>", clean_up_tokenization_spaces=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--digits", type=int, default=3, help="of both numbers (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_files(args.folder, args.digits, args.seed)
    write_models(args.folder, args.seed)
    print(f"{', '.join(f'{size:,} {name}' for name, size in SIZES.items())} additions of {args.digits} digits in {args.folder}")


if __name__ == "__main__":
    main()
