"""`linear_distill` in a loop over FSDP2, as torchtitan has it: the head is gathered once, inside the forward pass that FSDP wraps.

torchrun --nproc-per-node 2 examples/fsdp_loop.py
torchrun --nproc-per-node 2 examples/fsdp_loop.py --loss before         # whole logits in place of it, to compare
"""

import argparse
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from bbopd import FullTeacher, linear_distill
from bbopd.evaluate.memory import peak_bytes, reset_peak


class Distilled(nn.Module):
    """A student with its loss. FSDP gathers the root's parameters, the head among them, for the forward pass of the root: this one."""

    def __init__(self, student: nn.Module, loss: str) -> None:
        super().__init__()
        self.student, self.loss = student, loss

    def forward(self, ids_BL, labels_N, teacher_hidden_ND, teacher_weight_VD, normalizer):
        hidden_ND = self.student.model(ids_BL).last_hidden_state.flatten(0, 1)
        weight_VD = self.student.lm_head.weight
        if self.loss == "after":
            teacher = FullTeacher(hidden=teacher_hidden_ND, weight=teacher_weight_VD)
            return linear_distill(hidden_ND, weight_VD, teacher, labels_N, normalizer=normalizer).loss
        log_q_NV = F.log_softmax((hidden_ND @ weight_VD.T).float(), -1)
        with torch.no_grad():
            log_p_NV = F.log_softmax((teacher_hidden_ND @ teacher_weight_VD.T).float(), -1)
        ce = F.nll_loss(log_q_NV, labels_N, reduction="sum") / normalizer[0]
        return 0.5 * ce + 0.5 * F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True) / normalizer[1]


def llama(vocabulary: int, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, num_hidden_layers=layers, initializer_range=0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", default="after", choices=("before", "after"))
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=8, help="of each rank")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device.type, (world,))

    teacher = llama(args.vocabulary, 2 * args.width, 2, seed=1).to(device).eval()
    model = Distilled(llama(args.vocabulary, args.width, 2, seed=2).to(device), args.loss)
    for layer in model.student.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in (*model.student.model.layers, model):
        module.set_gradient_divide_factor(1.0)  # the normalizer divides already: gradients are added up over the ranks
        module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    torch.manual_seed(0)
    batches = [torch.randint(args.vocabulary, (world * args.sequences, args.length + 1))] * args.steps  # one, again and again
    losses, seconds, most = [], [], 0
    for batch_BL in batches:
        ids_BL = batch_BL.chunk(world)[rank].to(device)
        reset_peak(device)
        at_first, started = peak_bytes(device) or 0, time.perf_counter()
        with torch.no_grad():
            teacher_hidden_ND = teacher.model(ids_BL[:, :-1]).last_hidden_state.flatten(0, 1)
        tokens = torch.tensor(float(ids_BL[:, 1:].numel()), device=device)
        dist.all_reduce(tokens)  # of all ranks: with a mean of means, a rank with short texts would count too much
        normalizer = (tokens.item(), tokens.item())
        loss = model(ids_BL[:, :-1], ids_BL[:, 1:].flatten(), teacher_hidden_ND, teacher.lm_head.weight.detach(), normalizer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        seconds.append(time.perf_counter() - started)
        most = max(most, (peak_bytes(device) or 0) - at_first)
    if rank == 0:
        mean = sum(seconds[1:]) / max(1, len(seconds) - 1)
        print(f"{args.loss:6}  loss {losses[0]:.4f} -> {losses[-1]:.4f}   {mean:.2f} s a step   {most / 2**20:,.0f} MiB beyond the start")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
