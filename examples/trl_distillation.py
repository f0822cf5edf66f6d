"""`linear_distill` in TRL's `DistillationTrainer`: one method replaced, everything else TRL's. Loss, time and memory before and after.

pip install trl datasets
python examples/trl_distillation.py
"""

import argparse
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

from bbopd import FullTeacher, linear_distill
from bbopd.evaluate.memory import peak_bytes, reset_peak


class FusedDistillationTrainer(DistillationTrainer):
    """TRL's trainer with the fused loss: generalised JSD over the completions, without logits of either model.

    TRL also logs the student's entropy, which needs every logit; here it is logged as 0.
    """

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask_N = inputs["completion_mask"].flatten().bool()
        kept = inputs["completion_ids"].size(1)
        hidden_ND = self._get_last_hidden_state(unwrapped_student, ids, attention_mask, kept).flatten(0, 1)[mask_N]
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        with torch.no_grad():
            teacher_hidden_ND = self._get_last_hidden_state(teacher, ids, attention_mask, kept).flatten(0, 1)[mask_N]
        out = linear_distill(
            hidden_ND,
            unwrapped_student.get_output_embeddings().weight,
            FullTeacher(hidden=teacher_hidden_ND, weight=teacher.get_output_embeddings().weight),
            divergence="jsd",
            beta=self.beta,
            temperature=self.temperature,
            t2_scaling=False,
            ce_weight=0.0,
            kd_weight=1.0,
            normalizer=num_items_in_batch,
        )
        return out.loss, hidden_ND.new_zeros(()), mask_N.sum()


class Timed:
    """Seconds and memory of the loss with its backward pass, which is all that differs: generation is left out."""

    seconds = 0.0
    most = 0
    losses: tuple[float, ...] = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)  # TRL writes the completions here
        device = next(model.parameters()).device
        reset_peak(device)
        at_first, started = peak_bytes(device) or 0, time.perf_counter()
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        self.seconds += time.perf_counter() - started
        self.most = max(self.most, (peak_bytes(device) or 0) - at_first)
        self.losses = (*self.losses, loss.item())
        return loss.detach()


class Before(Timed, DistillationTrainer):
    pass


class After(Timed, FusedDistillationTrainer):
    pass


def llama(vocabulary: int, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_key_value_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **ends, num_hidden_layers=layers, initializer_range=0.1))


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    known = {"<pad>": 0, "<end>": 1} | {f"w{index}": index for index in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def main(arguments: list[str] | None = None) -> dict[str, Timed]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args(arguments)
    prompts = Dataset.from_list([{"prompt": f"w{index} w{index + 1} w{index + 2}"} for index in range(2, 2 + args.sequences)])
    trained = {}
    for name, kind in (("before", Before), ("after", After)):
        with tempfile.TemporaryDirectory() as folder:
            settings = DistillationConfig(
                output_dir=folder,
                per_device_train_batch_size=args.sequences,
                gradient_accumulation_steps=1,
                gradient_checkpointing=False,
                max_completion_length=args.length,
                max_steps=args.steps,
                beta=0.5,
                bf16=False,
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            )
            student, teacher = llama(args.vocabulary, args.width, 2, seed=2), llama(args.vocabulary, 2 * args.width, 2, seed=1)
            trainer = kind(student, teacher, settings, train_dataset=prompts, processing_class=words(args.vocabulary))
            trainer.train()
        trained[name] = trainer
        first, last, spent = trainer.losses[0], trainer.losses[-1], trainer.seconds / len(trainer.losses)
        print(f"{name:6}  loss {first:.4f} -> {last:.4f}   {spent:.2f} s a step   {trainer.most / 2**20:,.0f} MiB beyond the start")
    return trained


if __name__ == "__main__":
    main()
