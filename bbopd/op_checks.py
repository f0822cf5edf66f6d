"""What the two ops refuse, with the value that was wrong and the way out.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids per token. Shapes and dtypes are checked at the call; values by
the engine, where the tensors are on a CPU or ``check=True`` asks for it (on a GPU that waits for the device).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bbopd.types import DIVERGENCES, CandidateTeacher, FullTeacher, OpTeacher, SampledTeacher, TopKTeacher

_MASS_TOLERANCE = {torch.bfloat16: 3e-2}  # rounding of the teacher's logprobs; 2e-3 for the rest


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, logit_softcap: float | None, who: str = "") -> None:
    """Refuse a ``hidden`` [N, D], ``weight`` [V, D] and ``bias`` [V] that do not make logits."""
    check_tensor(f"{who}hidden", hidden, 2, hint="flatten the batch dimensions: hidden.flatten(0, -2)")
    check_tensor(f"{who}weight", weight, 2)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{who}hidden has {hidden.shape[1]} features a token and {who}weight {weight.shape[1]}: weight must be [vocabulary, hidden], "
            "as in lm_head.weight"
        )
    same_device(hidden, f"{who}weight", weight)
    if bias is not None:
        check_tensor(f"{who}bias", bias, 1, rows=weight.shape[0], rows_of="the vocabulary")
        same_device(hidden, f"{who}bias", bias)
    if not -math.inf < logit_scale < math.inf or logit_scale == 0:
        raise ValueError(f"{who}logit_scale is {logit_scale}: it must be a finite number other than 0")
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"{who}logit_softcap is {logit_softcap}: it must be a positive number, or None for none")


def check_engine(impl: str, engines: Sequence[str]) -> None:
    if impl != "auto" and impl not in engines:
        raise ValueError(f"impl is {impl!r}: this build has auto, {', '.join(engines)}")


def check_process_group(group: object) -> None:
    from torch.distributed import ProcessGroup

    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}: give a torch.distributed.ProcessGroup that this process is a rank of, or None")


def check_group(impl: str, vocab_size: int | None) -> None:
    """Refuse what a vocabulary split over a group cannot have; the ranks' sizes are compared once they are exchanged."""
    if impl == "cpu":
        raise ValueError("impl is 'cpu': a vocabulary that is split over a group has impl='reference', or on a GPU 'triton' or 'cuda'")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: give the number of logits in use over all ranks, 1 or more")


def check_vocab_size(vocab_size: int | None, available: int) -> int:
    """The number of logits in use: ``vocab_size``, or all of them."""
    if available == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if vocab_size is None:
        return available
    if not 1 <= vocab_size <= available:
        raise ValueError(f"vocab_size is {vocab_size}, but weight has {available} rows: give a number from 1 to {available}")
    return vocab_size


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be a positive number")


def check_numbers(ce_weight: float, kd_weight: float, divergence: str, beta: float, skew: float) -> None:
    """Refuse weights and divergence parameters without a meaning."""
    for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: it must be 0 or a positive number")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}: choose one of {', '.join(DIVERGENCES)}")
    if divergence == "jsd" and not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: it must lie in [0, 1] (0 is forward_kl, 1 reverse_kl)")
    if divergence in ("skew_forward_kl", "skew_reverse_kl") and not 0 < skew < 1:
        raise ValueError(f"skew is {skew}: it must lie strictly between 0 and 1 (DistiLLM uses 0.1)")


