"""A plan as lines for a person to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bbopd.planning.machine import GIB
from bbopd.planning.memory import Part
from bbopd.planning.plan import Plan
from bbopd.planning.remedies import Remedy
from bbopd.planning.scaling import ScalePoint
from bbopd.planning.words import in_words, size

__all__ = ["break_line", "plan_lines", "scale_line", "scale_title"]

_WHEN = {"always": "", "training": "while training", "sampling": "while sampling"}


def plan_lines(plan: Plan, remedies: Sequence[Remedy]) -> Iterator[str]:
    """Memory, tokens, time, traffic, money and disk; then whether it fits, and what would make it."""
    yield from _heading(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _tokens(plan)
    yield from _time(plan)
    yield ""
    yield from _teacher(plan)
    yield _disk(plan)
    yield ""
    yield from _verdict(plan, remedies)


def _heading(plan: Plan) -> Iterator[str]:
    student, machine = plan.shapes.student, plan.machine
    trained = "" if student.trained == student.parameters else f", {student.trained / 1e6:,.1f} M of adapters trained"
    memory = "" if machine.gpu_bytes is None else f" of {machine.gpu_bytes / GIB:,.0f} GiB"
    yield f"student   {student.name}: {student.parameters / 1e9:,.2f} B parameters, {student.layers} layers{trained}"
    if plan.shapes.teacher is not None:
        yield f"teacher   {plan.shapes.teacher.name}: {plan.shapes.teacher.parameters / 1e9:,.2f} B parameters"
    named = "" if machine.gpu is None else f" {machine.gpu.name}"
    yield f"machine   {machine.gpus}{named} GPU{'s' if machine.gpus > 1 else ''}{memory}"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield "memory of one GPU, GiB"
    yield from (_part(part) for part in memory.parts)
    if plan.shapes.activations is None:
        yield f"  {'activations':18s} {'?':>8}  not known of this architecture, and not in the sums below"
    yield f"  {'while training':18s} {memory.of('training') / GIB:8.2f}"
    if memory.of("sampling") != memory.of("training"):
        yield f"  {'while sampling':18s} {memory.of('sampling') / GIB:8.2f}"
    if memory.host:
        yield f"  {'host, loading':18s} {memory.host / GIB:8.2f}  of a node's own memory: rank 0 reads the student whole"
    yield f"  {'logits not there':18s} {memory.absent / GIB:8.2f}  what one float32 tensor of tokens x vocabulary would have taken"


def _part(part: Part) -> str:
    why = "; ".join(text for text in (part.why, _WHEN[part.phase]) if text)
    return f"  {part.name:18s} {part.size / GIB:8.2f}  {why}"


def _tokens(plan: Plan) -> Iterator[str]:
    cycle, total = plan.cycle, plan.total
    yield (
        f"cycle     {cycle.sequences} sequences, {cycle.rollouts} of them written by the student: {cycle.written:,.0f} tokens written, "
        f"{cycle.scored:,.0f} scored, {cycle.trained:,.0f} trained in {cycle.steps} updates"
    )
    yield f"run       {plan.updates:,.0f} updates, {total.response_tokens:,.0f} tokens trained, {total.written_tokens:,.0f} of them written"


def _time(plan: Plan) -> Iterator[str]:
    pace, rates = plan.pace, plan.rates
    if pace is None or rates is None:
        yield "time      not known: give --rates, --from, --measure or --gpu"
        return
    if pace.seconds:
        stages = ", ".join(f"{stage} {in_words(seconds)}" for stage, seconds in pace.seconds.items())
        how = "side by side" if pace.overlaps else "in turn"
        yield f"time      {in_words(pace.update)} an update, {in_words(pace.cycle)} a cycle, {how}: {stages} (rates: {rates.source})"
        yield f"          slowest: {pace.bottleneck}; the run without evaluation: {in_words(plan.seconds or 0.0)}"
    if pace.unknown:
        yield f"          not known, and left out: {', '.join(pace.unknown)} (--rates or --from says how fast)"


def _teacher(plan: Plan) -> Iterator[str]:
    if not plan.questions:
        yield "teacher   none is asked"
        return
    cost = "no price is known (teacher.prices)" if plan.cost is None else f"{plan.cost:,.2f} {plan.currency}"
    yield f"teacher   {size(plan.questions)} of questions, {size(plan.answers)} of answers; {cost}"
    budget = plan.config.teacher.budget
    if budget is not None and plan.cost is not None and plan.cost > budget.limit:
        yield f"          more than teacher.budget.limit {budget.limit:,.2f}, where the run would stop: raise it, or train less"


def _disk(plan: Plan) -> str:
    kept = plan.config.train.keep_checkpoints
    cache = f", and {size(plan.cache)} of answers in the cache" if plan.cache else ""
    return f"disk      {size(plan.disk)}: {kept} checkpoints of {size(plan.checkpoint)}, one being written, and the model{cache}"


def _verdict(plan: Plan, remedies: Sequence[Remedy]) -> Iterator[str]:
    if plan.machine.gpu_bytes is None:
        yield "fits      not known: give --gpu or --gpu-memory"
        return
    if not plan.problems:
        yield "fits      yes"
        return
    yield f"fits      no: {'; '.join(plan.problems)}"
    for remedy in remedies:
        yield f"          {remedy.words}: {remedy.plan.memory.peak / GIB:,.1f} GiB ({remedy.costs})"
    if not remedies:
        yield "          nothing tried here makes it fit: take a smaller student, or GPUs with more memory"


_COLUMNS = (
    "GPUs",
    "sampling",
    "sequences",
    "s/update",
    "tokens/s",
    "efficiency",
    "training",
    "slots",
    "traffic",
    "push",
    "goodput",
    "driver",
)


def scale_title() -> str:
    return "  ".join(f"{title:>10}" for title in _COLUMNS)


def scale_line(point: ScalePoint) -> str:
    """A row below `scale_title`."""
    figures = [
        f"{point.gpus:,}",
        f"{point.sampling_gpus:,.1f}",
        f"{point.sequences:,}",
        f"{point.update_seconds:,.2f}",
        f"{point.tokens_per_second:,.0f}",
        *(f"{share:.1%}" for share in (point.efficiency, point.training_busy, point.slots_busy)),
        *(f"{share:.2%}" for share in (point.exposed_traffic, point.push_share, point.goodput, point.driver)),
    ]
    return "  ".join(f"{figure:>10}" for figure in figures)


def break_line(point: ScalePoint | None) -> str:
    """Where it stops being linear, and what the trainer waits for there."""
    if point is None:
        return "linear    all the way: nine tenths of the first row's tokens a second and GPU, or more"
    reasons = sorted(point.waits.items(), key=lambda wait: -wait[1])
    waits = ", ".join(f"{reason} {share:.0%}" for reason, share in reasons) or "never"
    least = f"a GPU has {point.efficiency:.0%} of the first row's tokens a second"
    return f"linear    until before {point.gpus:,} GPUs, where {least}; the trainer waits: {waits}"
