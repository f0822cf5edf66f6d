"""What the engines of `linear_logprobs` are asked, and what they must answer.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbopd import linear_logprobs

Case = tuple[dict[str, Any], dict[str, Any]]  # tensors and the other options


def draw(
    N: int, V: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, spread: float = 1.0, M: int = 0, **options: Any
) -> Case:
    """With ``M`` also candidates, a fifth of them empty slots."""
    generator = torch.Generator().manual_seed(1000 * V + N)
    tensors: dict[str, Any] = {
        "hidden": (spread * torch.randn(N, 24, generator=generator)).to(dtype),
        "weight": torch.randn(V, 24, generator=generator).to(dtype),
        "token_ids": torch.randint(0, options.get("vocab_size", V), (N,), generator=generator),
    }
    if bias:
        tensors["bias"] = torch.randn(V, generator=generator).to(dtype)
    if M:
        used = options.get("vocab_size", V)
        tensors["candidate_ids"] = torch.rand(N, used, generator=generator).argsort(1)[:, :M]
        tensors["candidate_ids"][torch.rand(tensors["candidate_ids"].shape, generator=generator) < 0.2] = -1
    return tensors, options


def masked(case: Case, *ids: int) -> Case:
    """The same with a bias that takes ``ids`` out of the vocabulary, one of them the token of row 0."""
    case[0]["bias"][list(ids)] = -torch.inf
    case[0]["token_ids"][0] = ids[0]
    return case


def without(name: str, case: Case) -> Case:
    return {key: value for key, value in case[0].items() if key != name}, case[1]


def with_candidates(case: Case, ids: Any) -> Case:
    return {**case[0], "candidate_ids": torch.tensor(ids)}, case[1]


def nearly_certain(offset: float) -> Case:
    """Mass of 1e-30 outside three ids, where 1 minus the rest would leave nothing."""
    z_NV = torch.randn(5, 5000, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)
    z_NV[:, [5, 600, 4999]] += 75.0
    tensors = {"hidden": torch.eye(5), "weight": (z_NV + offset).T.contiguous(), "candidate_ids": torch.tensor([[600, 5, -1, 4999]] * 5)}
    return tensors, {"top_k": 3}


def tied() -> Tensor:
    """Rows that hold few different logits, of equal ones only, and of NaN; then padding, 16 numbers that are none of them."""
    z_NV = torch.randint(-2, 3, (5, 9001 + 16), generator=torch.Generator().manual_seed(1)).float()
    z_NV[:, ::2] = torch.where(z_NV[:, ::2] == 0, -0.0, z_NV[:, ::2])
    z_NV[1], z_NV[2, 5:], z_NV[3], z_NV[4] = 1.0, -torch.inf, torch.nan, -torch.nan
    z_NV[:, -16:] = torch.inf
    return z_NV


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
    **{
        f"V={V} N={N} T={T} K={K} M={M}": draw(N, V, temperature=T, top_k=K, M=M)
        for N, V, K, M in ((1, 1, 1, 1), (2, 7, 7, 3), (5, 1031, 1, 70), (3, 9001, 64, 9), (2, 9001, 5000, 5000), (2, 8192, 8192, 1))
        for T in (1.0, 2.0, 0.7)
    },
    "top-k alone": without("token_ids", draw(4, 1031, top_k=40)),
    "candidates alone": without("token_ids", draw(4, 1031, M=40)),
    "tokens without candidates": with_candidates(draw(3, 300, top_k=2), [[-1, -1], [7, -1], [-1, 0]]),
    **{
        f"all of it, top-k and candidates T={T}": draw(
            4, 5031, bias=True, logit_softcap=30.0, logit_scale=1.3, temperature=T, vocab_size=5003, top_k=40, M=13
        )
        for T in (1.0, 2.0, 0.7)
    },
    "top-k in bfloat16": draw(7, 1031, dtype=torch.bfloat16, bias=True, temperature=2.0, top_k=9, M=3),
    "top-k in float16": draw(7, 1000, dtype=torch.float16, top_k=9, M=3),
    "top-k far apart": draw(4, 5000, spread=300.0, temperature=0.5, top_k=9, M=3),
    "top-k in chunks": draw(7, 1031, bias=True, chunk_tokens=3, top_k=9, M=3),
    "top-k of no tokens": draw(0, 1031, top_k=9, M=2),
    "top-k around masked logits": masked(draw(3, 5000, bias=True, top_k=50, M=9), 0, 512, *range(1024, 5000)),
    "fewer logits than top-k": masked(draw(3, 900, bias=True, top_k=12, M=9), 5, *range(3), *range(6, 400), *range(401, 900)),
    **{f"nearly certain {offset}": nearly_certain(offset) for offset in (0.0, 100.0, -3000.0)},
}
REFUSED: dict[str, tuple[Case, str]] = {
    "float64": (draw(2, 9, dtype=torch.float64), r"computes in float32, hidden is torch.float64.*use impl='reference'"),
}
REFUSED_ON_CPU: dict[str, tuple[Case, str]] = {
    "id beyond": (({**draw(2, 9)[0], "token_ids": torch.tensor([3, 9])}, {}), r"token_ids\[1\] is 9: ids must be from 0 to 8"),
    "candidate beyond": (with_candidates(draw(2, 9), [[1], [9]]), r"candidate_ids\[1, 0\] is 9: ids must be from 0 to 8"),
    "NaN beside a top-k": (
        ({**draw(2, 9)[0], "hidden": torch.full((2, 24), torch.nan)}, {"top_k": 3}),
        r"logits of token 0 are not finite",
    ),
    "NaN": (({**draw(2, 9)[0], "hidden": torch.tensor([[0.0] * 24, [torch.nan] * 24])}, {}), r"logits of token 1 are not finite"),
    "nothing left": (masked(draw(2, 9, bias=True), *range(9)), r"logits of token 0 are not finite"),
}


# ---------------------------------------------------------------- answers


def exact(case: Case) -> dict[str, Tensor]:
    """What the op returns, and log-probabilities of all ids, in float64."""
    tensors, options = case
    z_NV = tensors["hidden"].double() @ tensors["weight"].double().T
    if "bias" in tensors:
        z_NV += tensors["bias"].double()
    z_NV *= options.get("logit_scale", 1.0)
    if "logit_softcap" in options:
        z_NV = options["logit_softcap"] * torch.tanh(z_NV / options["logit_softcap"])
    z_NV = z_NV[:, : options.get("vocab_size", z_NV.shape[1])] / options.get("temperature", 1.0)
    log_p_NV = z_NV.log_softmax(1)
    found = {"logsumexp": z_NV.logsumexp(1), "all": log_p_NV}
    if "token_ids" in tensors:
        found["sampled"] = log_p_NV.gather(1, tensors["token_ids"][:, None])[:, 0]
    if "top_k" in options:
        found["topk_ids"] = log_p_NV.sort(dim=1, descending=True, stable=True).indices[:, : options["top_k"]]
        found["topk_logprobs"], found["log_tail"] = around(log_p_NV, found["topk_ids"])
    if "candidate_ids" in tensors:
        found["candidates"], found["candidates_log_tail"] = around(log_p_NV, tensors["candidate_ids"])
    return found


def around(log_p_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    inside_NV = torch.zeros(log_p_NV.shape[0], log_p_NV.shape[1] + 1, dtype=torch.bool).scatter_(1, ids_NK + 1, True)[:, 1:]
    inside_NK = log_p_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, -torch.inf)
    return inside_NK, log_p_NV.masked_fill(inside_NV, -torch.inf).logsumexp(1)


def assert_exact(case: Case, answer: dict[str, Tensor]) -> None:
    """As exact as plain PyTorch, but for the rounding of the largest number on the way."""
    tensors, options = case
    truth = exact(case)
    plain = linear_logprobs(**tensors, **{key: value for key, value in options.items() if key != "chunk_tokens"}, impl="reference")
    assert answer.keys() == truth.keys() - {"all"}
    size = float(truth["logsumexp"].abs().max()) if len(truth["logsumexp"]) else 0.0
    for key, found in answer.items():
        if key == "topk_ids":
            # float32 may order neighbours otherwise, but each id once, and those that are as probable as the true ones
            assert (found.sort(1).values.diff(dim=1) > 0).all()
            found, expected = truth["all"].gather(1, found).float(), truth["topk_logprobs"]
            reference = truth["all"].gather(1, plain.topk_ids)
        else:
            assert found.dtype == torch.float32
            expected, reference = truth[key], getattr(plain, key)
        assert torch.equal(found.isneginf(), expected.isneginf()), key
        live = expected.isfinite()
        # the logits are as large as the logsumexp, or the cap
        floor = 4e-7 * (size + float(expected[live].abs().max()) + 1.0) if live.any() else 0.0
        error, plain_error = ((values.double() - expected)[live].abs().amax() if live.any() else 0.0 for values in (found, reference))
        assert error <= plain_error + floor, key


def assert_filled_up(ids_NK: Tensor) -> None:
    """Of "fewer logits than top-k": the three that there are, then the lowest other ids."""
    assert ids_NK[:, :3].sort().values.tolist() == [[3, 4, 400]] * 3
    assert ids_NK[:, 3:].tolist() == [[0, 1, 2, 5, 6, 7, 8, 9, 10]] * 3


TIED_K = (1, 300, 5000, 9001)


def assert_lower_first(ids_NK: Tensor) -> None:
    """Of `tied`: best first, of equal logits the lower id, and NaN keeps to the vocabulary."""
    k, z_NV = ids_NK.shape[1], tied()[:, :-16]
    assert torch.equal(ids_NK[:3], z_NV[:3].sort(dim=1, descending=True, stable=True).indices[:, :k])
    assert torch.equal(ids_NK[3:], torch.arange(k).expand(2, k))
