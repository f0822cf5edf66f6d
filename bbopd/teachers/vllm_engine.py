"""Loading a vLLM engine for a teacher: its memory bounded, what only pads its head left out, and what it can give written down."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbopd.config import ServeConfig
from bbopd.errors import ConfigError, EngineError, ModelError
from bbopd.modeling import (
    chat_template_sha256,
    compute_dtype,
    load_model,
    load_tokenizer,
    resolve_device,
    tokenizer_sha256,
    used_vocabulary,
    vocabulary_sha256,
)
from bbopd.modeling.load import quiet
from bbopd.types import Level, Offer, TeacherInfo
from bbopd.vllm_setup import kv_bytes_of_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MOST_ENTRIES", "LoadedEngine", "load_engine"]

MOST_ENTRIES = 2**23
"""Ids with a logprob in vLLM's lists at a time: about 100 bytes each."""

_LEVELS = ("candidates", "topk", "sampled", "text")  # at most
_AT_ONCE = 64  # sequences
_KV_BLOCK = 128  # tokens; vLLM's on a CPU, and more than its own on a GPU
_LOGIT_BYTES = {"cpu": 2**29, "cuda": 2**32}  # of a step's logits and their logprobs, which vLLM's memory profile does not see
_LOGIT_COPIES = 3  # of a row of float32 logits while its logprobs are taken
_TEMPERATURES = (0.01, 100.0)  # of written answers


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """``engine`` is vLLM's ``LLMEngine``; ``end_ids`` are the tokens at which the model stops."""

    engine: Any
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    info: TeacherInfo


def load_engine(config: ServeConfig) -> LoadedEngine:
    """Load what a teacher's configuration names.

    Raises
    ------
    ConfigError : none of its ``levels`` is one that vLLM gives, or its ``device`` is another GPU than the first.
    ModelError : no model or tokenizer is there.
    EngineError : vLLM does not take the model, or has no room for it.
    """
    _check_levels(config.levels, _LEVELS)
    device = resolve_device(config.device)
    if device.index:
        raise ConfigError(
            f"device {config.device}: vLLM takes the first GPU it sees: set CUDA_VISIBLE_DEVICES={device.index} and device=cuda"
        )
    source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model, **source)
    dtype = compute_dtype(config.dtype, device)
    allowed = os.sched_getaffinity(0)
    with ExitStack() as cleanup:
        name = config.model
        if name.endswith(".gguf"):
            name = _unpacked(name, dtype, cleanup.enter_context(tempfile.TemporaryDirectory()))
        try:
            engine = _make_engine(config, name, device.type, dtype)
        except (ModelError, ConfigError):
            raise
        except Exception as error:  # anything that its layers raise
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise EngineError(
                f"vLLM cannot serve {config.model}: {reason}; where memory is short, lower max_sequence_tokens "
                f"({config.max_sequence_tokens or 'the model’s own'}) or batch_tokens ({config.batch_tokens}), or set engine=hf"
            ) from error
        finally:
            os.sched_setaffinity(0, allowed)  # loading has bound this thread to one core, and threads to come inherit that
        end_ids = _end_of_sequence(name, tokenizer, config)
    vocab_size = used_vocabulary(tokenizer, engine.vllm_config.model_config.get_vocab_size())
    engine.apply_model(partial(_leave_out_padding, vocab_size=vocab_size))
    return LoadedEngine(engine, tokenizer, end_ids, _describe(engine, tokenizer, config, vocab_size))


def _make_engine(config: ServeConfig, name: str, device_type: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    with quiet():
        described = AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    decoder = described.get_text_config(decoder=True)
    longest = config.max_sequence_tokens
    positions = getattr(decoder, "max_position_embeddings", None)
    length = min((limit for limit in (longest and longest + 1, positions) if limit), default=4096)
    step_tokens = _LOGIT_BYTES[device_type] // (4 * _LOGIT_COPIES * decoder.vocab_size)
    arguments = EngineArgs(
        model=name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        skip_tokenizer_init=True,
        generation_config="vllm",  # sampling is what the client asks, not what a file suggests
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=length,
        max_num_seqs=_AT_ONCE,
        max_num_batched_tokens=max(_AT_ONCE, min(step_tokens, max(config.batch_tokens, _AT_ONCE))),
        kv_cache_memory_bytes=(max(config.batch_tokens, length) + _AT_ONCE * _KV_BLOCK) * kv_bytes_of_token(decoder, dtype.itemsize),
        gpu_memory_utilization=config.gpu_memory,
        enforce_eager=device_type == "cpu",  # compiling takes longer than it saves
        enable_prefix_caching="text" in config.levels,  # scoring cannot use it
        logprobs_mode="raw_logprobs",
        max_logprobs=min(config.max_top_k, decoder.vocab_size),
        disable_log_stats=True,
    )
    return LLMEngine.from_engine_args(arguments)


def _leave_out_padding(model: torch.nn.Module, vocab_size: int) -> None:
    """Have vLLM cut its logits after the last entry that a token has, as it cuts its own padding: what only pads a head has no mass."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    found = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    for module in found:
        module.org_vocab_size = min(module.org_vocab_size, vocab_size)
    if not found:
        raise EngineError(f"vLLM's {type(model).__name__} makes its logits in a way that is not known here: set engine=hf")


def _describe(engine: Any, tokenizer: PreTrainedTokenizerBase, config: ServeConfig, vocab_size: int) -> TeacherInfo:
    """What this engine can give of what the configuration allows."""
    length = engine.vllm_config.model_config.max_model_len
    width = min(config.max_top_k, vocab_size, max(1, MOST_ENTRIES // length))
    offers = {
        "topk": Offer("topk", width, tail="derived"),
        "sampled": Offer("sampled"),
        "text": Offer("text", 0, *_TEMPERATURES),
    }
    if engine.vllm_config.use_v2_model_runner:
        offers["candidates"] = Offer("candidates", width, tail="derived")
    levels: list[Level] = [level for level in config.levels if level in offers]
    _check_levels(levels, offers)
    return TeacherInfo(
        model=config.model,
        vocab_size=vocab_size,
        offers=tuple(offers[level] for level in levels),
        revision=config.revision or "",
        vocab_sha256=vocabulary_sha256(tokenizer, vocab_size),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=chat_template_sha256(tokenizer),
        max_sequence_tokens=length - 1,  # vLLM keeps a place for the token that it must write
        takes_text="text" in levels,
    )


def _check_levels(levels: Sequence[Level], offered: Collection[str]) -> None:
    if not set(levels) & set(offered):
        raise ConfigError(f"levels {list(levels)}: engine vllm gives {', '.join(offered)} here; set levels to some of these, or engine=hf")


def _unpacked(path: str, dtype: torch.dtype, folder: str) -> str:
    """The same model as a folder that vLLM reads; of no use once it is loaded."""
    load_model(path, dtype=dtype).save_pretrained(folder)
    return folder


def _end_of_sequence(name: str, tokenizer: PreTrainedTokenizerBase, config: ServeConfig) -> tuple[int, ...]:
    """The ids at which the model stops, as its files say."""
    from transformers import AutoConfig, GenerationConfig

    where: dict[str, Any] = {"revision": config.revision} if not Path(name).is_dir() else {}
    with quiet():
        try:
            ids = GenerationConfig.from_pretrained(name, **where).eos_token_id
        except OSError:  # there is no such file
            ids = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **where).eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return (ids,) if isinstance(ids, int) else tuple(ids or ())
