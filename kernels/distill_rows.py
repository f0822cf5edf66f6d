"""The rows of `linear_distill` in Triton: logits finished, their statistics, the divergence from a full teacher, the gradient.

Shape suffixes: ``n`` rows of a chunk, ``V`` vocabulary in use, ``B`` logits read at a time. One program a row, no atomics: lanes meet at
the end of a row only, always in the same order. The mathematics is that of csrc/row_math.h; docs/objective.md derives it.
"""

import triton
import triton.language as tl

from bbopd.kernels.logits import INTERPRETED, is_set, load_logits

LOG_P_FLOOR = tl.constexpr(-30.0)  # reverse KL reads a smaller log p (a masked token) as this
LOWEST = tl.constexpr(-1e9)  # stands in for -inf in a difference of log-probabilities
EXP_LIMIT = tl.constexpr(80.0)  # its exponential is finite, and that of its negative normal
CUTS_SHORT = tl.constexpr(INTERPRETED)  # the interpreter's bfloat16, where it should round


# ---------------------------------------------------------------- mathematics


@triton.jit
def expm1(x):
    """``exp(x) - 1`` to rounding also near 0: by its series up to 1/2, beyond which the difference loses one bit at most."""
    series = 1.0 + x * (1 / 8)
    series = 1.0 + x * (1 / 7) * series
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    series = 1.0 + x * (1 / 3) * series
    series = 1.0 + x * (1 / 2) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """``log(1 + x)`` to rounding also near 0: as ``2 artanh(s)``, ``s = x / (2 + x)``, by its series for x in [-1/2, 1]."""
    s = x / (2.0 + x)
    square = s * s
    series = 1 / 15 + square * (1 / 17)
    series = 1 / 13 + square * series
    series = 1 / 11 + square * series
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    near = (x >= -0.5) & (x <= 1.0)
    return tl.where(near, 2.0 * (s + s * square * series), tl.log(1.0 + x))


@triton.jit
def difference(p, q, d):
    """``q - p`` with a relative error of rounding even where they nearly agree; ``d = log p - log q``."""
    gap = expm1(-tl.abs(d))
    return tl.maximum(p, q) * tl.where(d < 0.0, -gap, gap)


@triton.jit
def divergence_term(log_p, log_q, DIVERGENCE: tl.constexpr, mix):
    """One token's shares ``(kd, qh)``: the divergence is the sum of ``kd``, its gradient by the tempered logits ``qh - q sum(qh)``.

    ``mix`` is beta of ``jsd``, skew of the skewed ones. Every ``kd`` vanishes to second order as q nears p.
    """
    log_p, log_q = tl.maximum(log_p, LOWEST), tl.maximum(log_q, LOWEST)
    p, q, d = tl.exp(log_p), tl.exp(log_q), log_p - log_q
    if DIVERGENCE == "forward_kl":
        qh = difference(p, q, d)
        kd = p * d + qh
    elif DIVERGENCE == "reverse_kl":
        d = tl.maximum(log_p, LOG_P_FLOOR) - log_q
        qh = -(q * d)
        kd = qh - difference(p, q, d)
    else:
        d = tl.minimum(tl.maximum(d, -EXP_LIMIT), EXP_LIMIT)  # beyond it the term is settled, and expm1 would overflow
        if DIVERGENCE == "jsd":
            log_mp = log1p((1.0 - mix) * expm1(-d))
            q_log_mq = q * log1p(mix * expm1(d))
            qh = (mix - 1.0) * q_log_mq
            kd = -(mix * (p * log_mp) + (1.0 - mix) * q_log_mq)
        elif DIVERGENCE == "skew_forward_kl":
            x = (1.0 - mix) * expm1(-d)
            qh = (1.0 - mix) * (q * (x / (1.0 + x)))
            kd = (1.0 - mix) * difference(p, q, d) - p * log1p(x)
        else:
            y = (1.0 - mix) * expm1(d)
            log_y = log1p(y)
            qh = q * (mix * (y / (1.0 + y)) - log_y)
            kd = (mix - 1.0) * difference(p, q, d) - q * log_y
    return kd, qh


@triton.jit
def log_prob(z, row_max, log_sum, inverse_temperature):
    log_p = z - row_max
    if inverse_temperature is not None:
        log_p = log_p * inverse_temperature
    return log_p - log_sum


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """``x`` rounded to the nearest number of a type, ties to even."""
    if CUTS_SHORT and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        x = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True), x)  # NaN stays
    return x.to(DTYPE)


# ---------------------------------------------------------------- kernels


