"""Tokenizers of other makes than `tiny_models.tiny_tokenizer`, made in code, for tests of teachers whose tokens are not the student's."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_tokenizer

TURNS = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '[/turn]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
MERGES = (("t", "h"), ("i", "n"), ("in", "g"), ("Ġ", "th"), ("e", "r"), ("Ġth", "e"), ("ð", "Ł"), ("o", "u"))
"""Other ones than the student's: ``ð`` and ``Ł`` spell the first two bytes of an emoji."""


def byte_level_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with other merges than the student's, under other ids; ``<|im_end|>`` ends a text."""
    tokenizer = tiny_tokenizer(MERGES)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, ``▁`` for spaces, a token for each byte, ``<s>`` before and ``[/turn]`` after answers."""
    letters = "abcdefghijklmnopqrstuvwxyzT.,'[]()/=0123456789:é"
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "[/turn]",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *letters,
        "th",
        "the",
        "▁the",
        "in",
        "▁in",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "in")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[/turn]"],
        chat_template=TURNS,
        clean_up_tokenization_spaces=False,
    )
    made.backend_tokenizer.post_processor = _begins_with("<s>", 1)
    return made


def folding_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts all text into lower case first."""
    tokenizer = tiny_tokenizer(MERGES)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def composing_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen's: characters are composed (NFC) before they are cut."""
    tokenizer = tiny_tokenizer(MERGES)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def word_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, which spells nothing else."""
    pieces = ["<unk>", "</s>", *words.split()]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def _begins_with(token: str, index: int):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, index)])
