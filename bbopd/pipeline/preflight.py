"""What is checked before the first rollout: whether this teacher can teach this student."""

from __future__ import annotations

from collections.abc import Sequence

from bbopd.errors import TeacherError
from bbopd.types import Prompt, TeacherInfo


def check_vocabulary(info: TeacherInfo, *, vocab_size: int, vocab_sha256: str) -> None:
    """Raises `TeacherError` unless teacher and student number the same tokens alike."""
    if info.vocab_size != vocab_size:
        raise TeacherError(
            f"teacher {info.model} has a vocabulary of {info.vocab_size} entries, the student of {vocab_size}: token-level distillation "
            "needs the same one. Take a student of the teacher's family; where only padding entries differ, resize the smaller "
            "embedding (resize_token_embeddings) and save it"
        )
    if info.vocab_sha256 and info.vocab_sha256 != vocab_sha256:
        raise TeacherError(
            f"teacher {info.model} and the student both have {vocab_size} tokens, but not the same ones (SHA-256 over the vocabulary "
            f"{info.vocab_sha256[:12]}... against {vocab_sha256[:12]}...): take a student of the teacher's family"
        )


def check_lengths(info: TeacherInfo, prompts: Sequence[Prompt], *, max_new_tokens: int) -> None:
    """Raises `TeacherError` where a prompt and its answer could be longer than the teacher takes."""
    limit = info.max_sequence_tokens
    if not limit:
        return
    for prompt in prompts:
        longest = len(prompt.token_ids) + max(max_new_tokens, len(prompt.reference_ids or ()))
        if longest > limit:
            raise TeacherError(
                f"prompt {prompt.prompt_id} has {len(prompt.token_ids)} tokens, with its answer up to {longest}: teacher {info.model} "
                f"takes {limit}; lower rollouts.max_new_tokens or data.response_tokens, or shorten the prompt"
            )
