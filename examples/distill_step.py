"""On-policy distillation by hand: the student writes, the teacher says what it thinks of it, one fused loss. Runs in seconds, on a CPU.

python examples/distill_step.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bbopd import TopKTeacher, linear_distill, linear_logprobs


def tiny_llama(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, initializer_range=0.1, bos_token_id=0, eos_token_id=None))


def main(steps: int = 30) -> list[float]:
    teacher, student = tiny_llama(4, seed=1).eval(), tiny_llama(2, seed=2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        # 1. the student answers 16 prompts of 4 tokens: 12 new tokens each, from its whole distribution
        prompts = torch.randint(1, 512, (16, 4))
        rollouts = student.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=True, top_k=0, pad_token_id=0
        )
        # 2. the teacher's best 256 ids for every token that the student wrote, with the mass of all the others
        with torch.no_grad():
            hidden = teacher.model(rollouts).last_hidden_state[:, 3:-1].flatten(0, 1)
            scored = linear_logprobs(hidden, teacher.lm_head.weight, top_k=256)
        signal = TopKTeacher(scored.topk_ids, scored.topk_logprobs, scored.log_tail)
        # 3. the loss from the student's hidden states and its head: no [tokens, vocabulary] tensor, here or in backward
        hidden = student.model(rollouts).last_hidden_state[:, 3:-1].flatten(0, 1)
        out = linear_distill(hidden, student.lm_head.weight, signal, kd_weight=1.0)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        if step % 5 == 0 or step == steps - 1:
            tail = out.metrics["teacher_tail_mass"].item()
            print(f"step {step:2d}: KL(teacher || student) {losses[-1]:.3f} nats, teacher's mass outside its ids {tail:.2f}")
    return losses


if __name__ == "__main__":
    main()
