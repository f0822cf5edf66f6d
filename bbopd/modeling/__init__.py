"""Hugging Face models as the rest of the library sees them: loaded, pruned, packed, and with their head in the open."""

from bbopd.modeling.head import OutputHead, output_head
from bbopd.modeling.layers import keep_layers
from bbopd.modeling.load import compute_dtype, load_model, load_tokenizer, max_positions, resolve_device
from bbopd.modeling.packed import can_share_prefixes, packed_attention, packed_hidden
from bbopd.modeling.placement import to_device
from bbopd.modeling.vocabulary import chat_template_sha256, token_bytes, tokenizer_sha256, used_vocabulary, vocabulary_sha256

__all__ = [
    "OutputHead",
    "can_share_prefixes",
    "chat_template_sha256",
    "compute_dtype",
    "keep_layers",
    "load_model",
    "load_tokenizer",
    "max_positions",
    "output_head",
    "packed_attention",
    "packed_hidden",
    "resolve_device",
    "to_device",
    "token_bytes",
    "tokenizer_sha256",
    "used_vocabulary",
    "vocabulary_sha256",
]
