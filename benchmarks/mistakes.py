"""``python -m benchmarks.mistakes STUDENT TEACHER FILE.jsonl``: how much of a student's own text comes after its first mistake.

The student answers the prompts of the file once, at each of two temperatures; a mistake is the first token that differs from the line's
``response``. Told of each temperature: answers without one, the share of tokens after it, and KL(teacher‖student) at temperature 1, in nats
a token, up to it and after it. For tasks with one right answer, such as those of `benchmarks.addition`.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice

import torch

from bbopd.modeling import load_model, load_tokenizer

TEMPERATURES = (1.0, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mistakes", description=__doc__.split("\n\n")[0])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("file", help="JSONL with prompt and response, all prompts of as many tokens")
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    student, teacher = load_model(options.student).eval(), load_model(options.teacher).eval()
    tokenizer = load_tokenizer(options.teacher)
    end = tokenizer.eos_token_id
    with open(options.file, encoding="utf-8") as file:
        lines = [json.loads(line) for line in islice(file, options.lines)]
    prompts_BL = torch.tensor([tokenizer(line["prompt"], add_special_tokens=False).input_ids for line in lines])
    wanted = [[*tokenizer(line["response"], add_special_tokens=False).input_ids, end] for line in lines]
    length, first = max(map(len, wanted)) + 4, prompts_BL.shape[1]
    for temperature in TEMPERATURES:
        torch.manual_seed(options.seed)
        texts_BL = student.generate(
            prompts_BL,
            attention_mask=torch.ones_like(prompts_BL),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=length,
            eos_token_id=end,
            pad_token_id=end,
        )
        with torch.no_grad():
            log_q_BLV = student(texts_BL).logits.double().log_softmax(-1)
            log_p_BLV = teacher(texts_BL).logits.double().log_softmax(-1)
        kl_BL = (log_p_BLV.exp() * (log_p_BLV - log_q_BLV)).sum(-1)[:, first - 1 : -1]
        before: list[float] = []
        after: list[float] = []
        for answer, response, kl_L in zip(texts_BL[:, first:].tolist(), wanted, kl_BL, strict=True):
            written = answer.index(end) + 1 if end in answer else len(answer)
            pairs = zip(answer[:written], [*response, *[None] * length], strict=False)
            mistake = next((place for place, (said, right) in enumerate(pairs) if said != right), written)
            before += kl_L[: mistake + 1].tolist() if mistake < written else kl_L[:written].tolist()
            after += kl_L[mistake + 1 : written].tolist()
        right = sum(answer[: len(response)] == response for answer, response in zip(texts_BL[:, first:].tolist(), wanted, strict=True))
        share = len(after) / (len(before) + len(after))
        print(
            f"temperature {temperature:g}: {right / len(lines):.1%} of {len(lines)} answers without a mistake, "
            f"{share:.1%} of tokens after the first; KL {_mean(before):.3f} up to it, {_mean(after):.3f} after it"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main()
