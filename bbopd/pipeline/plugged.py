"""What a run tells the plug-ins that take part in it, how they begin and end, and what is kept on record of them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbopd.config import RunConfig, TeacherConfig
from bbopd.errors import BbopdError, ConfigError, EngineError, TeacherError
from bbopd.pipeline.progress import Progress
from bbopd.plugins import PluginUse
from bbopd.types import RolloutEngine, Teacher, TeacherInfo

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EngineSetting:
    """What an engine that is a plug-in is made of."""

    model: PreTrainedModel
    """The trainer's. An engine writes with weights of its own: it may copy this model, but not write with it."""
    compute_dtype: torch.dtype
    vocab_size: int
    """Ids that are tokens; none beyond them may be sampled."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end an answer."""
    max_sequence_tokens: int
    """Of the longest sequence, prompt and answer together."""
    folder: Path
    """The run's."""


@dataclass(frozen=True, slots=True)
class TeacherSetting:
    """What a teacher that is a plug-in is made of."""

    config: TeacherConfig
    tokenizer: PreTrainedTokenizerBase
    """Of the tokens that it is asked about: the student's, or for ``objective.name: aligned`` the teacher's own."""
    vocab_size: int
    """Rows of the head that these are."""


async def open_plugged_teacher(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stack: AsyncExitStack, progress: Progress
) -> Teacher:
    """The teacher that ``teacher.plugin`` names. Raises `ConfigError` or `TeacherError` for one that does not begin."""
    use = config.plugin_use
    assert use is not None, "the configuration names one"
    progress.activity("loading", f"teacher, {use.check()}")
    teacher: Teacher = await _begun(use, TeacherError, stack, TeacherSetting(config, tokenizer, vocab_size))
    if not isinstance(getattr(teacher, "info", None), TeacherInfo):
        raise ConfigError(f"{use.check()} does not fit: its info is no bbopd.types.TeacherInfo once it has begun (docs/plugins.md)")
    return teacher


async def open_plugged_engine(use: PluginUse, setting: EngineSetting, stack: AsyncExitStack, progress: Progress) -> RolloutEngine:
    """The engine that ``rollouts.engine`` names. Raises `ConfigError` or `EngineError` for one that does not begin."""
    progress.activity("loading", f"engine, {use.check()}")
    engine: RolloutEngine = await _begun(use, EngineError, stack, setting)
    return engine


async def _begun(use: PluginUse, kind: type[BbopdError], stack: AsyncExitStack, *context: Any) -> Any:
    """An instance after its ``start``, where it has one; its ``close`` is called at the end of the run."""
    made = use.make(*context)
    if hasattr(made, "close"):
        stack.push_async_callback(made.close)
    if hasattr(made, "start"):
        try:
            await made.start()
        except BbopdError:
            raise
        except Exception as error:  # somebody's class raises what it likes
            raise kind(f"{use.check()} does not start: {type(error).__name__}: {error}") from error
    return made


def record_of(config: RunConfig) -> list[dict[str, str]]:
    """The plug-ins of a run, for ``run.json``; every one can be imported and takes its options. Raises `ConfigError`."""
    plugins = dict.fromkeys(use.check() for use in config.plugins)
    return [{"group": one.group, "name": one.name, "package": one.package, "version": one.version, "class": one.value} for one in plugins]
