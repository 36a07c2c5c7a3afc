"""Texts in which one token has many values: the candidates for a mask, each within its sentence.

To decode the whole sentence for each candidate would take time for every token of it. Here the tokens around the
candidate are decoded once. The parts of a text are joined only where the decoder is known to allow it, so the result
equals the text of all tokens together.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer, decoders, pre_tokenizers

Ids = Sequence[int]

# The characters of the patterns in `cleaned_up`: no pattern reaches over any other character.
_CLEANED = " .?!,'ntmsvre"
# The byte 0xC3, which begins a character of two bytes, as a byte-level vocabulary writes it.
_FIRST_OF_TWO = "Ã"


def filled_texts(
    tokenizer: Tokenizer,
    before: Ids,
    candidates: Ids,
    after: Ids,
    *,
    skip_special_tokens: bool,
    clean_up: Callable[[str], str] | None,
) -> list[str]:
    """Return the text of the token ids `[*before, candidate, *after]` for each candidate.

    Args:
        tokenizer: decodes the ids.
        before: token ids in front of the candidate.
        candidates: token ids.
        after: token ids behind the candidate.
        skip_special_tokens: leave out special tokens, also those among the candidates.
        clean_up: `cleaned_up`, if the tokenizer asks for it; None if not.
    """
    hidden = _special_tokens(tokenizer) if skip_special_tokens else frozenset()
    before, after = (_shown(tokenizer, part, hidden) for part in (before, after))
    shown = _shown(tokenizer, list(dict.fromkeys(candidates)), hidden)
    text = _join(tokenizer, before, shown, after, clean_up)
    if len(shown) == len(candidates):
        return text
    plain = tokenizer.decode([*before, *after], skip_special_tokens=False)
    by_candidate = dict(zip(shown, text, strict=True))
    without = plain if clean_up is None else clean_up(plain)
    return [by_candidate.get(candidate, without) for candidate in candidates]


def cleaned_up(text: str) -> str:
    """The text as transformers' PreTrainedTokenizerBase.clean_up_tokenization changes it."""
    for old, new in (  # in its order
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ):
        text = text.replace(old, new)
    return text


def _special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    return frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


def _shown(tokenizer: Tokenizer, ids: Ids, hidden: frozenset[str]) -> list[int]:
    """The ids that decoding keeps: those with a token that is not hidden."""
    tokens = map(tokenizer.id_to_token, ids)
    return [token_id for token_id, token in zip(ids, tokens, strict=True) if token is not None and token not in hidden]


def _join(
    tokenizer: Tokenizer, before: Ids, candidates: Ids, after: Ids, clean_up: Callable[[str], str] | None
) -> list[str]:
    decoder = tokenizer.decoder
    if decoder is None or isinstance(decoder, decoders.WordPiece | decoders.Metaspace):
        head, middles, tail = _parts_by_word(tokenizer, before, candidates, after)
    elif isinstance(decoder, decoders.ByteLevel):
        head, middles, tail = _parts_by_byte(tokenizer, before, candidates, after)
    else:  # a decoder that may look at any number of tokens at once
        head, middles, tail = "", _decoded(tokenizer, [[*before, token, *after] for token in candidates]), ""
    if clean_up is None:
        return [f"{head}{middle}{tail}" for middle in middles]
    first = len(head.rstrip(_CLEANED))
    last = len(tail) - len(tail.lstrip(_CLEANED))
    start, end = clean_up(head[:first]), clean_up(tail[last:])
    head, tail = head[first:], tail[:last]
    return [f"{start}{clean_up(f'{head}{middle}{tail}')}{end}" for middle in middles]


def _parts_by_word(tokenizer: Tokenizer, before: Ids, candidates: Ids, after: Ids) -> tuple[str, list[str], str]:
    """Parts for a decoder that treats each token by itself, and the first token of a text in a way of its own."""
    if not candidates:
        return "", [], ""
    first = candidates[0]
    one, with_after = _decoded(tokenizer, [[first], [first, *after]])
    tail = with_after[len(one) :]
    if not before:
        return "", _decoded(tokenizer, [[token] for token in candidates]), tail
    head, one = _decoded(tokenizer, [before, before[:1]])
    middles = _decoded(tokenizer, [[before[0], token] for token in candidates])
    return head, [middle[len(one) :] for middle in middles], tail


def _parts_by_byte(tokenizer: Tokenizer, before: Ids, candidates: Ids, after: Ids) -> tuple[str, list[str], str]:
    """Parts for a decoder that joins the bytes of all tokens: a character may consist of bytes of several tokens.

    The text is cut only in front of tokens that begin with the first byte of a character.
    """
    start = next((i for i in range(len(before) - 1, -1, -1) if _begins_a_character(tokenizer, before[i])), 0)
    end = next((i for i, token in enumerate(after) if _begins_a_character(tokenizer, token)), len(after))
    head, tail = _decoded(tokenizer, [before[:start], after[end:]])
    return head, _decoded(tokenizer, [[*before[start:], token, *after[:end]] for token in candidates]), tail


def _begins_a_character(tokenizer: Tokenizer, token_id: int) -> bool:
    token: str = tokenizer.id_to_token(token_id) or ""
    return bool(token) and token[0] not in _continuations()


@lru_cache(maxsize=1)
def _continuations() -> frozenset[str]:
    """The characters of a byte-level vocabulary that are no first byte of a character of UTF-8: 0x80 to 0xBF."""
    decoder = decoders.ByteLevel()
    return frozenset(
        char for char in pre_tokenizers.ByteLevel.alphabet() if "\ufffd" not in decoder.decode([_FIRST_OF_TWO + char])
    )


def _decoded(tokenizer: Tokenizer, rows: Sequence[Ids]) -> list[str]:
    found: list[str] = tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=False)
    return found
