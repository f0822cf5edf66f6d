"""Hugging Face models as the rest of the library sees them: loaded, pruned, packed, and with their head in the open."""

from bbopd.modeling.copies import FrozenCopy, copy_of_trained, trained_bytes, trained_weights
from bbopd.modeling.head import output_head
from bbopd.modeling.layers import keep_layers
from bbopd.modeling.load import compute_dtype, empty_model, load_model, load_tokenizer, max_positions, resolve_device
from bbopd.modeling.lora import adapter_parameters, add_lora, is_adapted, merge_lora, merged_weights, save_adapter
from bbopd.modeling.packed import can_share_prefixes, packed_attention, packed_hidden
from bbopd.modeling.placement import to_device
from bbopd.modeling.quantized import plain_sizes
from bbopd.modeling.vocabulary import chat_template_sha256, token_bytes, tokenizer_sha256, used_vocabulary, vocabulary_sha256

__all__ = [
    "FrozenCopy",
    "adapter_parameters",
    "add_lora",
    "can_share_prefixes",
    "chat_template_sha256",
    "compute_dtype",
    "copy_of_trained",
    "empty_model",
    "is_adapted",
    "keep_layers",
    "load_model",
    "load_tokenizer",
    "max_positions",
    "merge_lora",
    "merged_weights",
    "output_head",
    "packed_attention",
    "packed_hidden",
    "plain_sizes",
    "resolve_device",
    "save_adapter",
    "to_device",
    "token_bytes",
    "tokenizer_sha256",
    "trained_bytes",
    "trained_weights",
    "used_vocabulary",
    "vocabulary_sha256",
]
