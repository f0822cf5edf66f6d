"""Distillation in a loop of plain PyTorch, before and after `linear_distill`: the same loss and gradients, its time, and its memory.

python examples/plain_pytorch.py
python examples/plain_pytorch.py --vocabulary 128256 --width 1024 --device cuda
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

from bbopd import FullTeacher, linear_distill
from bbopd.evaluate.memory import peak_bytes, reset_peak

CE_WEIGHT, KD_WEIGHT, T = 0.1, 0.9, 2.0


class TinyLM(nn.Module):
    """A causal transformer whose forward gives hidden states; the head is applied by the loss."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids_BL.shape[1], device=ids_BL.device)
        return self.body(self.embedding(ids_BL), mask=mask, is_causal=True)


def loss_before(hidden_ND, head, teacher_hidden_ND, teacher_head, labels_N, tokens):
    """As most loops have it: logits of both models, softmax after softmax, each a tensor of tokens x vocabulary."""
    logits_NV = head(hidden_ND).float()
    with torch.no_grad():
        teacher_NV = teacher_head(teacher_hidden_ND).float()
    ce = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    kd = F.kl_div(F.log_softmax(logits_NV / T, -1), F.log_softmax(teacher_NV / T, -1), reduction="sum", log_target=True)
    return (CE_WEIGHT * ce + KD_WEIGHT * T**2 * kd) / tokens


def loss_after(hidden_ND, head, teacher_hidden_ND, teacher_head, labels_N, tokens):
    """The same number. ``normalizer`` is the token count of the whole step, so that micro-batches add up to its mean."""
    teacher = FullTeacher(hidden=teacher_hidden_ND, weight=teacher_head.weight)
    settings = {"temperature": T, "ce_weight": CE_WEIGHT, "kd_weight": KD_WEIGHT, "normalizer": (tokens, tokens)}
    return linear_distill(hidden_ND, head.weight, teacher, labels_N, **settings).loss


def train(student, teacher, batches, loss_of, micro_batches=2):
    """One optimizer step a batch, in micro-batches; returns losses, seconds a step (the first left out), bytes at most beyond the start."""
    device = student.head.weight.device
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses, seconds, most = [], [], 0
    for ids_BL in batches:
        reset_peak(device)
        at_first, started = peak_bytes(device) or 0, time.perf_counter()
        tokens, total = ids_BL[:, 1:].numel(), 0.0
        for part_BL in ids_BL.chunk(micro_batches):
            with torch.no_grad():
                teacher_hidden_ND = teacher(part_BL[:, :-1]).flatten(0, 1)
            hidden_ND = student(part_BL[:, :-1]).flatten(0, 1)
            loss = loss_of(hidden_ND, student.head, teacher_hidden_ND, teacher.head, part_BL[:, 1:].flatten(), tokens)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        seconds.append(time.perf_counter() - started)
        most = max(most, (peak_bytes(device) or 0) - at_first)
    return losses, sum(seconds[1:]) / max(1, len(seconds) - 1), most


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[float], float, int]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    teacher = TinyLM(args.vocabulary, 2 * args.width, layers=2).to(args.device).eval()
    student = TinyLM(args.vocabulary, args.width, layers=1).to(args.device)
    batches = [torch.randint(args.vocabulary, (args.sequences, args.length + 1), device=args.device)] * args.steps  # one, again and again
    found = {}
    for name, loss_of in (("before", loss_before), ("after", loss_after)):
        found[name] = train(copy.deepcopy(student), teacher, batches, loss_of)
        losses, seconds, most = found[name]
        print(f"{name:6}  loss {losses[0]:.4f} -> {losses[-1]:.4f}   {seconds:.2f} s a step   {most / 2**20:,.0f} MiB beyond the start")
    return found


if __name__ == "__main__":
    main()
