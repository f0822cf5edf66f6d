"""The parts of a run, opened as the run opens them: tokenizer, prompts, student, teacher, and what is asked of it."""

from __future__ import annotations

import asyncio
import importlib.util

from bbopd.config import SelfConfig
from bbopd.data.prompts import PromptSet
from bbopd.data.text_checks import text_checks
from bbopd.doctor.findings import SetUp, Verdict, passed, warned
from bbopd.errors import DataError, EngineError
from bbopd.modeling import compute_dtype, load_tokenizer, plain_sizes
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.pipeline.parts import at_once
from bbopd.pipeline.plugged import open_plugged_teacher, record_of
from bbopd.pipeline.preflight import check_candidates
from bbopd.pipeline.progress import Silent
from bbopd.pipeline.student import check_positions, end_of_text, load_student
from bbopd.pipeline.teacher import load_teacher_tokenizer, open_api, open_budget, own_teacher, start_teacher
from bbopd.pipeline.texts import check_labels, read_prompts
from bbopd.types import Teacher

__all__ = ["check_plugins", "check_prompts", "check_signal", "check_student", "check_teacher", "check_tokenizer"]

_ANY_LENGTH = 2**31


async def check_tokenizer(setup: SetUp) -> Verdict:
    """The student's tokenizer loads, ends its texts, and can format messages where there are any."""
    student = setup.config.student
    tokenizer = await asyncio.to_thread(
        load_tokenizer, student.model, revision=student.revision, trust_remote_code=student.trust_remote_code
    )
    setup.tokenizer = tokenizer
    setup.eos_token_id = end_of_text(tokenizer)
    begins = (
        f"begins with {tokenizer.bos_token}" if tokenizer.bos_token_id in tokenizer("a")["input_ids"] else "begins with nothing of its own"
    )
    known = f"{len(tokenizer):,} tokens; a text ends with {tokenizer.eos_token} ({setup.eos_token_id}) and {begins}"
    if tokenizer.chat_template is None:
        return warned(
            f"{known}; it has no chat template, so that data with messages is refused: give prompts as text, or take the student's "
            "instruction-tuned version"
        )
    return passed(f"{known}; it has a chat template")


async def check_plugins(setup: SetUp) -> Verdict:
    """What other packages bring can be imported, and takes its options."""
    found = [f"{one['name']} of {one['package']} {one['version']}" for one in record_of(setup.config)]
    make_objective(setup.config.objective)
    return passed(", ".join(found) or "none")


