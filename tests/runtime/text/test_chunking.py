"""The rules for chunks: sentences in several languages, ranges of tokens, and the checks of a caller's spans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gte_deploy import InputError, SentenceChunks, TokenChunks
from gte_deploy.text.chunking import checked_spans, overlapping, ranges_of_spans, sentences, visible_places

SENTENCES = [
    (
        "en",
        ["Dr. Smith paid $3.50 to J. Doe, e.g. for milk. ", '"Why?" ', "asked Mrs. Lee... and left. ", "(Yes!) ", "No"],
    ),
    ("de", ["Am 3. Mai kam Hr. Meier, d.h. der Chef. ", "Danach ging er z.B. heim. ", "Ende."]),
    ("fr", ["M. Dupont dit «\u00a0Oui\u202f!\u00a0» ", "et part. ", "Ça va ? ", "Bien."]),
    ("zh", ["今天是晴天。", "明天下雨吗？", "“下雨！”", "他说。"]),
    ("ja", ["彼は「はい。」", "と言った。", "本当？！", "終わり"]),
    ("hi", ["यह एक वाक्य है। ", "यह दूसरा है॥"]),
    ("ar", ["هل هذا جيد؟ ", "نعم، هذا جيد. ", "شكرا"]),
    ("am", ["ሰላም ነው። ", "ደህና ነኝ።"]),
    ("hy", ["Բարեւ։ ", "Ինչպես ես։"]),
    ("el", ["Καλά. ", "Εσύ; ναι."]),
    ("paragraphs", ["a heading\n\n", "a line\nand its rest\r\n \r\n", "more\f", "end\u2029", "last"]),
    ("no ends", ["version 1.2.3 of example.com"]),
    ("vitamins", ["He has 1999. ", "In 1999... ", "It ends…"]),
]


@pytest.mark.parametrize("expected", [pair[1] for pair in SENTENCES], ids=[pair[0] for pair in SENTENCES])
def test_sentences(expected):
    text = "".join(expected)
    assert [text[start:end] for start, end in sentences(text)] == expected


@given(st.text(st.sampled_from("aZ1.!?…。 \n\r\f\"')") | st.characters(), max_size=60))
@settings(deadline=None)
def test_sentences_are_the_text(text):
    found = sentences(text)
    assert "".join(text[start:end] for start, end in found) == text
    assert all(end > start for start, end in found)


@pytest.mark.parametrize(
    "unit",
    ["\n", ".", ". ", " ", ".'", "\n ", "a.", "。", "!' ", ".\n"],
    ids=repr,
)
def test_long_texts_of_one_unit(unit):
    """A rule whose time grew with the square of the length would not come to an end."""
    for tail in ("", "x"):
        text = unit * 200_000 + tail
        assert sentences(text)[-1][1] == len(text)


def places_of(*spans):
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def test_sentences_are_packed_and_long_ones_cut():
    # One token a character that is no space; sentences of 3, 3, 7, 1 and 1 tokens.
    text = "ab! cd! efghij! 。 。"
    places = places_of(*((i, i + 1) for i, char in enumerate(text) if char != " "))

    def chunks(most):
        return ["".join(text[i] for i, _ in places[slice(*each)]) for each in SentenceChunks(most).ranges(text, places)]

    assert chunks(100) == ["ab!cd!efghij!。。"]
    assert chunks(6) == ["ab!cd!", "efg", "hij!", "。。"]
    assert chunks(3) == ["ab!", "cd!", "ef", "gh", "ij!", "。。"]
    assert chunks(1) == list("ab!cd!efghij!。。")


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_ranges_of_equal_size(count, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    found = overlapping(count, size, overlap)
    assert found.shape == (len(found), 2) and found.dtype == np.int64
    expected, first = [], 0
    while first < count and not (expected and expected[-1][1] == count):
        expected.append([first, min(count, first + size)])
        first += size - overlap
    assert found.tolist() == expected


@given(st.lists(st.integers(0, 4), max_size=30), st.data())
def test_tokens_of_spans_share_a_character_with_them(widths, data):
    ends = np.cumsum(widths, dtype=np.int64)
    places = visible_places("x" * (ends[-1] if widths else 0), np.stack([ends - widths, ends], axis=1).reshape(-1, 2))
    length = int(ends[-1]) if widths else 0
    if not length:
        return
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    ((first, last),) = ranges_of_spans(places_of((start, end)), places).tolist()
    shares = [bool(set(range(*place)) & set(range(start, end))) for place in places.tolist()]
    assert all(shares[first:last]) and not any(shares[:first]) and not any(shares[last:])


@given(st.text(st.sampled_from("ab \n\u3000é"), max_size=20), st.data())
def test_places_have_no_white_space_around_them(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    offsets = places_of(*zip(cuts, cuts[1:], strict=False))
    places = visible_places(text, offsets)
    assert (np.diff(places, axis=0) >= 0).all()
    for (start, end), (begin, stop) in zip(offsets.tolist(), places.tolist(), strict=True):
        if text[start:end].strip():
            assert text[begin:stop] == text[start:end].strip()
        elif text:
            assert 0 <= begin < stop <= len(text)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 3), (2, 2)], r"chunk 1 of input 0 is \(2, 2\)"),
        ([(0, 6)], "0 <= start < end <= 5"),
        ([(-1, 2)], "chunk 0"),
        ([(3, 2)], "chunk 0"),
        ([(0, True)], "chunk 0"),
        ([(0, 1.0)], "chunk 0"),
        ([0, 1], "chunk 0 of input 0 is 0"),
        ([(0, 1, 2)], "chunk 0"),
        ([(0, 10**30)], "chunk 0"),
        ("ab", "must be a list"),
        (3, "must be a list"),
        ([None], "chunk 0"),
        (np.array([[0.5, 1.5]]), "chunk 0"),
    ],
    ids=repr,
)
def test_bad_spans_are_refused(spans, message):
    with pytest.raises(InputError, match=message):
        checked_spans(spans, "abcde", "input 0")


@pytest.mark.parametrize("spans", [[(0, 5), (1, 2)], [[0, 5], [1, 2]], np.array([[0, 5], [1, 2]]), ((0, 5), (1, 2))])
def test_spans_in_every_form(spans):
    found = checked_spans(spans, "abcde", "input 0")
    assert found.tolist() == [[0, 5], [1, 2]] and found.dtype == np.int64
    assert checked_spans([], "", "input 0").shape == (0, 2)


@pytest.mark.parametrize("make", [lambda: TokenChunks(0), lambda: TokenChunks(4, 4), lambda: TokenChunks(True)])
def test_bad_rules_are_refused(make):
    with pytest.raises(InputError, match="size|overlap"):
        make()


@pytest.mark.parametrize("most", [0, -1, 1.5, "8", None])
def test_bad_sentence_chunks_are_refused(most):
    with pytest.raises(InputError, match="max_tokens"):
        SentenceChunks(most)
