"""Markdown tables from the CSV files, and the plots: ``python -m benchmarks.report`` makes them again without measuring."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from benchmarks import rates
from benchmarks.contest import ROOT
from benchmarks.plots import plot_sweeps
from benchmarks.records import Record, read, write

RESULTS = ROOT / "benchmarks" / "results"

TITLES = {"distill": "linear_distill", "logprobs": "linear_logprobs", "training_step": "One training step"}
TITLES |= {f"gpu_{script}": f"{TITLES[script]} on a GPU" for script in ("distill", "logprobs")}
OBJECTIVES = {
    "topk": "Forward KL to a top-64 teacher with its tail at T = 2, and cross-entropy",
    "topk_float32": "Forward KL to a top-64 teacher with its tail at T = 2, and cross-entropy, with float32 inputs",
    "ce": "Cross-entropy alone",
    "full_forward": "Forward KL to full float16 teacher logits at T = 2, and cross-entropy",
    "full_reverse": "Reverse KL to full float16 teacher logits at T = 1, and cross-entropy",
    "hidden_forward": "Forward KL at T = 2 to a teacher given as hidden states and head, and cross-entropy; the floor makes its logits too",
    "sampled": "Reverse KL by policy gradient, one token of the teacher's at each place, T = 1",
    "topk_frozen": "The top-64 teacher with the head frozen: no dW, in the floor either",
    "full_jsd": "JSD to full float16 teacher logits at T = 1, and cross-entropy",
    "sweep_V": "Top-64 teacher, against the vocabulary",
    "sweep_N": "Top-64 teacher, against the tokens",
    "logprobs": "Top 64, tail and sampled token",
    "training_step": "2,048 tokens as 2 sequences of 1,024, forward and backward",
}
ERROR_HEADINGS = {
    "distill": ("gradient error", "gradient error at KL 5e-5"),
    "logprobs": ("largest error, nats", ""),
    "training_step": ("", ""),
}
ERROR_HEADINGS |= {f"gpu_{script}": ERROR_HEADINGS[script] for script in ("distill", "logprobs")}
HOW_ON_CPU = (
    "Medians of interleaved rounds; ratios to the floor of the same rounds. Memory is the peak beyond inputs and gradients, in a fresh "
    "process. Errors are against float64, on at most 256 tokens and 8,192 entries."
)
HOW_ON_GPU = (
    "Medians of interleaved rounds, by the device's events, with L2 flushed before each step; ratios to the floor of the same rounds. "
    "Memory is the allocator's peak beyond inputs and gradients. GB/s: the least bytes that the passes over the logits must move, by the "
    "time of the row kernels alone. Errors are against float64, on 256 tokens and the whole vocabulary."
)


def publish(script: str, records: list[Record], results: Path = RESULTS) -> None:
    """Put one case's records into ``<machine>/<script>.csv`` below ``results``, in place of its earlier ones; then the table and plots."""
    path = results / records[0].machine / f"{script}.csv"
    write(path, merge(read(path) if path.exists() else [], records))
    remake(path)


def merge(old: list[Record], new: list[Record]) -> list[Record]:
    """One case's new records where its old ones were, or at the end."""
    keys = [record.case for record in old]
    at = keys.index(new[0].case) if new[0].case in keys else len(old)
    return [*old[:at], *new, *(record for record in old[at:] if record.case != new[0].case)]


def remake(path: Path) -> None:
    """The table, and the plots where the file has a sweep, from a CSV file alone."""
    if path.stem in rates.SCRIPTS:
        rates.remake(path)
        return
    records = read(path)
    path.with_suffix(".md").write_text(markdown(path.stem, records))
    plot_sweeps(records, path.parent)


def markdown(script: str, records: list[Record]) -> str:
    """Tables of one script: one for each objective and size, in the order measured."""
    first, is_gpu = records[0], script.startswith("gpu_")
    lines = [
        f"# {TITLES[script]}",
        "",
        _machine(first),
        "",
        HOW_ON_GPU if is_gpu else HOW_ON_CPU,
    ]
    for _, group in groupby(records, lambda record: record.case):
        rows = list(group)
        one = rows[0]
        lines += ["", f"## {one.model}: N = {one.N:,}, D = {one.D:,}, V = {one.V:,}, {one.dtype}", "", f"{OBJECTIVES[one.objective]}.", ""]
        lines += [*_table(rows, *ERROR_HEADINGS[script], is_gpu), "", f"{one.rounds} rounds, {one.date}: `{one.command}`"]
    return "\n".join(lines) + "\n"


def _machine(record: Record) -> str:
    versions = f"PyTorch {record.torch}, Python {record.python}."
    if record.driver:
        return (
            f"{record.processor}, {record.instruction_sets}, {record.cores} multiprocessors; driver {record.driver}. "
            f"Triton {record.triton}, {versions}"
        )
    return f"{record.processor}, {record.cores} cores, {record.threads} threads; instruction sets: {record.instruction_sets}. {versions}"


def _table(records: Iterable[Record], error: str, near_error: str, is_gpu: bool) -> list[str]:
    headings = ["", "median, ms", "ratio", *(("of the floor's speed", "GB/s") if is_gpu else ()), "memory, MiB"]
    headings += [*filter(None, (error, near_error)), "note"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 2) + "---|"]
    for record in records:
        cells = [record.contestant, _number(record.median_ms, ",.2f" if is_gpu else ",.1f"), _number(record.ratio, ".2f")]
        if is_gpu:
            cells += [_number(1 / record.ratio if record.ratio else None, ".0%"), _number(record.row_gigabytes_per_second, ",.0f")]
        cells.append(_number(record.memory_mib, ",.0f"))
        for heading, value in ((error, record.error), (near_error, record.near_error)):
            if heading:
                cells.append(_number(value, ".2e" if "nats" in heading else ".2%"))
        cells.append(f"skipped: {record.skipped}" if record.skipped else record.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def main() -> None:
    for path in sorted(RESULTS.glob("*/*.csv")):
        if path.stem in TITLES or path.stem in rates.SCRIPTS:  # others are published by their own programs
            remake(path)
            print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
