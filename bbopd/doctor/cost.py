"""What the run will take: disk, tokens, bytes, money and time, from one small cycle of it that is measured."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bbopd.data.assemble import Item, assemble, rollout_of, split_into_steps
from bbopd.data.streams import each
from bbopd.doctor.findings import SetUp, Verdict, passed, warned
from bbopd.errors import TeacherError
from bbopd.objectives import make_objective
from bbopd.pipeline.cycle import as_labelled
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.parts import Scores
from bbopd.pipeline.prompt_groups import PromptGroups
from bbopd.pipeline.student import bytes_beside, end_of_answer_ids
from bbopd.pipeline.teacher import text_teacher, writing_teacher
from bbopd.pipeline.texts import place_for_label
from bbopd.planning.tokens import Forecast, Lengths, Prices, forecast, mean, price
from bbopd.planning.words import in_words, size
from bbopd.rollouts.hf import HFEngine
from bbopd.rpc.answers import token_bytes
from bbopd.teachers.grades import render
from bbopd.trainer.checkpoint import require_space
from bbopd.trainer.step import Trainer
from bbopd.types import Rollout, Sampling, ScoredRollout, SignalSpec

__all__ = ["check_cost", "check_disk"]

_PROBE_SEQUENCES = 8
_PROBE_TOKENS = 128  # of an answer
_GIB = 2**30


# ------------------------------------------------------------ disk


async def check_disk(setup: SetUp) -> Verdict:
    """A folder without a finished run, with room for the checkpoints that are kept, and for the answers that a cache keeps."""
    assert setup.model is not None
    config = setup.config
    folder = RunFolder(Path(config.output))
    folder.refuse_finished()
    beside = bytes_beside(config, setup.model)
    require_space(folder.checkpoints, model=setup.model, keep=config.train.keep_checkpoints, beside=beside)
    free = _free_bytes(folder.checkpoints)
    found = f"{free / _GIB:,.1f} GiB free at {folder.root}, enough for {config.train.keep_checkpoints + 1} checkpoints"
    cache = config.teacher.cache
    if cache is None or setup.want is None or setup.prompts is None or setup.teacher is None:
        return passed(found)
    lengths = Lengths.of(config, setup.prompts, config.rollouts.max_new_tokens)
    asked = forecast(config, lengths).asked(setup.want, config)
    expected = asked.response_tokens * _bytes_per_token(setup)
    allowed = min(_free_bytes(Path(cache.path)), cache.max_bytes or math.inf)
    if expected <= allowed:
        return passed(f"{found}; answers kept by the cache take up to {expected / _GIB:,.2f} GiB")
    said = f"{found}; answers that the cache keeps may take {expected / _GIB:,.2f} GiB, and have {allowed / _GIB:,.2f} GiB"
    if cache.on_full == "stop":
        raise TeacherError(
            f"{said}, where the run would stop: make room, raise teacher.cache.max_bytes, or set teacher.cache.on_full=continue"
        )
    return warned(f"{said}: those beyond that are not kept; make room, raise teacher.cache.max_bytes, or ask for fewer ids (teacher.topk)")


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())).free


def _bytes_per_token(setup: SetUp) -> int:
    assert setup.teacher is not None
    assert setup.want is not None
    return token_bytes(setup.want, setup.teacher.info.vocab_size, setup.config.candidates)


# ------------------------------------------------------------ time and money


@dataclass(slots=True)
class _Measured:
    """Response tokens and seconds of what was measured; None where nothing was."""

    sampling: tuple[int, float] | None = None
    scoring: tuple[int, float] | None = None
    training: tuple[int, float] | None = None
    answer_tokens: float = 0.0

    def rates(self) -> dict[str, float]:
        pairs = {"sampling": self.sampling, "scoring": self.scoring, "training": self.training}
        return {name: pair[0] / max(1e-9, pair[1]) for name, pair in pairs.items() if pair is not None and pair[0]}


async def check_cost(setup: SetUp) -> Verdict:
    """One small cycle, measured the second time: how fast each part is, and what the whole run then takes."""
    assert setup.prompts is not None
    config = setup.config
    trainer = Trainer(
        setup.model,
        make_objective(config.objective),
        train=config.train,
        objective_config=config.objective,
        planned_steps=config.planned_steps,
        compute_dtype=setup.compute_dtype,  # type: ignore[arg-type]
        vocab_size=setup.vocab_size,
        activation_checkpointing=config.student.activation_checkpointing,
    )
    await _cycle(setup, trainer)  # what happens once, such as compiling, is not the run's pace
    measured = await _cycle(setup, trainer)
    rates = measured.rates()
    total = forecast(config, Lengths.of(config, setup.prompts, measured.answer_tokens or config.rollouts.max_new_tokens))
    asked = total if setup.want is None else total.asked(setup.want, config)
    seconds = {
        "sampling": total.written_tokens / rates["sampling"] if "sampling" in rates else 0.0,
        "scoring": asked.response_tokens / rates["scoring"] if "scoring" in rates else 0.0,
        "training": total.response_tokens / rates["training"] if "training" in rates else 0.0,
    }
    pace = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items())
    parts = [
        f"about {total.response_tokens:,.0f} tokens trained ({total.written_tokens:,.0f} of them written by the student)",
        f"{in_words(sum(seconds.values()))} without evaluation ({pace})",
    ]
    if "scoring" in rates:
        parts.append(f"{asked.sequence_tokens:,.0f} tokens scored, {size(asked.response_tokens * _bytes_per_token(setup))} of answers")
        assert setup.teacher is not None
        cost, currency = _money(setup, asked)
        parts.append(f"{cost:,.2f} {currency}".rstrip() if cost else "no price is known (teacher.prices)")
    said = "; ".join(parts)
    limit = config.teacher.budget.limit if config.teacher.budget is not None else math.inf
    if "scoring" in rates and cost > limit:
        return warned(
            f"{said}: more than teacher.budget.limit {limit:,.2f}, where the run would stop with a checkpoint; raise it, or train less"
        )
    if setup.want is not None and "scoring" not in rates:
        return warned(f"{said}; scoring was left out, as the longest sequences have no room at the teacher")
    if config.writes_rollouts and "sampling" not in rates:
        return warned(f"{said}; how fast {config.rollouts.engine} samples is seen in the run: watch its first cycles")
    return passed(said)


def _money(setup: SetUp, total: Forecast) -> tuple[float, str]:
    """What the teacher will cost, and in which currency; 0 where no price is known."""
    assert setup.teacher is not None
    info, config = setup.teacher.info, setup.config
    given, grading, asked = config.teacher.prices, config.teacher.grading, 0
    own = info.price_per_million_tokens
    prices = Prices(own, own, info.currency) if given is None else Prices(given.prompt, given.answer, given.currency)
    if grading is not None and config.objective.judges_groups:
        assert setup.tokenizer is not None
        asked = len(setup.tokenizer(render(grading, "", "", None))["input_ids"])
    return price(config, total, prices, rubric_tokens=asked), prices.currency


async def _cycle(setup: SetUp, trainer: Trainer) -> _Measured:
    config, measured = setup.config, _Measured()
    assert setup.prompts is not None
    items: list[Item] = []
    if config.writes_rollouts and config.rollouts.engine == "hf":
        items.extend(await _write(setup, measured))
    if config.rollouts_per_cycle < config.rollouts.per_update or not items:
        assert setup.eos_token_id is not None
        prompts = map(place_for_label(config, setup.eos_token_id), setup.prompts.to_train)
        labelled = list(islice((prompt for prompt in prompts if prompt.reference_ids), _PROBE_SEQUENCES))
        known = [as_labelled(prompt, draw=len(items) + number) for number, prompt in enumerate(labelled)]
        if config.teacher.writes_labels and setup.teacher is not None and setup.has_room and setup.tokenizer is not None:
            writer = writing_teacher(config, setup.teacher, setup.tokenizer, shares_ids=setup.vocab_size is not None)
            known = [scored.rollout async for scored in writer.score(each(known), SignalSpec("text"))]
        items.extend(known)
    if setup.teacher is not None and setup.want is not None and setup.has_room:
        asked: Scores = setup.aligning or setup.teacher
        if setup.want.level == "text":
            assert setup.tokenizer is not None
            assert setup.model is not None
            assert setup.compute_dtype is not None
            heard = text_teacher(
                config,
                setup.teacher,
                setup.tokenizer,
                shares_ids=setup.vocab_size is not None,
                model=setup.model,
                compute_dtype=setup.compute_dtype,
                vocab_size=setup.vocab_size,
            )
            asked = heard.scores
        unasked = [item for item in items if setup.want.rollouts_only and rollout_of(item).is_labelled]
        questions = [item for item in items if isinstance(item, Rollout) and not (setup.want.rollouts_only and item.is_labelled)]
        choose = setup.chooser()
        questions = questions if choose is None else choose(questions)
        started = time.perf_counter()
        answers = asked.score(each(questions), setup.want)
        scored = [one async for one in answers if isinstance(one, ScoredRollout)]
        measured.scoring = (sum(len(one.rollout) for one in scored), time.perf_counter() - started)
        items = [*scored, *unasked]
    if setup.want is not None and setup.want.level == "text" and items and not config.writes_rollouts:
        measured.answer_tokens = mean([len(rollout_of(item)) for item in items])
    if items:
        measured.training = await asyncio.to_thread(_train, setup, trainer, items)
    return measured


async def _write(setup: SetUp, measured: _Measured) -> list[Rollout]:
    assert setup.prompts is not None
    assert setup.model is not None
    assert setup.tokenizer is not None
    rollouts = setup.config.rollouts
    stop_ids = end_of_answer_ids(setup.model, setup.tokenizer)
    engine = HFEngine(
        setup.model, eos_token_ids=stop_ids, pad_token_id=stop_ids[0], vocab_size=setup.vocab_size, compute_dtype=setup.compute_dtype
    )
    longest = min(rollouts.max_new_tokens, _PROBE_TOKENS)
    sampling = Sampling(longest, temperature=rollouts.temperature, top_p=rollouts.top_p, top_k=rollouts.top_k, seed=setup.config.train.seed)
    by_group = setup.config.objective.judges_groups
    samples = rollouts.samples_per_prompt if by_group else 1
    distinct = setup.prompts.to_train[: max(1, min(_PROBE_SEQUENCES, setup.config.rollouts_per_cycle) // samples)]
    questions = [prompt for prompt in distinct for _ in range(samples)]
    groups = PromptGroups(questions, by_group=by_group)
    started = time.perf_counter()
    written = [rollout async for rollout in engine.generate(each(questions), sampling)]
    measured.sampling = (sum(map(len, written)), time.perf_counter() - started)
    measured.answer_tokens = mean([rollouts.max_new_tokens if one.finish_reason == "length" else len(one) for one in written])
    return [ready for rollout in written for ready in groups.accept(rollout)]


def _train(setup: SetUp, trainer: Trainer, items: list[Item]) -> tuple[int, float]:
    """One pass over ``items``; nothing of what it does to the weights is kept."""
    train = setup.config.train
    started = time.perf_counter()
    steps = split_into_steps(items, train.batch_tokens, train.micro_batch_tokens, train.max_seq_len)
    tokens = sum(trainer.train_step([assemble(batch, setup.want) for batch in step]).tokens for step in steps)
    return tokens, time.perf_counter() - started