def check_teacher(teacher: OpTeacher, hidden: Tensor, temperature: float) -> None:
    """Refuse a teacher whose tensors do not fit the student's, or that was asked at another temperature."""
    N = hidden.shape[0]
    if isinstance(teacher, FullTeacher):
        _check_full(teacher, hidden)
    elif isinstance(teacher, (TopKTeacher, CandidateTeacher)):
        check_ids("teacher.ids", teacher.ids, hidden, 2)
        if teacher.ids.shape[1] == 0:
            raise ValueError(f"teacher.ids has shape {tuple(teacher.ids.shape)}: at least one id a token is needed")
        if teacher.logprobs.shape != teacher.ids.shape:
            raise ValueError(
                f"teacher.logprobs has shape {tuple(teacher.logprobs.shape)}, teacher.ids {tuple(teacher.ids.shape)}: they must agree"
            )
        check_tensor("teacher.logprobs", teacher.logprobs, 2)
        check_tensor("teacher.log_tail", teacher.log_tail, 1, rows=N)
        parts = (("teacher.logprobs", teacher.logprobs), ("teacher.log_tail", teacher.log_tail))
        _same_devices(hidden, parts)
    elif isinstance(teacher, SampledTeacher):
        check_ids("teacher.token_ids", teacher.token_ids, hidden, 1)
        if (teacher.logprobs is None) == (teacher.advantages is None):
            raise ValueError("SampledTeacher takes logprobs (the teacher's) or advantages: give exactly one of the two")
        for name in ("behavior_logprobs", "logprobs", "advantages"):
            values = getattr(teacher, name)
            if values is not None:
                check_tensor(f"teacher.{name}", values, 1, rows=N)
                same_device(hidden, f"teacher.{name}", values)
    else:
        raise TypeError(
            f"teacher is a {type(teacher).__name__}: give a FullTeacher, TopKTeacher, CandidateTeacher or SampledTeacher, "
            "or None for plain cross-entropy"
        )
    if not isinstance(teacher, FullTeacher) and teacher.temperature != temperature:
        raise ValueError(
            f"the teacher's logprobs were taken at temperature {teacher.temperature}, the call asks for {temperature}: "
            f"pass temperature={teacher.temperature}, or ask the teacher again"
        )
    if teacher.valid is not None:
        _check_mask("teacher.valid", teacher.valid, hidden)


def _check_full(teacher: FullTeacher, hidden: Tensor) -> None:
    if (teacher.logits is None) == (teacher.hidden is None) or (teacher.hidden is None) != (teacher.weight is None):
        raise ValueError("FullTeacher takes logits, or hidden and weight: give exactly one of the two")
    if teacher.logits is not None:
        if teacher.bias is not None or teacher.logit_scale != 1.0 or teacher.logit_softcap is not None:
            raise ValueError("FullTeacher.bias, logit_scale and logit_softcap belong to hidden and weight: logits are taken as they are")
        check_tensor("teacher.logits", teacher.logits, 2, rows=hidden.shape[0])
        same_device(hidden, "teacher.logits", teacher.logits)
    else:
        assert teacher.hidden is not None
        assert teacher.weight is not None
        check_head(teacher.hidden, teacher.weight, teacher.bias, teacher.logit_scale, teacher.logit_softcap, who="teacher.")
        check_tensor("teacher.hidden", teacher.hidden, 2, rows=hidden.shape[0])
        same_device(hidden, "teacher.hidden", teacher.hidden)


def vocabulary_of(logits: Tensor | None, weight: Tensor | None) -> int | None:
    """How many tokens a full teacher knows of, from its logits [N, V] or weight [V, D]; None for other teachers."""
    return logits.shape[1] if logits is not None else weight.shape[0] if weight is not None else None


def check_teacher_vocabulary(teacher: OpTeacher | None, student_vocab: int, vocab_size: int | None) -> None:
    """Refuse a full teacher of another vocabulary than the student's, but for padding."""
    if not isinstance(teacher, FullTeacher):
        return
    teacher_vocab = vocabulary_of(teacher.logits, teacher.weight) or 0
    if vocab_size is None and teacher_vocab != student_vocab:
        raise ValueError(
            f"teacher vocabulary has {teacher_vocab} entries, the student's {student_vocab}: where the "
            f"{abs(teacher_vocab - student_vocab)} extra are padding, set vocab_size={min(teacher_vocab, student_vocab)} or less; "
            "otherwise the tokenizers differ"
        )
    if vocab_size is not None and vocab_size > teacher_vocab:
        raise ValueError(f"vocab_size is {vocab_size}, but the teacher has {teacher_vocab} logits: give at most {teacher_vocab}")


def check_tensor(
    name: str, tensor: Tensor, dims: int, *, rows: int | None = None, rows_of: str = "the tokens of hidden", hint: str = ""
) -> None:
    """Refuse a tensor that is not floating point, or of another shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: a torch.Tensor is needed")
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: {dims} dimension(s) are needed" + (f"; {hint}" if hint else ""))
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}: a floating-point dtype is needed")
    if rows is not None and tensor.shape[0] != rows:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, {rows_of} {rows}: they must agree")


def check_ids(name: str, ids: Tensor, hidden: Tensor, dims: int) -> None:
    """Refuse token ids that are not integers of one row a token."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}: a torch.Tensor is needed")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype}: an integer dtype is needed")
    if ids.dim() != dims or ids.shape[0] != hidden.shape[0]:
        shape = f"[{hidden.shape[0]}]" if dims == 1 else f"[{hidden.shape[0]}, K]"
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: {shape} is needed, one row a token of hidden")
    same_device(hidden, name, ids)


