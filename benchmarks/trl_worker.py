"""A process of TRL's trainer for `benchmarks.end_to_end`; writes ``seconds`` and ``tokens`` of each update, an object a line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Updates(TrainerCallback):
    """Writes each update down as its figures are logged: from there to the next lies one whole update."""

    def __init__(self, path: Path, sequences: int) -> None:
        self._path, self._sequences = path, sequences
        self._since = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._since = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        if not logs or "completions/mean_length" not in logs:
            return
        now = time.perf_counter()
        line = {"seconds": now - self._since, "tokens": logs["completions/mean_length"] * self._sequences}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._since = now


def main() -> None:
    request = json.loads(sys.argv[1])
    folder, output = Path(request["folder"]), Path(request["output"])
    config = DistillationConfig(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=request["sequences"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_steps=request["updates"],
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **request["settings"],
    )
    teacher_dtype = {"dtype": "bfloat16"} if config.bf16 else {"dtype": "float32"}
    config.teacher_model_init_kwargs = teacher_dtype
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = DistillationTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=[Updates(output / "updates.jsonl", request["sequences"])],
    )
    trainer.train()


if __name__ == "__main__":
    main()
