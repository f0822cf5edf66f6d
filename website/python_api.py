"""Pages of the Python interface: which names they show. mkdocstrings writes the rest of the docstrings."""

from __future__ import annotations

from typing import NamedTuple


class ApiPage(NamedTuple):
    """A page: its file, title, what it is for, and the names on it."""

    page: str
    title: str
    about: str
    names: tuple[str, ...]


PAGES = (
    ApiPage(
        "ops",
        "The two ops",
        "Everything that a trainer of your own needs. All of it is imported from `bbopd` itself: `from bbopd import linear_distill`.",
        (
            *("bbopd.ops.linear_distill", "bbopd.ops.linear_logprobs", "bbopd.op_types.DistillLoss", "bbopd.op_types.TokenLogprobs"),
            *(
                "bbopd.op_types.FullTeacher",
                "bbopd.op_types.TopKTeacher",
                "bbopd.op_types.CandidateTeacher",
                "bbopd.op_types.SampledTeacher",
            ),
        ),
    ),
    ApiPage(
        "teacher",
        "A teacher of your own",
        "What `bbopd.rpc.run_server.serve` hosts: two methods and a description. `examples/my_teacher.py` is a whole one.",
        (
            *("bbopd.rpc.backend.TeacherBackend", "bbopd.rpc.run_server.serve", "bbopd.rpc.signals.signal_from_logits"),
            *("bbopd.types.TeacherInfo", "bbopd.types.Offer", "bbopd.types.SignalSpec", "bbopd.types.TeacherSignal"),
            *("bbopd.types.Sampling", "bbopd.types.Completion"),
        ),
    ),
    ApiPage(
        "nouns",
        "What passes through a run",
        "Frozen dataclasses and protocols, from prompt to batch.",
        (
            *("bbopd.types.Prompt", "bbopd.types.Rollout", "bbopd.types.ScoredRollout", "bbopd.types.Unscored", "bbopd.types.Group"),
            *("bbopd.types.Reward", "bbopd.types.DistillBatch", "bbopd.types.Teacher", "bbopd.types.RolloutEngine", "bbopd.types.Judge"),
        ),
    ),
    ApiPage(
        "errors",
        "Errors",
        "Each is a `BbopdError`, and its message says what was wrong, with which value, and what to do.",
        ("bbopd.errors",),
    ),
)


def api_page(page: ApiPage) -> str:
    """A page in Markdown, with a directive of mkdocstrings for each name."""
    return "\n".join([f"# {page.title}", "", page.about, "", *(f"::: {name}\n" for name in page.names)])
