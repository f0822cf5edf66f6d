"""What a person sees while a run goes on: a live panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bbopd.pipeline.progress import Budget

PHASES = {"cold_start": "cold start on labelled text", "on_policy": "on-policy distillation", "labelled": "training on labelled text"}


def make_display(console: Console, *, plain: bool) -> LiveDisplay | PlainDisplay:
    return PlainDisplay(console) if plain or not console.is_terminal else LiveDisplay(console)


class _Speed:
    """Tokens a second and the time left of the current phase, from the last steps of this process."""

    def __init__(self) -> None:
        self._phase = ""
        self._points: list[tuple[float, int]] = []

    def update(self, budget: Budget) -> tuple[float | None, float | None]:
        """(tokens/s, seconds left); None until two steps of the phase are known."""
        if budget.phase != self._phase:
            self._phase, self._points = budget.phase, []
        self._points = [*self._points[-11:], (time.monotonic(), budget.done)]
        (start, first), (end, last) = self._points[0], self._points[-1]
        if last <= first or end <= start:
            return None, None
        speed = (last - first) / (end - start)
        return speed, max(0, budget.total - budget.done) / speed


class PlainDisplay:
    """A line for every step, every evaluation and every change of activity that takes long."""

    _SPOKEN = ("loading", "evaluation", "saving")

    def __init__(self, console: Console) -> None:
        self._console = console
        self._speed = _Speed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def activity(self, name: str, detail: str = "") -> None:
        if name in self._SPOKEN:
            self._print(f"{name} {detail}".rstrip() + " ...")

    def advance(self, metrics: Mapping[str, Any], budget: Budget) -> None:
        speed, left = self._speed.update(budget)
        self._print(
            f"step {budget.step:4d}  {budget.phase:10s}  {budget.done:,}/{budget.total:,} tokens  {describe_losses(metrics)}"
            f"  elapsed {clock(budget.elapsed)}"
            + (f"  {speed:.0f} tokens/s, about {clock(left)} left" if speed and left is not None else "")
        )

    def evaluated(self, result: Mapping[str, Any]) -> None:
        self._print(f"evaluated ({result['stage']}, step {result['step']}): {describe_evaluation(result)}")

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
        sys.stdout.flush()


class LiveDisplay:
    """One panel that renews itself: phase and activity, tokens against budget, loss parts, speed, time left, evaluations."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._speed = _Speed()
        self._activity = "starting"
        self._budget: Budget | None = None
        self._metrics: Mapping[str, Any] = {}
        self._pace: tuple[float | None, float | None] = (None, None)
        self._evaluations: list[Mapping[str, Any]] = []
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def activity(self, name: str, detail: str = "") -> None:
        self._activity = f"{name} {detail}".rstrip()

    def advance(self, metrics: Mapping[str, Any], budget: Budget) -> None:
        self._metrics, self._budget = metrics, budget
        self._pace = self._speed.update(budget)

    def evaluated(self, result: Mapping[str, Any]) -> None:
        self._evaluations.append(result)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _render(self) -> Panel:
        budget = self._budget
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column()
        rows.add_row("phase", PHASES[budget.phase] if budget else "getting ready")
        rows.add_row("now", self._activity)
        if budget is not None:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(
                ProgressBar(total=max(1, budget.total), completed=min(budget.done, budget.total), width=30),
                f"{budget.done:,} of {budget.total:,} tokens",
            )
            rows.add_row("budget", bar)
            rows.add_row("step", f"{budget.step} of about {budget.planned_steps}")
            rows.add_row("update", describe_losses(self._metrics))
            speed, left = self._pace
            pace = f"{speed:.0f} tokens/s, about {clock(left)} left in this phase" if speed and left is not None else "measuring"
            rows.add_row("speed", f"{pace}; {clock(budget.elapsed)} so far")
        lines = [Text(f"{result['stage']:>10}: {describe_evaluation(result)}", style="cyan") for result in self._evaluations[-4:]]
        return Panel(
            Group(rows, *lines),
            title="bbopd",
            subtitle="Ctrl-C stops with a checkpoint",
            border_style="blue",
            width=min(110, self._console.width),
        )


def describe_losses(metrics: Mapping[str, Any]) -> str:
    return (
        f"loss {metrics['loss']:.3f} (ce {metrics['ce']:.3f}, kd {metrics['kd']:.3f})  lr {metrics['lr']:.2e}  "
        f"grad norm {metrics['grad_norm']:.2f}" + (f"  cost {metrics['teacher_cost']:.4g}" if "teacher_cost" in metrics else "")
    )


def describe_evaluation(result: Mapping[str, Any]) -> str:
    known = (
        ("bits/byte", "bits_per_byte"),
        ("KL held-out", "kl_held_out"),
        ("KL rollouts", "kl_rollouts"),
        ("top-1 held-out", "top1_held_out"),
    )
    of_tasks = [(key, key) for key in result if "." in key]
    return ", ".join(f"{title} {result[key]:.3f}" for title, key in (*known, *of_tasks) if result.get(key) is not None)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
