"""The finest common segmentation of two tokenisations: against its definition, on random text and on bytes of no character."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bbopd.alignment import SpelledVocabulary, align_tokens, align_tokens_reference

ALIGNERS = [align_tokens, align_tokens_reference]


def by_definition(first: list[bytes], second: list[bytes]) -> set[int]:
    """Byte positions, after the start, where both sides have a boundary, as far as they are the same."""
    a, b = b"".join(first), b"".join(second)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return {end for end in set(accumulate(map(len, first))) & set(accumulate(map(len, second))) if 0 < end <= same}


def spelled(pieces: list[bytes]) -> tuple[list[int], SpelledVocabulary]:
    vocabulary = {raw: index for index, raw in enumerate(dict.fromkeys(pieces))}
    return [vocabulary[raw] for raw in pieces], SpelledVocabulary.of({index: raw for raw, index in vocabulary.items()})


@st.composite
def cut_text(draw, text=None):
    """A text, cut at random bytes: inside characters too, with tokens of no bytes in between."""
    raw = draw(st.text(max_size=40)).encode() if text is None else text
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=30)))
    return [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_groups_have_equal_bytes_and_are_the_smallest(data):
    text = data.draw(st.text(max_size=40)).encode()
    first, second = data.draw(cut_text(text)), data.draw(cut_text(text))
    if data.draw(st.booleans()):  # and then they go on differently
        first, second = [*first, *data.draw(cut_text())], [*second, *data.draw(cut_text())]
    (first_ids, first_table), (second_ids, second_table) = spelled(first), spelled(second)
    ends = align_tokens(first_ids, first_table, second_ids, second_table)
    np.testing.assert_array_equal(ends, align_tokens_reference(first_ids, first_table, second_ids, second_table))
    assert ends[0].tolist() == [0, 0]
    positions = set()
    for (i0, j0), (i1, j1) in pairwise(ends.tolist()):
        raw = b"".join(first[i0:i1])
        assert raw == b"".join(second[j0:j1])
        assert raw
        positions.add(sum(map(len, first[:i1])))
    assert positions == by_definition(first, second)
    same_text = b"".join(first) == b"".join(second)
    if same_text and b"".join(first):
        assert ends[-1].tolist() == [len(first), len(second)], "nothing of a common text is left over"


@pytest.mark.parametrize("align", ALIGNERS)
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([b"the", b" cat"], [b"the", b" cat"], [[1, 1], [2, 2]]),
        ([b"the", b" cat"], [b"the cat"], [[2, 1]]),
        ([b"ab", b"c", b"d"], [b"a", b"bc", b"d"], [[2, 2], [3, 3]]),
        (["🙂".encode()[:3], "🙂".encode()[3:]], ["🙂".encode()[:1], "🙂".encode()[1:]], [[2, 2]]),
        (["🙂".encode()], [bytes([byte]) for byte in "🙂".encode()], [[1, 4]]),
        ([b"", b"a", b"", b"b"], [b"a", b"b", b""], [[3, 1], [4, 3]]),
        ([b"a", b"b"], [b"a", b"x"], [[1, 1]]),
        ([b"a", b"bc"], [b"a", b"b"], [[1, 1]]),
        ([b"x"], [b"a"], []),
        ([], [b"a"], []),
        ([b"", b""], [b""], []),
    ],
)
def test_known_cases(align, first, second, expected):
    (first_ids, first_table), (second_ids, second_table) = spelled(first), spelled(second)
    assert align(first_ids, first_table, second_ids, second_table)[1:].tolist() == expected


@pytest.mark.parametrize("align", ALIGNERS)
def test_it_ends_at_an_id_that_is_no_text(align):
    table = SpelledVocabulary.of({0: b"a", 1: b"b", 4: b"c"})
    assert table[4] == b"c"
    assert table[2] is None
    assert table[5] is None
    for odd in (2, 3, 5, 1000, -1):
        assert align([0, odd, 1], table, [0, 1, 1], table).tolist() == [[0, 0], [1, 1]]
        assert align([0, 1, 1], table, [0, odd, 1], table).tolist() == [[0, 0], [1, 1]]
    empty = SpelledVocabulary.of({})
    assert align([0], empty, [0], table).tolist() == [[0, 0]]
