"""Triton kernels: against float64 beside plain PyTorch, in the interpreter (and on a GPU where there is one), and compiled for three GPUs.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary. Whether Triton interprets is settled as it is imported, so that a process of
its own answers all the cases at once.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bbopd import linear_logprobs

triton = pytest.importorskip("triton", minversion="3.7")  # the interpreter of 3.6 stumbles over numpy 2.4

CHILD = """
import sys, torch
from bbopd import linear_logprobs
from bbopd.kernels import logprobs

device, questions, answers = sys.argv[1:]
answered = {}
for name, (tensors, options) in torch.load(questions).items():
    arguments = {key: value.to(device) for key, value in tensors.items()} | options
    try:
        op = logprobs.linear_logprobs if "chunk_tokens" in options else linear_logprobs
        once, again = op(**arguments), op(**arguments)
    except ValueError as error:
        answered[name] = str(error)
    else:
        pairs = ((once.logsumexp, again.logsumexp), (once.sampled, again.sampled))
        answered[name] = [None if one is None else (one.cpu(), other.cpu()) for one, other in pairs]
log_z, log_p = torch.empty(2, 3, device=device)
ids = torch.tensor([-1, 6, 7], device=device)  # an id that does not fit reads nothing
logprobs.row_logprobs[(3,)](torch.zeros(3, 16, device=device), None, ids, log_z, log_p, 7, 16, None, 1.0, BLOCK=logprobs.BLOCK)
answered["ids beyond"] = log_p.cpu()
tensors, _ = torch.load(questions)["bias"]
arguments = [tensors[key].to(device) for key in ("hidden", "weight", "bias", "token_ids")] + [1.0, 1.0, None, 9, 0]
arguments[3] %= 9
answered["registered"] = torch.library.opcheck(torch.ops.bbopd.linear_logprobs_triton.default, tuple(arguments))
torch.save(answered, answers)
"""

Case = tuple[dict[str, Any], dict[str, Any]]  # tensors and the other options


def draw(N: int, V: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, spread: float = 1.0, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(1000 * V + N)
    tensors: dict[str, Any] = {
        "hidden": (spread * torch.randn(N, 24, generator=generator)).to(dtype),
        "weight": torch.randn(V, 24, generator=generator).to(dtype),
        "token_ids": torch.randint(0, options.get("vocab_size", V), (N,), generator=generator),
    }
    if bias:
        tensors["bias"] = torch.randn(V, generator=generator).to(dtype)
    return tensors, options


def masked(case: Case, *ids: int) -> Case:
    """The same with a bias that takes ``ids`` out of the vocabulary, one of them the token of row 0."""
    case[0]["bias"][list(ids)] = -torch.inf
    case[0]["token_ids"][0] = ids[0]
    return case


def without(name: str, case: Case) -> Case:
    return {key: value for key, value in case[0].items() if key != name}, case[1]


ANSWERED: dict[str, Case] = {
    **{f"V={V} N={N} T={T}": draw(N, V, temperature=T) for V in (1, 7, 1000, 1031) for N, T in ((1, 1.0), (5, 2.0), (6, 0.5))},
    "more than one block": draw(3, 9001, temperature=0.7),
    "bias": draw(4, 1031, bias=True, temperature=2.0),
    "scale": draw(4, 1000, logit_scale=-0.3),
    "softcap": draw(4, 1031, logit_softcap=5.0, logit_scale=1.5, temperature=2.0),
    "all of it": draw(4, 1031, bias=True, logit_softcap=30.0, logit_scale=0.5, temperature=1.3, vocab_size=1003),
    "vocab_size": draw(5, 1000, vocab_size=1),
    "small logits under a softcap": draw(4, 1000, spread=1e-4, logit_softcap=30.0),
    "far apart": draw(4, 5000, spread=300.0, temperature=0.5),
    "masked by the bias": masked(draw(3, 1031, bias=True), 4, 0, 1030, 512),
    "a whole block masked": masked(draw(3, 9001, bias=True, temperature=2.0), *range(4096)),
    "masked and capped": masked(draw(3, 1031, bias=True, logit_softcap=5.0), 4, 0),
    "bfloat16": draw(7, 1031, dtype=torch.bfloat16, bias=True, temperature=2.0),
    "float16": draw(7, 1000, dtype=torch.float16),
    "in chunks": draw(7, 1031, bias=True, chunk_tokens=3),
    "no tokens": draw(0, 1031),
    "logsumexp alone": without("token_ids", draw(4, 1031, temperature=2.0)),
}
REFUSED: dict[str, tuple[Case, str]] = {
    "top_k": (draw(2, 9, top_k=3), r"top_k=3 was given: use impl='reference'"),
    "candidates": (({**draw(2, 9)[0], "candidate_ids": torch.tensor([[1], [2]])}, {}), r"candidate_ids was given: use impl='reference'"),
    "float64": (draw(2, 9, dtype=torch.float64), r"computes in float32, hidden is torch.float64.*use impl='reference'"),
}
REFUSED_ON_CPU: dict[str, tuple[Case, str]] = {
    "id beyond": (({**draw(2, 9)[0], "token_ids": torch.tensor([3, 9])}, {}), r"token_ids\[1\] is 9: ids must be from 0 to 8"),
    "NaN": (({**draw(2, 9)[0], "hidden": torch.tensor([[0.0] * 24, [torch.nan] * 24])}, {}), r"logits of token 1 are not finite"),
    "nothing left": (masked(draw(2, 9, bias=True), *range(9)), r"logits of token 0 are not finite"),
}
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.fixture(scope="module", params=["cpu", ON_GPU])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernel makes of every case: two answers of each op, or the error; interpreted where the device is a CPU."""
    folder = tmp_path_factory.mktemp("kernels")
    cases = ANSWERED | {name: case for name, (case, _) in (REFUSED | REFUSED_ON_CPU).items()}
    questions = {
        name: (tensors, options if "chunk_tokens" in options else {**options, "impl": "triton"})
        for name, (tensors, options) in cases.items()
    }
    questions["auto"] = (draw(2, 9)[0], {"top_k": 3})
    if request.param == "cuda":  # an id that does not fit is not looked for there
        questions = {name: question for name, question in questions.items() if name not in REFUSED_ON_CPU}
    torch.save(questions, folder / "questions.pt")
    environment = os.environ | {"TRITON_INTERPRET": str(int(request.param == "cpu"))}
    command = [sys.executable, "-c", CHILD, request.param, str(folder / "questions.pt"), str(folder / "answers.pt")]
    subprocess.run(command, env=environment, check=True)
    answered: dict[str, Any] = torch.load(folder / "answers.pt")
    return answered


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Logsumexp and log-probabilities of all ids, in float64, [N] and [N, V]."""
    tensors, options = case
    z_NV = tensors["hidden"].double() @ tensors["weight"].double().T
    if "bias" in tensors:
        z_NV += tensors["bias"].double()
    z_NV *= options.get("logit_scale", 1.0)
    if "logit_softcap" in options:
        z_NV = options["logit_softcap"] * torch.tanh(z_NV / options["logit_softcap"])
    z_NV = z_NV[:, : options.get("vocab_size", z_NV.shape[1])] / options.get("temperature", 1.0)
    return z_NV.logsumexp(1), z_NV.log_softmax(1)


@pytest.mark.parametrize("name", ANSWERED)
def test_as_exact_as_plain_pytorch_and_the_same_each_time(name: str, answers: dict[str, Any]) -> None:
    tensors, options = ANSWERED[name]
    exact_lse_N, exact_log_probs_NV = exact((tensors, options))
    plain = linear_logprobs(**tensors, **{key: value for key, value in options.items() if key != "chunk_tokens"}, impl="reference")
    expected = [(exact_lse_N, plain.logsumexp)]
    if plain.sampled is not None:
        expected.append((exact_log_probs_NV.gather(1, tensors["token_ids"][:, None])[:, 0], plain.sampled))
    assert [answer is None for answer in answers[name]] == [False, plain.sampled is None]
    for (once, again), (truth, reference) in zip(answers[name], expected, strict=False):
        assert once.dtype == torch.float32
        assert torch.equal(once, again)
        assert torch.equal(once.isneginf(), truth.isneginf())
        live = truth.isfinite()
        # an error of rounding of the largest number on the way: the logits are as large as the logsumexp, or the cap
        floor = 4e-7 * float(exact_lse_N.abs().max() + truth[live].abs().max() + 1.0) if live.any() else 0.0
        error, plain_error = ((values.double() - truth)[live].abs().amax() if live.any() else 0.0 for values in (once, reference))
        assert error <= plain_error + floor


@pytest.mark.parametrize("name", REFUSED | REFUSED_ON_CPU)
def test_what_is_refused(name: str, answers: dict[str, Any]) -> None:
    if name not in answers:
        pytest.skip("not checked on a GPU")
    assert re.search((REFUSED | REFUSED_ON_CPU)[name][1], answers[name])


def test_an_id_beyond_the_vocabulary_gets_nan(answers: dict[str, Any]) -> None:
    torch.testing.assert_close(answers["ids beyond"], torch.tensor([torch.nan, -math.log(7), torch.nan]), equal_nan=True)


def test_torch_compile_sees_one_opaque_op(answers: dict[str, Any]) -> None:
    assert set(answers["registered"].values()) == {"SUCCESS"}


def test_auto_leaves_the_kernel_alone(answers: dict[str, Any]) -> None:
    assert isinstance(answers["auto"], list)  # with a top-k, which the kernel refuses


@pytest.mark.skipif(torch.cuda.is_available() or triton.knobs.runtime.interpret, reason="the kernel runs here")
def test_without_a_gpu_the_engine_is_not_there() -> None:
    tensors, _ = draw(2, 9)
    with pytest.raises(ValueError, match=r"impl is 'triton': this build has auto, reference, cpu$"):
        linear_logprobs(**tensors, impl="triton")


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("bare", [False, True], ids=["all of it", "bare"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_without_spilling(capability: int, bare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bbopd.kernels import logprobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": "*fp32", "bias": "*fp32", "token_ids": "*i64", "logsumexp": "*fp32", "sampled": "*fp32"}
    types |= {"V": "i32", "stride": "i32", "inner": "fp32", "outer": "fp32"}
    constants: dict[str, Any] = {"BLOCK": logprobs.BLOCK} | (dict.fromkeys(("bias", "token_ids", "inner")) if bare else {})
    signature = types | dict.fromkeys(constants, "constexpr")
    divisors = {"logits": 16, "bias": 16, "stride": logprobs.ROW_ALIGNMENT}
    aligned = {(list(types).index(name),): [["tt.divisibility", divisor]] for name, divisor in divisors.items()}
    source = ASTSource(logprobs.row_logprobs, signature, constants, aligned)
    options = {"num_warps": logprobs.WARPS, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]  # 16 bytes at a time
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report.split("Function row_logprobs", 1)[1])}
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), report
    assert usage["REG"] * 32 * logprobs.WARPS * 2 <= 65536, report  # at least two rows at a time on a multiprocessor
