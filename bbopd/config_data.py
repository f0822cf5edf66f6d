"""The options of the data: where prompts come from, and which rollouts are worth a teacher's time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bbopd.config_base import Fraction, Options, Positive, Section, Similarity, known_in
from bbopd.plugins import PluginUse


class FiltersConfig(Section):
    """Which rollouts are not worth a teacher's time. Every rejected one is kept in rejected.jsonl with its reason."""

    min_tokens: Annotated[int, Field(ge=0)] = 4
    """Answers of fewer tokens are rejected."""
    max_tokens: Positive | None = None
    """Answers of more tokens are rejected; None: any length."""
    reject_truncated: bool = False
    """Reject answers that were cut off at ``rollouts.max_new_tokens``."""
    max_repetition: Fraction = 0.6
    """Largest share of repeated n-grams in one answer."""
    repetition_ngram: Annotated[int, Field(ge=2)] = 4
    """Tokens of an n-gram that is looked for again."""
    reject_duplicates: bool = True
    """Equal answers to one prompt in one update cycle."""
    reject_no_eos: bool = False
    """Answers that do not end with a token that ends a text, whatever stopped them."""
    charset: tuple[str, ...] = ()
    """Scripts of Unicode that answers are written in (Latin, Cyrillic, ...); ``any``: all but garbled characters; ``ascii`` alone."""
    max_foreign: Fraction = 0.05
    """Largest share of characters outside ``charset``."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the languages that answers are written in; needs bbopd[data]."""
    min_language: Fraction = 0.1
    """Smallest probability that an answer is in one of ``languages``."""
    near_duplicates: Similarity | None = None
    """Similarity to an accepted answer of the run from which on one is turned away; needs bbopd[data]."""
    near_duplicates_kept: Positive = 4096
    """Accepted answers that are remembered for it, the last ones."""
    hooks: tuple[str, ...] = ()
    """Functions of your own, as ``module:function`` or ``path.py:function``: trusted code, run inside the run."""
    plugins: Mapping[Annotated[str, known_in("filters")], Options] = Field(default_factory=dict)
    """Filters of other packages, by their names, each with its options, ``{}`` for none; the name is the reason of what they reject."""
    min_kept: Fraction = 0.05
    """Share of the last ``kept_window`` rollouts that must pass, or the run stops."""
    kept_window: Positive = 200
    """Rollouts that ``min_kept`` looks back on."""
    quarantine_bytes: Positive = 64 * 2**20
    """Largest size of rejected.jsonl."""

    @property
    def plugin_uses(self) -> tuple[PluginUse, ...]:
        return tuple(PluginUse("filters", name, options, f"data.filters.plugins.{name}") for name, options in self.plugins.items())


class PromptSource(Section):
    """One source of prompts: exactly one of ``demo``, ``jsonl``, ``parquet``, ``text``, ``dataset``."""

    demo: bool = False
    """The text that Python itself carries (pydoc topics) and the library's own chat prompts."""
    jsonl: str | None = None
    """Lines with ``prompt``, ``messages`` or ``conversations``, and optionally ``response`` or ``completion``."""
    parquet: str | None = None
    """A Parquet file, or a folder of them, with columns like those of ``dataset``."""
    text: str | None = None
    """A plain text file, or a folder of them; documents are cut into prefixes and continuations."""
    dataset: str | None = None
    """A name or folder for datasets.load_dataset, whose rows are read as they are drawn; a folder may hold JSONL or Parquet files."""
    subset: str | None = None
    """The configuration of a ``dataset`` that has several."""
    split: str = "train"
    """Which part of a ``dataset`` is read."""
    column: str | None = None
    """Column of rows that is read: a chat where it holds a list, else running text. None takes ``messages``, ``conversations``, ``prompt``
    or ``text``, whichever is there."""
    limit: Positive | None = None
    """Documents to take, the first ones; of a ``dataset``, in every epoch."""
    buffer: Positive = 10_000
    """Documents of a ``dataset`` that are in memory, and shuffled, at a time."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often its prompts are drawn, beside the weights of the other sources. None, without a ``dataset`` among them: as often as it has
    prompts."""
    teachers: Mapping[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Who is asked about its prompts, by the name in the run's ``teachers`` (``own`` is that of ``teacher``), and how much each counts in
    the loss. None named: ``own`` with weight 1."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to a row without a usable question or text; those skipped are counted."""

    @model_validator(mode="after")
    def _exactly_one(self) -> PromptSource:
        given = [name for name in ("demo", "jsonl", "parquet", "text", "dataset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of demo, jsonl, parquet, text, dataset; got {given or 'none'}")
        return self

    @property
    def name(self) -> str:
        return str(self.jsonl or self.parquet or self.text or self.dataset or "demo")

    @property
    def flows(self) -> bool:
        """Whether its rows are read as they are drawn, rather than all at the start."""
        return self.dataset is not None


class DataConfig(Section):
    """Where prompts come from, how long they are, and which answers are kept."""

    prompts: tuple[PromptSource, ...] = (PromptSource(demo=True),)
    """Sources of prompts, one or more; the default is the demo's."""
    prompt_tokens: Positive = 64
    """Tokens of a document that become the prompt."""
    response_tokens: Positive = 192
    """Tokens of a document that become its true continuation."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of documents set aside for evaluation."""
    long_prompts: Literal["error", "skip", "truncate"] = "error"
    """What happens to a question that leaves no room for an answer; ``truncate`` takes its last tokens."""
    near_duplicates: Similarity | None = None
    """Similarity to an earlier document from which on one is left out (of a ``dataset``: to one of the last ``buffer`` and more); needs
    bbopd[data]."""
    rank: Annotated[int, Field(ge=0)] = 0
    """Which of ``world_size`` disjoint shares of the draws this run takes."""
    world_size: Positive = 1
    """Runs that share the draws among them, each with a ``rank`` of its own."""
    filters: FiltersConfig = FiltersConfig()
    """Which rollouts are turned away."""

    @model_validator(mode="after")
    def _shares_fit(self) -> DataConfig:
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} of world_size {self.world_size}: ranks count from 0 to {self.world_size - 1}")
        weighted = [source.name for source in self.prompts if source.weight is not None]
        if weighted and len(weighted) < len(self.prompts):
            raise ValueError(
                f"weight is given to {', '.join(weighted)} but not to every source: give it to all of data.prompts, or to none"
            )
        flowing = [source.name for source in self.prompts if source.flows]
        if flowing and len(self.prompts) > 1 and not weighted:
            raise ValueError(
                f"dataset {flowing[0]} is read as it is drawn, so that its size is not known: give a weight to every one of data.prompts"
            )
        return self
