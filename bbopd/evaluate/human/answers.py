"""Answers of a named model to plain prompts, as a person would ask it: through its chat template where it has one, greedily."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bbopd.errors import DataError
from bbopd.evaluate.samples import student_rollouts
from bbopd.modeling import compute_dtype, load_model, load_tokenizer, max_positions, resolve_device, used_vocabulary
from bbopd.pipeline.student import end_of_answer_ids
from bbopd.pipeline.texts import chat_ids
from bbopd.rollouts.hf import HFEngine
from bbopd.types import Prompt, Sampling


def model_answers(name: str, prompts: Sequence[str], *, max_new_tokens: int, device: str) -> list[str]:
    """One answer of at most ``max_new_tokens`` tokens to each prompt, in order.

    Parameters
    ----------
    name : hub id, folder or GGUF file.

    Raises
    ------
    ModelError : it cannot be loaded.
    DataError : a prompt and its answer are longer than the model takes.
    """
    tokenizer = load_tokenizer(name)
    model = load_model(name, device=device, dtype=compute_dtype("auto", resolve_device(device)))
    asked = [Prompt(f"prompt-{number}", tuple(chat_ids(tokenizer, text))) for number, text in enumerate(prompts)]
    positions = max_positions(model)
    longest = max(len(prompt.token_ids) for prompt in asked) + max_new_tokens
    if positions is not None and longest > positions:
        raise DataError(
            f"the longest prompt and an answer of {max_new_tokens} tokens are {longest} tokens, {name} takes {positions}: "
            "lower --max-new-tokens, or shorten the prompt"
        )
    end_ids = end_of_answer_ids(model, tokenizer)
    rows = model.get_output_embeddings().weight.shape[0]
    engine = HFEngine(model, eos_token_ids=end_ids, pad_token_id=end_ids[0], vocab_size=used_vocabulary(tokenizer, rows))
    greedy = Sampling(max_new_tokens=max_new_tokens, top_k=1)
    rollouts = asyncio.run(student_rollouts(engine, asked, greedy))
    return ["" if rollout is None else str(tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True)) for rollout in rollouts]