@triton.jit
def row_divergence(
    logits,  # [n, stride] float32
    teacher,  # [n, teacher_width or more] of any float type
    signal,  # [n] bool: rows of the teacher to read, or None for all
    student_statistics,  # [2 or more, n] float32: each row's maximum m and the logarithm of the sum of exp((z - m) / T)
    teacher_statistics,  # [2 or more, n] float32
    shares,  # [3, n] float32, written: the divergence, sum(qh), and how many tokens reverse KL read at its floor
    V,
    stride,
    teacher_stride,
    teacher_width,
    inverse_temperature,  # 1 / T, or None at T = 1
    mix,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.num_programs(0)
    is_read = is_set(signal, row)
    student_max, student_sum = tl.load(student_statistics + row), tl.load(student_statistics + n + row)
    teacher_max, teacher_sum = tl.load(teacher_statistics + row), tl.load(teacher_statistics + n + row)
    kd_B = tl.zeros([BLOCK], tl.float32)
    qh_B = tl.zeros([BLOCK], tl.float32)
    floored_B = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        column_B = first + tl.arange(0, BLOCK)
        z_B = load_logits(logits + row * stride, column_B, V, stride, True, False)
        log_q_B = log_prob(z_B, student_max, student_sum, inverse_temperature)
        z_B = load_logits(teacher + row * teacher_stride, column_B, V, teacher_width, is_read, True)
        log_p_B = log_prob(z_B, teacher_max, teacher_sum, inverse_temperature)
        kd, qh = divergence_term(log_p_B, log_q_B, DIVERGENCE, mix)
        kd_B += kd
        qh_B += qh
        if DIVERGENCE == "reverse_kl":
            floored_B += ((log_p_B < LOG_P_FLOOR) & (log_q_B > float("-inf"))).to(tl.float32)
    tl.store(shares + row, tl.sum(kd_B, 0))
    tl.store(shares + n + row, tl.sum(qh_B, 0))
    tl.store(shares + 2 * n + row, tl.sum(floored_B, 0))


@triton.jit
def row_gradient(
    logits,  # [n, stride] float32
    gradient,  # [n, stride], written: by hidden @ weight.T; each row may begin where its logits do, and overwrite them
    teacher,  # [n, teacher_width or more] of any float type, or None
    signal,  # [n] bool: rows of the teacher to read, or None for all
    student_statistics,  # [3, n] float32: each row's maximum, the logarithm of its sum at T and of that at 1
    teacher_statistics,  # [2 or more, n] float32, or None
    mean,  # [n] float32: sum(qh), or None where it is 0 (forward KL)
    ce_grad,  # [n] float32: the factor of q - onehot(label), q at temperature 1; or None
    kd_grad,  # [n] float32: the factor of the divergence's gradient, without a teacher of q - onehot(id), q at T; or None
    labels,  # [n] int64, or None
    ids,  # [n] int64, or None for q without onehot(id)
    V,
    stride,
    gradient_stride,
    teacher_stride,
    teacher_width,
    inverse_temperature,  # 1 / T, or None at T = 1
    inverse_cap,  # 1 / logit_softcap, or None
    mix,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.num_programs(0)
    row_max, log_sum = tl.load(student_statistics + row), tl.load(student_statistics + n + row)
    if kd_grad is not None:
        kd_factor = tl.load(kd_grad + row)
    if ce_grad is not None:
        log_sum_1 = tl.load(student_statistics + 2 * n + row)
        ce_factor = tl.load(ce_grad + row)
        label = tl.load(labels + row)
    if teacher is not None:
        is_read = is_set(signal, row)
        teacher_max, teacher_sum = tl.load(teacher_statistics + row), tl.load(teacher_statistics + n + row)
    if mean is not None:
        row_mean = tl.load(mean + row)
    if ids is not None:
        token = tl.load(ids + row)
    for first in range(0, V, BLOCK):
        column_B = first + tl.arange(0, BLOCK)
        z_B = load_logits(logits + row * stride, column_B, V, stride, True, False)
        gradient_B = tl.zeros([BLOCK], tl.float32)
        if kd_grad is not None:
            log_q_B = log_prob(z_B, row_max, log_sum, inverse_temperature)
            if teacher is not None:
                t_B = load_logits(teacher + row * teacher_stride, column_B, V, teacher_width, is_read, True)
                log_p_B = log_prob(t_B, teacher_max, teacher_sum, inverse_temperature)
                gradient_B = divergence_term(log_p_B, log_q_B, DIVERGENCE, mix)[1]
                if mean is not None:
                    gradient_B -= tl.exp(log_q_B) * row_mean
            else:
                gradient_B = tl.exp(log_q_B)
            if ids is not None:
                gradient_B -= (column_B == token).to(tl.float32)
            gradient_B *= kd_factor
        if ce_grad is not None:
            gap_B = tl.exp(log_prob(z_B, row_max, log_sum_1, None)) - (column_B == label).to(tl.float32)
            gradient_B += ce_factor * gap_B
        if inverse_cap is not None:
            gradient_B *= 1.0 - (z_B * inverse_cap) * (z_B * inverse_cap)
        tl.debug_barrier()  # narrower numbers than the logits go where other threads' logits of this block were
        tl.store(gradient + row * gradient_stride + column_B, narrowed(gradient_B, gradient.dtype.element_ty), mask=column_B < stride)