async def check_prompts(setup: SetUp) -> Verdict:
    """Prompts can be read and drawn, and rollouts filtered; where prompts are too long, how many of them."""
    config = setup.config
    text_checks(config.data.filters)
    assert setup.tokenizer is not None
    try:
        prompts = await asyncio.to_thread(read_prompts, config, setup.tokenizer)
    except DataError as error:
        share = await asyncio.to_thread(_too_long, setup)
        raise DataError(f"{error}{share}") from error
    setup.prompts = prompts
    check_labels(config, prompts)
    every = prompts.known
    lengths = sorted(len(prompt.token_ids) for prompt in every)
    labelled = sum(prompt.reference_ids is not None for prompt in prompts.to_train)
    flows = ", ".join(flow.source.name for flow in prompts.flows)
    found = (
        f"{len(prompts.to_train):,} to train on ({labelled:,} with a known continuation) and {len(prompts.held_out):,} held out, "
        f"{lengths[0]}-{lengths[-1]} tokens, half of them up to {lengths[len(lengths) // 2]}"
    )
    if flows:
        found += f"; of {flows} these are the first, more are read as they are drawn"
    if prompts.skipped:
        found += f"; left out: {', '.join(f'{reason} {count:,}' for reason, count in sorted(prompts.skipped.items()))}"
    drawn = -(-config.rollouts_per_cycle // config.rollouts.samples_per_prompt)
    if drawn > len(prompts.train) and not flows:
        return warned(
            f"{found}; a cycle draws {drawn} of them, so that some come twice in it: add data, or raise rollouts.samples_per_prompt"
        )
    return passed(found)


def _too_long(setup: SetUp) -> str:
    """How large a share of the prompts leaves no room for an answer; nothing where the data cannot be read at all."""
    config = setup.config
    boundless = config.model_copy(update={"train": config.train.model_copy(update={"max_seq_len": _ANY_LENGTH})})
    try:
        prompts: PromptSet = read_prompts(boundless, setup.tokenizer)
    except DataError:
        return ""
    room = config.train.max_seq_len - config.rollouts.max_new_tokens
    every = prompts.known
    count = sum(len(prompt.token_ids) > room for prompt in every)
    return f" ({count:,} of {len(every):,} prompts, {count / len(every):.0%}, have more than {room} tokens)" if count else ""


async def check_student(setup: SetUp) -> Verdict:
    """The student loads, its longest sequence has a place, and its rollout engine is there."""
    config = setup.config
    model = await asyncio.to_thread(load_student, config.student, config.train.seed, config.train.deterministic)
    dtype = compute_dtype(config.student.dtype, model.device)
    if setup.prompts is not None:
        check_positions(config, model, setup.prompts)
    is_beside = config.rollouts.engine == "vllm" and not config.rollouts.is_elsewhere
    if is_beside and config.writes_rollouts and importlib.util.find_spec("vllm") is None:
        raise EngineError("rollouts.engine is vllm, which is not installed here: see docs/rollouts.md, or set rollouts.engine=hf")
    setup.model, setup.compute_dtype = model, dtype
    millions = sum(plain_sizes(model)) / 1e6
    return passed(
        f"{type(model).__name__}, {millions:,.2f} M parameters on {model.device}, computing in {str(dtype).removeprefix('torch.')}; "
        f"rollouts by {config.rollouts.engine}"
    )


async def check_teacher(setup: SetUp) -> Verdict:
    """Every replica answers, and says that it is the same teacher."""
    config = setup.config
    if config.teacher.self is not None:
        return _own_teacher(setup, config.teacher.self)
    teacher: Teacher | None
    teacher, _ = await start_teacher(config.teacher, setup.scratch, setup.stack, Silent())
    if config.teacher.is_api or config.teacher.plugin is not None:
        if setup.model is None or setup.tokenizer is None:
            return Verdict("skip", "this teacher is asked about the student's tokens: needs the student")
        theirs = load_teacher_tokenizer(config)
        rows = setup.model.get_input_embeddings().weight.shape[0]
        spoken, count = (setup.tokenizer, rows) if theirs is None else (theirs[0], len(theirs[0]))
        if config.teacher.plugin is not None:
            teacher = await open_plugged_teacher(config.teacher, spoken, count, setup.stack, Silent())
        else:
            budget = open_budget(config.teacher, None, setup.scratch, setup.stack)
            teacher = await open_api(config.teacher, spoken, count, budget, setup.stack, Silent())
    if teacher is None:
        return Verdict("skip", "the run has none")
    setup.teacher = teacher
    info = teacher.info
    offers = ", ".join(
        offer.level
        + (f" (up to {offer.max_top_k})" if offer.max_top_k else "")
        + (f" at T = {offer.temperature_min:g}" if offer.temperature_min == offer.temperature_max and offer.level != "full" else "")
        for offer in info.offers
    )
    count = max(1, len(config.teacher.targets))
    who = f"{info.model}, {count} {'replica' if count == 1 else 'replicas'}; offers {offers}"
    if config.teacher.cache is not None and not (info.revision or info.weights_version):
        return warned(
            f"{who}; it names no revision, so that answers kept from other weights under this name would be taken for its own: "
            "name one where it is served, or take a new teacher.cache.path"
        )
    return passed(who)


def _own_teacher(setup: SetUp, own: SelfConfig) -> Verdict:
    """The student's own weights need no asking who they are: what they read is looked at."""
    if setup.model is None or setup.tokenizer is None or setup.prompts is None or setup.compute_dtype is None:
        return Verdict("skip", "the student's own weights: needs the student and its prompts")
    config, prompts = setup.config, setup.prompts.known
    teacher = own_teacher(own, setup.model, setup.tokenizer, compute_dtype=setup.compute_dtype, run=at_once)
    longest = max(config.rollouts.max_new_tokens, config.eval.max_new_tokens)
    most = teacher.check_prompts(prompts, max_new_tokens=longest)
    whose = "own weights" if own.weights == "student" else f"averaged weights (decay {own.ema_decay:g})"
    objective = make_objective(config.objective)
    want = signal_for(objective, config.teacher)
    if want is not None:
        check_offer(objective, teacher.info, want)
    return passed(f"the student's {whose}, which read up to {most:,} tokens, the answer included; what that takes is not in the cost below")


async def check_signal(setup: SetUp) -> Verdict:
    """The teacher offers what the objective asks for, at the temperature that it asks for."""
    config = setup.config
    assert setup.teacher is not None
    setup.objective = make_objective(config.objective)
    want = signal_for(setup.objective, config.teacher)
    if want is None:
        return Verdict("skip", f"objective {config.objective.name} asks no teacher")
    check_offer(setup.objective, setup.teacher.info, want)
    check_candidates(setup.teacher.info, config.candidates)
    setup.want = want
    offer = setup.teacher.info.offer(want.level)
    assert offer is not None, "the objective has checked it"
    asked = f"{config.objective.name} at T = {config.objective.temperature:g} asks for {want.level}" + (
        f" {config.teacher.topk}" if want.level in ("candidates", "topk") else ""
    )
    if want.level in ("candidates", "topk") and offer.tail != "exact":
        return warned(
            f"{asked}; the teacher's tail is {offer.tail}, not summed from all its logits: the mass outside the ids is as exact as its "
            "logprobs are; a teacher of your own behind `bbopd serve` sums it"
        )
    return passed(asked)
