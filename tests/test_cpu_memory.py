"""Peak memory of the C++ engine, each measurement in a process of its own.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's counters")

PREAMBLE = """
    import sys, torch
    from pathlib import Path
    from bbopd import FullTeacher, TopKTeacher, linear_distill, linear_logprobs
    from bbopd.cpu_memory import stash_limit

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))

    def inputs(N, D, V):
        return torch.randn(N, D).bfloat16().requires_grad_(), (torch.randn(V, D) / 8).bfloat16().requires_grad_()

    def top_k(N, V, K):
        found = linear_logprobs(torch.randn(N, 4), torch.randn(V, 4), top_k=K)
        return TopKTeacher(found.topk_ids, found.topk_logprobs, found.log_tail)

    def peak_of(step):
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        kept = step()
        print(status("VmHWM") - before)

    torch.set_num_threads(2)
    N, D, V, K, stash = map(int, sys.argv[1:])
    linear_distill(*inputs(70, 20, 300), top_k(70, 300, 4), torch.zeros(70, dtype=torch.int64)).loss.backward()
    hidden, weight = inputs(N, D, V)
    labels = torch.zeros(N, dtype=torch.int64)
"""

DISTILL = """
    teacher = top_k(N, V, K)
    import bbopd._C; bbopd._C.release_unused_memory()
    with stash_limit(stash):
        peak_of(lambda: linear_distill(hidden, weight, teacher, labels, impl="cpu").loss.backward())
"""

TEACHER_HEAD = """
    teacher = FullTeacher(hidden=hidden.detach().flip(0), weight=weight.detach().flip(0))
    import bbopd._C; bbopd._C.release_unused_memory()
    with stash_limit(stash):
        peak_of(lambda: linear_distill(hidden, weight, teacher, labels, divergence="jsd", impl="cpu").loss.backward())
"""

LOGPROBS = """
    import bbopd._C; bbopd._C.release_unused_memory()
    peak_of(lambda: linear_logprobs(hidden, weight, top_k=K, token_ids=labels, impl="cpu"))
"""


def peak_megabytes(script: str, *numbers: int) -> float:
    program = textwrap.dedent(PREAMBLE) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", program, *map(str, numbers)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def gradient_megabytes(N: int, D: int, V: int) -> float:
    return 2 * (N + V) * D / 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "D", "V"),
    [(2048, 576, 49152), (8192, 64, 32768), (300, 2048, 16384), (100, 640, 262144), (4096, 4096, 512), (513, 33, 50257)],
)
def test_without_a_stash_memory_is_flat_in_tokens_and_vocabulary(N: int, D: int, V: int) -> None:
    """64 MB, and a float32 sum of the hidden states' gradient for each of 2 threads; logits alone would take up to 1 GB."""
    limit = 64 + 2 * 4 * N * D / 2**20
    assert peak_megabytes(DISTILL, N, D, V, 16, 0) - gradient_megabytes(N, D, V) < limit


def test_a_teacher_with_its_own_head_needs_no_logits_in_memory() -> None:
    N, D, V = 2048, 64, 32768
    limit = 64 + 2 * 4 * N * D / 2**20
    assert peak_megabytes(TEACHER_HEAD, N, D, V, 0, 0) - gradient_megabytes(N, D, V) < limit


@pytest.mark.slow
def test_a_stash_takes_what_it_was_allowed() -> None:
    """Float16 of all logits would be 128 MB; 40 MB are allowed."""
    N, D, V = 2048, 64, 32768
    none, some, most = (peak_megabytes(DISTILL, N, D, V, 16, stash) for stash in (0, 40, 4000))
    assert 25 < some - none < 48
    assert 110 < most - none < 150


@pytest.mark.parametrize(("N", "D", "V", "K"), [(2048, 64, 49152, 64), (2048, 64, 49152, 0), (4096, 16, 8192, 1024)])
def test_scoring_is_flat_in_tokens_and_vocabulary(N: int, D: int, V: int, K: int) -> None:
    results = N * K * 12 / 2**20
    assert peak_megabytes(LOGPROBS, N, D, V, K, 0) - results < 64
