"""Load a causal language model and its tokenizer from a hub id, a folder or a GGUF file, or say plainly why not."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from bbopd.errors import BbopdError, ModelError
from bbopd.hardware import multiplies_bfloat16
from bbopd.modeling.layers import keep_layers as prune_layers
from bbopd.modeling.lora import adapter_base, merge_adapter
from bbopd.modeling.quantized import Quantization, quantize_body

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_model(
    source: str | os.PathLike[str],
    *,
    device: str = "cpu",
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    keep_layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Quantization | None = None,
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Parameters
    ----------
    source
        Hub id, folder, or a path that ends in ``.gguf`` (its weights are unpacked to ``dtype``). A folder with a LoRA adapter in PEFT's
        format is its base model with the adapter merged in; ``revision`` is then the adapter's own to say.
    device
        ``"auto"`` takes CUDA where there is one.
    attention
        ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``, or ``"auto"``: flash-attn on CUDA where it is installed, eager for
        a model with soft-capped attention, which SDPA would drop without a word, else SDPA.
    keep_layers
        Decoder layers to keep, in rising order; the others are dropped.
    dtype
        Of the weights in memory.
    quantize
        How linear layers of the body are held, frozen: on the device there is no more than one of them that is not.

    Raises
    ------
    ModelError
        Not a model, unreadable or incomplete weights, a hub that cannot be reached, an attention that does not fit.
    """
    if (adapted := adapter_base(source)) is not None:
        base, base_revision = adapted
        model = load_model(
            base,
            device=device,
            attention=attention,
            revision=base_revision,
            trust_remote_code=trust_remote_code,
            keep_layers=keep_layers,
            dtype=dtype,
        )
        with _explained(source, "adapter"):
            merge_adapter(model, Path(source).expanduser())
        if quantize is not None:
            quantize_body(model, quantize, model.device)
        return model.eval()
    where = _locate(source, _WEIGHT_FILES, "weights")
    place = resolve_device(device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, **where.options}
    with quiet(), where.muted(), _explained(source, "model"):
        config = AutoConfig.from_pretrained(where.name, **options)
        if where.options:
            options["quantization_config"] = GgufConfig(dequantize=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            where.name,
            config=config,
            **options,
            dtype=dtype,
            attn_implementation=_choose_attention(attention, place, config, source),
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source}: the weights lack {len(missing)} tensors that {type(model).__name__} needs, such as {missing[0]}: "
            "the file is incomplete or belongs to another architecture; fetch it again"
        )
    if keep_layers is not None:
        prune_layers(model, keep_layers)
    if quantize is not None:
        quantize_body(model, quantize, place)
    return model.to(place).eval()


def empty_model(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    keep_layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """A causal language model in float32 without values, on torch's device of now: ``meta``, or a fake one, where nothing may take memory.

    Parameters
    ----------
    source
        As for `load_model`, of which only the configuration is read; or a ``config.json`` by itself.
    keep_layers
        As for `load_model`.

    Raises
    ------
    ModelError
        No configuration of a causal language model that transformers knows, or a hub that cannot be reached.
    """
    if (adapted := adapter_base(source)) is not None:
        source, revision = adapted
    path = Path(source).expanduser()
    is_config = path.suffix == ".json" and path.is_file()
    where = _Location(str(path)) if is_config else _locate(source, ("config.json",), "configuration")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, **where.options}
    with quiet(), where.muted(), _explained(source, "configuration"):
        config = AutoConfig.from_pretrained(where.name, **options)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if keep_layers is not None:
        prune_layers(model, keep_layers)
    return model


def load_tokenizer(
    source: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; sources as in `load_model`, or a folder with a tokenizer alone.

    Raises
    ------
    ModelError
        There is none, it cannot be read, or the hub cannot be reached.
    """
    if (adapted := adapter_base(source)) is not None and not _holds(Path(source).expanduser(), _TOKENIZER_FILES):
        return load_tokenizer(adapted[0], revision=adapted[1], trust_remote_code=trust_remote_code)
    where = _locate(source, _TOKENIZER_FILES, "tokenizer")
    with quiet(), where.muted(), _explained(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(where.name, revision=revision, trust_remote_code=trust_remote_code, **where.options)


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens that the model was made for; None where its config names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else None


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU; any other name is taken as it is."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is none that PyTorch knows: use auto, cpu, cuda or cuda:0") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: PyTorch sees no CUDA device here; use device: cpu, or install a CUDA build of PyTorch")
    return place


def compute_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """The dtype in which matrices are multiplied: ``float32``, ``bfloat16``, or ``auto`` (bfloat16 where hardware does it)."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(torch.device(device).type) else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    except KeyError:
        raise ModelError(f"dtype {name!r} is not one of auto, float32, bfloat16") from None


class _Location(NamedTuple):
    """Where from_pretrained finds the files: a hub id or folder, and the option that names a GGUF file inside it."""

    name: str
    options: dict[str, str] = {}  # noqa: RUF012

    def muted(self) -> AbstractContextManager[object]:
        """Swallows the one progress bar that heeds no switch, that of GGUF files."""
        return redirect_stderr(io.StringIO()) if self.options else nullcontext()


def _locate(source: str | os.PathLike[str], wanted: Sequence[str], what: str) -> _Location:
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} does not begin as a GGUF file does: the download was probably cut off; fetch it again")
        return _Location(str(path.parent), {"gguf_file": path.name})
    if path.is_dir():
        is_tokenizer = what == "tokenizer" and _holds(path, ("tokenizer_config.json",))  # it needs no model beside it
        if not is_tokenizer and not _holds(path, ("config.json", "adapter_config.json")):
            raise ModelError(
                f"{path} is a folder without config.json, so no model: give the folder that save_pretrained wrote, or a .gguf file"
            )
        if not _holds(path, wanted):
            raise ModelError(f"{path} has a config.json but no {what} ({', '.join(wanted)}): copy the missing files into it")
        return _Location(str(path))
    if path.exists():
        raise ModelError(f"{path} is neither a folder nor a .gguf file")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"there is no folder {path}")
    return _Location(text)


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _choose_attention(wanted: str, place: torch.device, config: Any, source: object) -> str:
    softcap = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    flash = place.type == "cuda" and is_flash_attn_2_available()
    if wanted == "auto":
        return "flash_attention_2" if flash else "eager" if softcap else "sdpa"
    if wanted == "flash_attention_2" and not flash:
        raise ModelError(
            "attention flash_attention_2 needs a CUDA device and the flash-attn package (the flash extra): use attention: auto"
        )
    if wanted == "sdpa" and softcap:
        raise ModelError(f"{source} soft-caps its attention at {softcap}, which SDPA cannot do: use attention: auto")
    return wanted


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; what matters in them is raised as an error instead."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _explained(source: object, what: str) -> Iterator[None]:
    try:
        yield
    except BbopdError:
        raise
    except Exception as error:  # libraries below raise anything from KeyError to their own Rust errors on a broken file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if not isinstance(source, str) or Path(source).expanduser().exists():
            raise ModelError(f"{source}: the {what} cannot be read ({reason})") from error
        raise ModelError(
            f"{source} is no folder here, and the {what} cannot be fetched from the hub ({reason}): check the name and the network, "
            "or give a local folder or .gguf file; for a copy in the hub cache set HF_HUB_OFFLINE=1"
        ) from error
