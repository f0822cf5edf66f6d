"""One run from the first second to the last: session, loop, evaluation, Ctrl-C, and what is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bbopd.cli.display import LiveDisplay, PlainDisplay, make_display
from bbopd.config import RunConfig
from bbopd.data.draws import left_out
from bbopd.errors import BbopdError, BudgetSpentError
from bbopd.evaluate.agreement import signal_to_measure
from bbopd.evaluate.bits_per_byte import token_byte_counts
from bbopd.evaluate.held_out_game import HeldOutGame
from bbopd.evaluate.samples import RunSamples, read_samples
from bbopd.evaluate.suite import KEPT_BYTES, EvalSuite
from bbopd.evaluate.training_tasks import TrainingTasks, load_run_tasks
from bbopd.modeling import plain_sizes
from bbopd.pipeline.best import BestModel
from bbopd.pipeline.cycle import sampling_of
from bbopd.pipeline.energy import EnergyMeter
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.loop import Loop
from bbopd.pipeline.metrics import RunMetrics
from bbopd.pipeline.session import Session, open_session
from bbopd.pipeline.timing import Timeline
from bbopd.pipeline.trackers import open_trackers, tracked_run
from bbopd.report.html import write_report
from bbopd.report.model_card import write_model_cards
from bbopd.report.table import plain_lines, result_table, speed_table
from bbopd.types import TeacherInfo

if TYPE_CHECKING:
    from bbopd.trainer.ranks import Ranks

INTERRUPTED = 130


def execute(
    config: RunConfig, *, plain: bool = False, as_json: bool = False, sample_prompts: Sequence[str] = (), ranks: Ranks | None = None
) -> int:
    """Run ``config`` to its end, or on from where it stopped; returns the exit status.

    ``sample_prompts`` are answered by the student before, the student after and the teacher. ``ranks`` train with this process, which is
    the first of them. ``as_json``: ``summary.json`` on the output stream, all else on the error stream. Raises `BbopdError`.
    """
    console = Console(stderr=as_json)
    try:
        with make_display(console, plain=plain) as display:
            status = asyncio.run(_run(config, display, sample_prompts, ranks))
    except BudgetSpentError:
        if RunFolder(Path(config.output)).read_json("summary.json") is not None:
            write_report(config.output)
        raise
    folder = RunFolder(Path(config.output))
    report = write_report(folder.root)
    write_model_cards(folder.root)
    if status == "stopped":
        console.print(
            f"stopped, with everything kept in {folder.root}; the same command goes on from there", highlight=False, soft_wrap=True
        )
        return INTERRUPTED
    if as_json:
        print(json.dumps(folder.read_json("summary.json")))
        return 0
    _print_result(console, folder, report, plain=plain or not console.is_terminal)
    return 0


async def _run(config: RunConfig, display: LiveDisplay | PlainDisplay, sample_prompts: Sequence[str], ranks: Ranks | None) -> str:
    stop = asyncio.Event()
    timeline = Timeline()
    tasks = load_run_tasks(config.eval.tasks, config.eval.keep_best)
    with _stop_on_signals(stop, display):
        async with AsyncExitStack() as stack:
            with timeline.activity("loading"):
                opened = open_session(config, command=shlex.join(sys.argv), progress=display, ranks=ranks)
                opening = stack.enter_async_context(opened)
                session = await _or_stop(opening, stop)
            if session is None:
                return "stopped"
            asked = TrainingTasks(tasks, session, stack, display)
            return await _turn(session, display, timeline, stop, sample_prompts, asked)


async def _turn(
    session: Session,
    display: LiveDisplay | PlainDisplay,
    timeline: Timeline,
    stop: asyncio.Event,
    sample_prompts: Sequence[str],
    tasks: TrainingTasks,
) -> str:
    config, folder, state = session.config, session.folder, session.state
    timeline.carry_on(state.seconds, state.busy_seconds)
    known = folder.read_json("run.json")
    trackers = open_trackers(config.track, tracked_run(folder.root, known["started"], known["config"]), config.plugins)
    metrics = RunMetrics(folder, from_step=state.step, trackers=trackers, note=display.note)
    measured = session.teacher
    if measured is not None and signal_to_measure(measured.info) is None:
        display.note(f"teacher {measured.info.model} gives neither full nor topk: how far they agree is not measured")
        measured = None
    suite = EvalSuite(
        session.prompts.held_out,
        config.eval,
        byte_counts_V=token_byte_counts(session.tokenizer),
        engine=session.parts.engine,
        teacher=measured,
        compute_dtype=session.compute_dtype,
        vocab_size=session.vocab_size,
        kept_bytes=KEPT_BYTES if config.teacher.self is None else 0,  # own weights change, and what they say of held-out text
    )

    samples = RunSamples(session, sample_prompts, display.note)
    game = _held_out_game(session)
    best = None if config.eval.keep_best is None else BestModel(folder.root, config.eval.keep_best, session.write_model)

    async def evaluate(stage: str, step: int) -> Mapping[str, Any]:
        if stage == "start":
            await samples.write("before")
        result = (await suite.run(stage, session.model, step)).to_json()
        for figures in (await tasks.measure(with_latency=stage == "end"), {} if game is None else await game.measure()):
            errors = figures.pop("standard_errors", {})
            result |= {**figures, "standard_errors": {**result["standard_errors"], **errors}}
        if best is not None:
            best.offer(result)
        if stage == "end":
            await samples.write("after")
        return result

    loop = Loop(config, session.parts, state, metrics=metrics, timeline=timeline, progress=display, evaluate=evaluate, stop=stop)
    status, error, model_path = "failed", "", None
    try:
        status = await loop.run()
        if status == "finished":
            with timeline.activity("saving"):
                model_path = session.save_model()
    except BbopdError as caught:
        status, error = "stopped" if isinstance(caught, BudgetSpentError) else "failed", str(caught)
        raise
    finally:
        metrics.trace(timeline.to_json())
        metrics.close()
        folder.require()
        folder.write_json("summary.json", _summary(session, loop, metrics, timeline, status, error, model_path))
    return status


def _summary(
    session: Session, loop: Loop, metrics: RunMetrics, timeline: Timeline, status: str, error: str, model_path: Path | None
) -> dict[str, Any]:
    state, folder = loop.state, session.folder
    seconds = {name: round(value, 2) for name, value in timeline.seconds().items()}
    busy = {name: round(value, 2) for name, value in timeline.busy_seconds().items()}
    known = folder.read_json("run.json")
    tokens = {"sampling": state.sampled_tokens, "scoring": state.scored_tokens, "training": state.trained_tokens}
    return {
        "status": status,
        "error": error,
        "model_path": None if model_path is None else str(model_path),
        "parameters": sum(plain_sizes(session.model)),
        "seconds": seconds,
        "busy_seconds": busy,
        "tokens": {"sampled": state.sampled_tokens, "scored": state.scored_tokens, "trained": state.trained_tokens},
        "tokens_per_second": {name: round(count / busy[name], 1) for name, count in tokens.items() if count and busy.get(name)},
        "sequences": state.sequences(),
        "rejected": state.rejected,
        "bad_updates": state.bad_updates,
        "skipped_tokens": state.skipped_tokens,
        "rolled_back": {"updates": state.rolled_back_updates, "sequences": state.rolled_back, "tokens": state.rolled_back_tokens},
        "left_out": left_out(state.position),
        "teacher_retries": state.teacher_retries,
        "teacher_cache": None if session.parts.cache_counts is None else dict(session.parts.cache_counts),
        "teacher_cost": None if session.parts.spending is None else asdict(session.parts.spending()),
        "energy": _energy(metrics.energy),
        "teacher": None if session.teacher_info is None else _teacher(session.teacher_info),
        "samples": read_samples(folder),
        "plugins": known.get("plugins", []),
        "restarts": (folder.read_json("cluster.json") or {}).get("restarts"),
        **{key: known[key] for key in ("started", "machine", "config", "command", "source")},
    }


def _energy(meter: EnergyMeter) -> dict[str, Any] | None:
    joules = meter.joules()
    return None if joules is None else {"joules": round(joules, 1), "covers": meter.covers}


def _teacher(info: TeacherInfo) -> dict[str, Any]:
    return {"model": info.model, "revision": info.revision, "vocab_size": info.vocab_size, "vocab_sha256": info.vocab_sha256}


def _held_out_game(session: Session) -> HeldOutGame | None:
    if session.adversary is None:
        return None
    config, tokenizer = session.config, session.tokenizer
    return HeldOutGame(
        session.prompts.held_out,
        config.eval.rollouts,
        engine=session.parts.engine,
        teacher=session.adversary.teacher,
        discriminator=session.adversary.discriminator,
        sampling=sampling_of(config, 0),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        judge=session.judge,
    )


# ------------------------------------------------------------ stopping


@contextmanager
def _stop_on_signals(stop: asyncio.Event, display: LiveDisplay | PlainDisplay) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for a clean stop; the second ends the process at once, the last checkpoint standing."""
    loop = asyncio.get_running_loop()
    heard = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            display.__exit__(None, None, None)  # the terminal's cursor comes back
            os._exit(INTERRUPTED)
        heard = True
        display.note("stopping after what is under way, with a checkpoint; Ctrl-C again stops at once")
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _or_stop(opening: Awaitable[Session], stop: asyncio.Event) -> Session | None:
    """What ``opening`` gives, or None where a stop request came first."""
    task = asyncio.ensure_future(opening)
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    return task.result()


# ------------------------------------------------------------ the last words


def _print_result(console: Console, folder: RunFolder, report: Path, *, plain: bool) -> None:
    console.print()
    if plain:
        for line in plain_lines(folder.root):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    else:
        for table in (result_table(folder.root), speed_table(folder.root)):
            console.print(table)
    for sample in read_samples(folder)[:1]:
        console.print(f"\nprompt           {sample['prompt']}", highlight=False, markup=False)
        for title, key in (("student, before", "before"), ("student, after", "after"), ("teacher", "teacher")):
            if sample[key] is not None:
                text = " ".join(str(sample[key]).split())
                console.print(f"{title:16s} {text}", highlight=False, markup=False)
    console.print(f"\nmodel   {folder.root / 'model'}", highlight=False, soft_wrap=True)
    console.print(f"report  {report}", highlight=False, soft_wrap=True)