def check_token_weight(token_weight: Tensor, hidden: Tensor) -> None:
    check_tensor("token_weight", token_weight, 1, rows=hidden.shape[0])
    same_device(hidden, "token_weight", token_weight)


def same_device(hidden: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: move it with .to({str(hidden.device)!r})")


def _same_devices(hidden: Tensor, parts: Sequence[tuple[str, Tensor]]) -> None:
    for name, tensor in parts:
        same_device(hidden, name, tensor)


def _check_mask(name: str, mask: Tensor, hidden: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != hidden.shape[:1]:
        raise ValueError(f"{name} is {mask.dtype} of shape {tuple(mask.shape)}: torch.bool of shape ({hidden.shape[0]},) is needed")
    same_device(hidden, name, mask)


# ---------------------------------------------------------------- values


def check_id_values(name: str, ids: Tensor, vocab_size: int, *, empty: int | None = None, unique: bool = False) -> None:
    """Refuse ids outside the vocabulary (``empty`` marks a slot without one) and, in a support, the same id twice in a row."""
    bad = (ids < 0) | (ids >= vocab_size)
    if empty is not None:
        bad &= ids != empty
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        allowed = "" if empty is None else f", or {empty}"
        raise ValueError(f"{name}{where} is {int(ids[tuple(where)])}: ids must be from 0 to {vocab_size - 1}{allowed}")
    if unique:
        ordered = ids.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if bool(twice.any()):
            row, column = twice.nonzero()[0].tolist()
            raise ValueError(f"{name}[{row}] holds the id {int(ordered[row, column])} twice: give each id once, -1 in slots without one")


def check_scored_ids(token_ids: Tensor | None, candidate_ids: Tensor | None, vocab_size: int) -> None:
    """Refuse ids of `linear_logprobs` outside the vocabulary, and candidates of a token that are not unique."""
    if token_ids is not None:
        check_id_values("token_ids", token_ids, vocab_size)
    if candidate_ids is not None:
        check_id_values("candidate_ids", candidate_ids, vocab_size, empty=-1, unique=True)


def check_normalizer(normalizer: Tensor) -> None:
    """Refuse token counts that are negative or no numbers."""
    if not bool(((normalizer >= 0) & normalizer.isfinite()).all()):
        raise ValueError(
            f"normalizer is {normalizer.tolist()}: it must be token counts, 0 or more: (ce_tokens, kd_tokens), or one number for both"
        )


def check_finite(name: str, values: Tensor) -> None:
    bad = ~values.isfinite()
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}{where} is {float(values[tuple(where)])}: it must be finite; tokens without a signal go into valid=False")


def check_distribution(ids: Tensor, logprobs: Tensor, log_tail: Tensor, valid: Tensor | None) -> None:
    """Refuse top-k or candidate rows that are no distribution: NaN, a positive logprob, or a mass far from 1."""
    if valid is not None:
        ids, logprobs, log_tail = ids[valid], logprobs[valid], log_tail[valid]
    logprobs = logprobs.masked_fill(ids < 0, -torch.inf)
    of = "" if valid is None else " (of those with a signal)"
    for name, values in (("teacher.logprobs", logprobs), ("teacher.log_tail", log_tail)):
        bad = ~(values <= 1e-3)
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}{where}{of} is {float(values[tuple(where)])}: a log-probability is at most 0, and never NaN")
    mass = logprobs.float().exp().sum(1) + log_tail.float().exp()
    off = (mass - 1).abs() > _MASS_TOLERANCE.get(logprobs.dtype, 2e-3)
    if bool(off.any()):
        row = int(off.nonzero()[0])
        raise ValueError(
            f"the teacher's probabilities of token {row}{of} add up to {float(mass[row]):.6f} with the tail: they must make 1; log_tail is "
            "the logarithm of all the mass outside ids, at the same temperature"
        )


def check_teacher_rows(logsumexp_n: Tensor, first_row: int) -> None:
    """Refuse teacher logits that hold NaN, or a row without any finite logit: both leave no finite logsumexp."""
    bad = ~logsumexp_n.isfinite()
    if bool(bad.any()):
        row = first_row + int(bad.nonzero()[0])
        raise ValueError(f"the teacher's logits of token {row} hold NaN, or nothing but -inf: tokens without a signal go into valid=False")


def check_student_rows(logsumexp_n: Tensor, first_row: int) -> None:
    """Refuse a student whose logits are not finite."""
    bad = ~logsumexp_n.isfinite()
    if bool(bad.any()):
        row = first_row + int(bad.nonzero()[0])
        raise ValueError(f"the logits of token {row} are not finite: hidden, weight or bias hold NaN or infinity")
