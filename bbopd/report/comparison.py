"""Several runs on one page: what each came to, their curves laid over each other, what they say, and in what they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from bbopd.errors import DataError
from bbopd.report.answers import compared_answers
from bbopd.report.charts import MOST_CURVES, overlaid_charts
from bbopd.report.html import duration, in_a_sentence, repeating, spending
from bbopd.report.load import RunData
from bbopd.report.page import SectionOf, figures, flatten, folded, quiet, table, whole_page
from bbopd.report.standings import of_runs
from bbopd.report.table import KL_NOTE, end_row, measures_of
from bbopd.report.tradeoffs import NOTE, letters, task_section

_SAME_FOR_ALL = ("output",)  # differs always, and means nothing


def render_comparison(runs: Sequence[RunData]) -> str:
    """The whole page. Every text that comes from the runs is escaped. Raises `DataError` where there are more runs than colours."""
    if len(runs) > MOST_CURVES:
        raise DataError(f"{len(runs)} runs have no colours of their own on one page, which has {MOST_CURVES}: give fewer of them")
    keys = [f"series-{index + 1}" for index in range(len(runs))]
    names = [run.name for run in runs]
    legend = "".join(
        f'<span class="key" style="background:var(--{key})"></span>{escape(name)} &nbsp; ' for key, name in zip(keys, names, strict=True)
    )
    head = f"<h1>{len(runs)} distillation runs</h1>" + "".join(
        f'<p><span class="key" style="background:var(--{key})"></span><strong>{escape(run.name)}</strong> ({escape(run.status)}). '
        f"{escape(in_a_sentence(run))}</p>"
        for key, run in zip(keys, runs, strict=True)
    )
    drawings = figures(overlaid_charts(runs), kind="charts")
    sections = [
        SectionOf("What they came to", table(("", *names), _rows(runs), keys=keys) + quiet(_NOTE)),
        SectionOf("Tasks, and what they cost", _tasks(runs)),
        SectionOf("What differs between them", _differences(runs, keys)),
        SectionOf("Curves", drawings and f'<p class="legend">{legend}</p>{drawings}'),
        SectionOf("The same prompts, answered", compared_answers(runs)),
        SectionOf("How to repeat them", "".join(folded(run.name, repeating(run)) for run in runs)),
    ]
    return whole_page(f"bbopd: {', '.join(names)}", head, sections)


_NOTE = (
    f"Figures are those of each run's last evaluation, ± a standard error with sequences as clusters. {KL_NOTE}. Two figures whose "
    "intervals overlap may well be the same: bbopd compare tests differences over several seeds."
)


def _rows(runs: Sequence[RunData]) -> list[tuple[str, ...]]:
    measures = measures_of(run.stages[-1] for run in runs if run.stages)
    rows: list[tuple[str, ...]] = [(measure.title, *(end_row(run, measure) for run in runs)) for measure in measures]
    rows.append(("Status", *(run.status for run in runs)))
    rows.append(("Response tokens trained", *(f"{run.trained_tokens[-1]:,}" if run.metrics else "" for run in runs)))
    rows.append(("of rollouts", *(f"{run.metrics[-1].get('on_policy_tokens', 0):,}" if run.metrics else "" for run in runs)))
    rows.append(("Optimizer steps", *(f"{run.metrics[-1].get('step', 0):,}" if run.metrics else "" for run in runs)))
    rows.append(("Time", *(_time(run.summary) for run in runs)))
    by_run = [dict(spending(run)) for run in runs]
    for name in dict.fromkeys(name for lines in by_run for name in lines):
        rows.append((name, *(lines.get(name, "") for lines in by_run)))
    return rows


def _tasks(runs: Sequence[RunData]) -> str:
    standings = of_runs(runs)
    tasks = dict.fromkeys(standing.task for standing in standings)
    names = letters([run.name for run in runs])
    bodies = [f"<h3>{escape(task)}</h3>" + task_section([one for one in standings if one.task == task], names) for task in tasks]
    return "".join(bodies) + quiet(f"{NOTE}.") if bodies else ""


def _time(summary: Mapping[str, Mapping[str, float]]) -> str:
    seconds = sum(float(value) for value in (summary.get("seconds") or {}).values())
    return duration(seconds) if seconds else ""


def _differences(runs: Sequence[RunData], keys: Sequence[str]) -> str:
    """Settings that are not the same everywhere, and versions and sources likewise."""
    flat = [
        dict(
            flatten(
                {
                    **(run.about("config") or {}),
                    "data": {**((run.about("config") or {}).get("data") or {}), "sha256": str(run.about("data_sha256") or "")[:12]},
                    "versions": (run.about("machine") or {}).get("versions") or {},
                    "source": run.about("source") or {},
                },
                separator=".",
            )
        )
        for run in runs
    ]
    names = [name for name in dict.fromkeys(name for settings in flat for name in settings) if name not in _SAME_FOR_ALL]
    rows = [
        (name, *(settings.get(name, "") for settings in flat)) for name in names if len({settings.get(name, "") for settings in flat}) > 1
    ]
    return table(("", *(run.name for run in runs)), rows, keys=keys) if rows else quiet("Nothing but their folders.")
