"""The card of a trained model: README.md beside its weights, as model hubs read it, from the files of the run that trained it.

A card is for others, so paths of this machine are shortened to their last names in it; the run's own folder has them whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bbopd.config import FiltersConfig
from bbopd.errors import BbopdError
from bbopd.report.load import Line, RunData, is_on_hub, load_run, short_name
from bbopd.report.table import KL_NOTE, STAGE_TITLES, Measure, measures_of, split_key, updates_line

_NORMAL_95 = 1.96  # standard errors to either side
_FOLDERS = ("model", "adapter", "best")


def write_model_cards(run_dir: str | Path) -> list[Path]:
    """Write README.md beside every model that a run has left: ``model/``, ``adapter/``, ``best/``, whichever are there.

    Raises `DataError` where the folder holds no run, `BbopdError` where a card cannot be written.
    """
    data, root = load_run(run_dir), Path(run_dir)
    written = []
    for folder in (root / name for name in _FOLDERS):
        if not folder.is_dir():
            continue
        path = folder / "README.md"
        try:
            path.write_text(model_card(data, folder), encoding="utf-8")
        except OSError as error:
            raise BbopdError(f"cannot write {path}: {error.strerror or error}") from error
        written.append(path)
    return written


def model_card(data: RunData, folder: Path) -> str:
    """The card of the model in ``folder``: metadata for a hub, then what a person should know."""
    config: Mapping[str, Any] = data.about("config") or {}
    chosen = _chosen(folder)
    stages = _stages(data, chosen)
    sections = [
        f"# {data.name}" + (" (adapter)" if _is_adapter(folder) else ""),
        _what_it_is(data, config, chosen),
        "## How to load\n\n" + _loading(data, folder),
        "## Evaluation\n\n" + _evaluation(stages),
        "## Training data\n\n" + _training_data(data, config),
        "## Teacher\n\n" + _teacher(data, config),
        "## Recipe\n\n" + _table(("setting", "value"), _recipe(data, config)),
        "## Limits\n\n" + "\n".join(f"* {limit}" for limit in _limits(data, config, stages)),
        "## How to repeat it\n\n" + _repeating(data, config),
    ]
    return f"---\n{_metadata(data, config, folder, stages)}---\n\n" + "\n\n".join(sections) + "\n"


# ------------------------------------------------------------ metadata


def _metadata(data: RunData, config: Mapping[str, Any], folder: Path, stages: Sequence[tuple[str, Line]]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    student = str((config.get("student") or {}).get("model", ""))
    sources = (config.get("data") or {}).get("prompts") or ()
    last = stages[-1][1] if stages else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=split_key(measure.key)[0] or "held-out",
            dataset_name=split_key(measure.key)[0] or "the held-out part of the run's own data",
            metric_type=split_key(measure.key)[1],
            metric_name=measure.title,
            metric_value=last[measure.key],
        )
        for measure in measures_of([last])
    ]
    return (
        str(
            ModelCardData(
                model_name=data.name,
                base_model=student if is_on_hub(student) else None,
                datasets=[str(source["dataset"]) for source in sources if source.get("dataset")] or None,
                library_name="peft" if _is_adapter(folder) else "transformers",
                pipeline_tag="text-generation",
                tags=["bbopd", "distillation", str((config.get("objective") or {}).get("name", "")).replace("_", "-") or "distilled"],
                eval_results=results or None,
            ).to_yaml()
        ).rstrip("\n")
        + "\n"
    )


# ------------------------------------------------------------ sections


def _what_it_is(data: RunData, config: Mapping[str, Any], chosen: Line | None) -> str:
    student = short_name((config.get("student") or {}).get("model", "a model"))
    layers = ((config.get("student") or {}).get("init") or {}).get("keep_layers")
    start = f"`{student}`" + (f", of which {len(layers)} layers were kept," if layers else "")
    teacher = _teacher_name(data, config)
    learned = f"learned from the teacher `{teacher}`" if teacher else "learned from labelled text, without a teacher"
    which = ""
    if chosen is not None:
        which = f" These are the weights of step {chosen['step']}, the best by `{chosen['measure']}` ({chosen['value']:.4g})."
    unfinished = "" if data.status == "finished" else f" The run did not finish ({data.status})."
    return f"{start} {learned} by bbopd, a toolkit for black-box, on-policy distillation.{which}{unfinished}"


def _loading(data: RunData, folder: Path) -> str:
    place = f"{data.name}/{folder.name}"
    if _is_adapter(folder):
        return (
            "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{place}")\ntokenizer = AutoTokenizer.from_pretrained("{place}")\n```'
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}")\ntokenizer = AutoTokenizer.from_pretrained("{place}")\n```'
    )


def _evaluation(stages: Sequence[tuple[str, Line]]) -> str:
    rows = [
        (measure.title, *(_with_interval(line, measure) for _, line in stages), measure.unit)
        for measure in measures_of(line for _, line in stages)
    ]
    if not rows:
        return "No evaluation was finished."
    tokens = stages[-1][1].get("tokens") or {}
    counts = ", ".join(f"{count:,} tokens of {name.replace('_', ' ')}" for name, count in tokens.items())
    note = f"In brackets 95% intervals, with sequences as clusters. {KL_NOTE}." + (f" Measured on {counts}." if counts else "")
    return _table(("measure", *(title for title, _ in stages), "unit"), rows) + f"\n\n{note}"


def _training_data(data: RunData, config: Mapping[str, Any]) -> str:
    about = config.get("data") or {}
    lines = []
    for source in about.get("prompts") or ():
        kind = next((name for name in ("dataset", "jsonl", "parquet", "text") if source.get(name)), "demo")
        named = "the text that Python itself carries" if kind == "demo" else f"`{short_name(source[kind])}`"
        more = [f"{key} {source[key]}" for key in ("subset", "split", "limit", "weight") if kind == "dataset" and source.get(key)]
        lines.append(f"* {kind}: {named}" + (f" ({', '.join(more)})" if more else ""))
    held_out = about.get("held_out")
    if held_out:
        lines.append(f"* {held_out:.0%} of the documents were held out for evaluation")
    fingerprint = data.about("data_sha256")
    if fingerprint:
        lines.append(f"* SHA-256 of the prompts: `{fingerprint}`")
    counts = data.summary.get("sequences") or {}
    if counts:
        lines.append("* sequences: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    rejected = data.summary.get("rejected") or {}
    if rejected:
        lines.append("* rejected: " + ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in sorted(rejected.items())))
    if updates := updates_line(data):
        lines.append(f"* updates: {updates}")
    return "\n".join(lines) or "Not recorded."


def _teacher(data: RunData, config: Mapping[str, Any]) -> str:
    about = config.get("teacher") or {}
    name = _teacher_name(data, config)
    if not name:
        return "None: the student learned from labelled text alone."
    asked = {"full": "its whole distribution", "topk": f"its {about.get('topk')} most likely tokens and the mass of the rest"}
    signal = str(about.get("signal"))
    told = asked.get(signal, {"candidates": "its logprobs at tokens that the student chose", "text": "text"}.get(signal, signal))
    lines = [f"`{name}`, asked from outside for {told} at every token." if signal != "text" else f"`{name}`, asked for text alone."]
    cost = data.summary.get("teacher_cost")
    if cost and (cost["paid"] or cost["reserved"]):
        lines.append(f"It cost {cost['paid'] + cost['reserved']:.4g} {cost['currency']} in {cost['requests']:,} requests.")
    return " ".join(lines)


def _recipe(data: RunData, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    student, objective, rollouts, train = (config.get(key) or {} for key in ("student", "objective", "rollouts", "train"))
    last = data.metrics[-1] if data.metrics else {}
    lora = student.get("lora")
    rows = [
        ("objective", objective.get("name")),
        ("temperature of the loss", objective.get("temperature")),
        ("alpha (weight of cross-entropy)", objective.get("alpha")),
        ("trained weights", f"LoRA of rank {lora['rank']}" if lora else "all"),
        ("learning rate", f"{train['lr']:g}, {train.get('schedule')}" if "lr" in train else None),
        ("optimizer steps", last.get("step")),
        ("response tokens trained", f"{last['trained_tokens']:,}" if "trained_tokens" in last else None),
        ("of these, the student's own", f"{last['on_policy_tokens']:,}" if "on_policy_tokens" in last else None),
        ("tokens a step, about", train.get("batch_tokens")),
        ("longest sequence trained", train.get("max_seq_len")),
        ("share of rollouts", rollouts.get("on_policy_fraction")),
        ("sampling of rollouts", f"{rollouts.get('engine')}, temperature {rollouts.get('temperature')}" if rollouts else None),
        ("longest rollout", rollouts.get("max_new_tokens")),
        ("largest staleness, in cycles", rollouts.get("max_staleness")),
        ("seed", train.get("seed")),
        ("filters", _filters((config.get("data") or {}).get("filters") or {})),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _filters(given: Mapping[str, Any]) -> str:
    usual = FiltersConfig().model_dump(mode="json")
    changed = [f"{key} {json.dumps(short_name(value))}" for key, value in given.items() if usual.get(key, value) != value]
    return "the usual ones" + (f", and {', '.join(changed)}" if changed else "")


def _limits(data: RunData, config: Mapping[str, Any], stages: Sequence[tuple[str, Line]]) -> list[str]:
    teacher = _teacher_name(data, config)
    last = stages[-1][1] if stages else {}
    sequences = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in (last.get("sequences") or {}).items())
    tasks = list(dict.fromkeys(split_key(key)[0] for key in last if "." in key))
    longest = (config.get("train") or {}).get("max_seq_len")
    limits = [
        "The figures above say how near the student came to its teacher, and how well it predicts text, on the run's own held-out data"
        + (f" ({sequences})" if sequences else "")
        + (f", and how it does on {_listed(tasks)}" if tasks else "")
        + "; they say nothing of other tasks, and are of a single seed.",
        "Nothing was tested for safety, bias, or the truth of what the model claims.",
    ]
    if teacher:
        limits.append(f"It takes over the errors and habits of `{teacher}`.")
    if longest:
        limits.append(f"No sequence longer than {longest:,} tokens was trained.")
    if last.get("kl_is_bucketed"):
        limits.append("The KL figures take what is outside the teacher's top tokens as one: they are lower bounds.")
    limits.append("The licences of base model, teacher and data apply; this card grants none.")
    return limits


def _repeating(data: RunData, config: Mapping[str, Any]) -> str:
    machine = data.about("machine") or {}
    source = data.about("source") or {}
    command = " ".join(short_name(word) for word in str(data.about("command") or "").split())
    versions = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
    lines = [f"```\n{command}\n```" if command else ""]
    lines.append(
        f"On {machine.get('cores', '?')} cores of {machine.get('processor') or 'an unknown processor'}, begun {data.about('started')}."
    )
    lines.append(f"Versions: {versions}." if versions else "")
    changed = source.get("changed_files")
    lines.append(
        f"Source: commit `{source['commit']}`" + (f" and {changed} changed files." if changed else ".") if source.get("commit") else ""
    )
    resolved = yaml.safe_dump(_shortened(config), sort_keys=False, allow_unicode=True)
    lines.append(f"<details><summary>Configuration, resolved</summary>\n\n```yaml\n{resolved}```\n\n</details>")
    return "\n\n".join(filter(None, lines))


# ------------------------------------------------------------ pieces


def _chosen(folder: Path) -> Line | None:
    """By what a model that was kept for its evaluation was chosen."""
    try:
        about: Line = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about


def _stages(data: RunData, chosen: Line | None) -> list[tuple[str, Line]]:
    """The evaluations to show, by title: as the report does, or, for a model chosen by one, the start and that one."""
    if chosen is None:
        return [(STAGE_TITLES.get(str(line.get("stage")), f"step {line.get('step')}"), line) for line in data.stages]
    own = [line for line in data.evals if line.get("step") == chosen["step"] and line.get("stage") == chosen["stage"]]
    start = [line for line in data.evals if line.get("stage") == "start" and line not in own]
    return [("start", line) for line in start[:1]] + [(f"step {chosen['step']}", line) for line in own[-1:]]


def _with_interval(line: Line, measure: Measure) -> str:
    value = line.get(measure.key)
    if value is None:
        return ""
    form = "{:.1%}" if measure.is_share else "{:.3f}"
    error = (line.get("standard_errors") or {}).get(measure.key)
    if error is None:
        return form.format(value)
    return f"{form.format(value)} ({form.format(value - _NORMAL_95 * error)} to {form.format(value + _NORMAL_95 * error)})"


def _teacher_name(data: RunData, config: Mapping[str, Any]) -> str:
    about = config.get("teacher") or {}
    if about.get("signal") in (None, "none"):
        return ""
    known = (data.summary.get("teacher") or {}).get("model") or (about.get("serve") or {}).get("model")
    return str(short_name(known or "a served model whose name is not recorded"))


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _shortened(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    return short_name(value)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
