"""The texts of the candidates for a mask, against the tokenizers library's own decoding of all tokens together."""

import random
import string

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gte_deploy.text import filling
from gte_deploy.text.filling import cleaned_up, filled_texts

WORDS = [
    "the",
    "king",
    "##s",
    "##'",
    ".",
    "'",
    "n't",
    "'s",
    ",",
    "?",
    "a",
    "##ing",
    "▁",
    "▁old",
    "▁▁x",
    "中",
    "m",
    "ve",
]
DECODERS = {
    "none": None,
    "WordPiece": decoders.WordPiece(),
    "WordPiece without clean-up": decoders.WordPiece(cleanup=False),
    "Metaspace": decoders.Metaspace(),
    "Metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "ByteLevel": decoders.ByteLevel(),
    "BPEDecoder": decoders.BPEDecoder(suffix="g"),
    "Sequence": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
}


def byte_tokens() -> list[str]:
    """Every single byte, pairs of bytes that cut characters, and whole words, as a byte-level vocabulary has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    cut = ["ä¸", "\xadð", "Ã©", "Ġthe", "Ġ", "ŃĠa", "ðŁ", "ĺĢ", "éé"]
    return alphabet + cut


def tokenizer_of(decoder, words=WORDS) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[MASK]"])
    tokenizer.add_tokens([AddedToken("added 中", special=False)])
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cleans", [True, False])
def test_random_rows(name, cleans):
    tokenizer = tokenizer_of(DECODERS[name], byte_tokens() if name == "ByteLevel" else WORDS)
    size = tokenizer.get_vocab_size()
    dice = random.Random(0)
    clean = cleaned_up if cleans else str
    for _ in range(300):
        # Ids from 0; some have no token.
        before, candidates, after = (
            [dice.randrange(size + 3) for _ in range(dice.randrange(0, most))] for most in (9, 6, 9)
        )
        skips = dice.random() < 0.5
        expected = [
            clean(tokenizer.decode([*before, token, *after], skip_special_tokens=skips)) for token in candidates
        ]
        found = filled_texts(
            tokenizer,
            before,
            candidates,
            after,
            skip_special_tokens=skips,
            clean_up=cleaned_up if cleans else None,
        )
        assert found == expected, (before, candidates, after, skips)


def test_the_continuations_of_utf_8():
    found = filling._continuations()
    decoder = decoders.ByteLevel()
    assert len(found) == 64 and not found & set(string.ascii_letters + "Ġ")
    # Each completes the two bytes of a character, and is nothing by itself.
    assert {decoder.decode(["Ã" + char]) for char in found} == set(map(chr, range(0xC0, 0x100)))
    assert {decoder.decode([char]) for char in found} == {"\ufffd"}


@pytest.mark.parametrize("name", ["WordPiece", "Metaspace", "ByteLevel"])
def test_the_row_is_decoded_once(name, monkeypatch):
    """A thousand candidates cost a thousand tokens and a few rows, not a thousand rows."""
    tokenizer = tokenizer_of(DECODERS[name], byte_tokens() if name == "ByteLevel" else WORDS)
    decoded = []
    own = filling._decoded
    monkeypatch.setattr(filling, "_decoded", lambda tokenizer, rows: decoded.extend(rows) or own(tokenizer, rows))
    row = [0, 4] * 500
    filled_texts(tokenizer, row, [number % 15 for number in range(1000)], row, skip_special_tokens=True, clean_up=None)
    assert sum(map(len, decoded)) < 4 * len(row)
