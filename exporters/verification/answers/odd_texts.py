"""Texts that two readings of a tokenizer may split differently: scripts, marks, emoji, control characters, white space.

Other texts are made from the tokenizer itself: its added and special tokens written in a text, and words of its own
vocabulary. So a tokenizer of any language gets more than unknown tokens.
"""

import random
import unicodedata
from collections.abc import Sequence
from typing import Any

_SEED = 20240729
_SCRIPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Être naïf, garçon ! Ça coûte 12 € à l'œil; Ägypten, Übergröße, straße.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Tiếng Việt có nhiều dấu",
    "İstanbul'da ılık bir gün, IŞIK",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΟΔΥΣΣΕΎΣ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Йод й",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "وَالكِتَابُ مُحَرَّك ١٢٣",
    "דג סקרן שט בים מאוכזב; שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "我能吞下玻璃而不伤身体。",
    "私はガラスを食べられます。カタカナ ﾊﾝｶｸ",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요",
    "한국어 (분해)",
    "Mixed текст με 混合 文字 and العربية 123 abc中文def",
    "ꜩ ℵ ℝ ∑ ∫ √2 ≠ ½ ² ₂ ℃ № ™",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒻𝒶𝓃𝒸𝓎 𝟙𝟚𝟛 𠀀𠮷",
)
_MARKS = (
    "cafe\u0301 versus caf\u00e9",
    "a\u0300\u0301\u0302\u0303\u0304\u0305 stacked",
    "\u0301 starts with a mark",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom",
    "soft\u00adhyphen",
    "left\u200eto\u200fright \u202aembedded\u202c \u2066isolated\u2069",
    "ﬁne ﬂuﬀ ﬆ Ⅷ ① ㍿ ㎏",
    "Ｆｕｌｌｗｉｄｔｈ　ＡＢＣ　１２３！",
    "½ of ﷺ",
)
_EMOJI = (
    "😀 smile 🎉🎉",
    "👩‍👩‍👧‍👦 family 👩🏽‍💻 coder 👍🏿 🤷🏻‍♂️",
    "flags 🇩🇪🇫🇷 keycap 1️⃣ #️⃣ heart ❤️ ❤ \u2764\ufe0e",
)
_CONTROL = (
    "a\x00b\x01c\x07d\x1be\x7ff",
    "nul \x00 alone",
    "a\x80b\x85c\x9fd",
    "unassigned \u0378 private \ue000 nonchar \ufdd0 \uffff \U0010ffff replacement \ufffd",
    "line\u2028separator\u2029paragraph",
)
_SPACE = (
    "",
    " ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    "\u00a0",
    "\u3000\u2003",
    " leading",
    "trailing ",
    "  both  sides   and    inside  ",
    "tab\tand\nnewline\r\nand\u000bvt\u000cff",
    "nbsp\u00a0thin\u2009ideographic\u3000space",
    "paragraph\n\n  indented\n\ttabbed\n",
)
_CODE = (
    "https://user:pw@example.org:8080/a/b_c-d?x=1&y=%20#frag",
    "first.last+tag@sub.example.co.uk",
    "def f(x): return x**2 if x >= 0 else -x  # comment\n\treturn",
    '{"key": [1, 2.5, -3e-10, null], "s": "a\\"b"}',
    "C:\\Users\\name\\file.txt && rm -rf ~/* | tee >(cat)",
    "SELECT * FROM t WHERE a <> 'b' AND c IS NOT NULL;",
    "<html><b>bold</b> &amp; <!-- x --></html>",
    "3.14159 1,234,567.89 -0 +1 1e10 0x1F 12:34:56 2024-02-29 50% $5",
    "…—–‘’“”«»„‚¿¡§¶†‡•",
    "!!! ??? ... --- ___ *** ### @@@ ^^^ ~~~ ``` ||| \\\\\\",
    "don't can't I'm you've they're it's o'clock rock'n'roll",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE",
)
_CASE = (
    "UPPER CASE TEXT WITH ACCENTS ÀÉÎÕÜ ÆØÅ ẞ",
    "MiXeD cAsE tExT",
    "ΑΒΓΔ АБВГ ԱԲԳԴ ǅ ǈ",
)
_LONG_WORDS = (
    "Pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 99,
    "a" * 100,
    "a" * 101,
    "x" * 500,
    "ab" * 400 + " word",
    "1" * 300,
    "中" * 250,
    "-" * 300,
    "é" * 120,
)
ODD_TEXTS: tuple[str, ...] = (
    *_SCRIPTS,
    *_MARKS,
    *_EMOJI,
    *_CONTROL,
    *_SPACE,
    *_CODE,
    *_CASE,
    *_LONG_WORDS,
    *(unicodedata.normalize(form, text) for form in ("NFD", "NFKC") for text in (*_SCRIPTS[1:6], _SCRIPTS[14])),
)
"""The texts that are the same for every tokenizer."""
PLAIN_TEXTS: tuple[str, ...] = (
    "Paris is the capital of France.",
    "Where is the nearest station?",
    "THE KING AND THE QUEEN ARE OLD, and they walk in Łódź.",
    "水はどこですか。我能吞下玻璃而不伤身体。",
    "Съешь же ещё этих мягких булок 😀, 12 % of 3,400 €",
)
"""A few texts for comparisons in which each text costs a run of the model."""
_MAX_WRITTEN_TOKENS = 200


def token_texts(tokens: Sequence[str]) -> list[str]:
    """Return texts with special and added tokens: alone, inside a text, inside a word and in lower case.

    If there are very many tokens (a model may reserve thousands), only the first and the last hundred are used.
    """
    half = _MAX_WRITTEN_TOKENS // 2
    chosen = tokens if len(tokens) <= _MAX_WRITTEN_TOKENS else [*tokens[:half], *tokens[-half:]]
    texts = [text for token in chosen for text in (token, f"the {token} sat", f"a{token}b", f"the {token.lower()} sat")]
    return [*dict.fromkeys([*texts, "".join(chosen[:20]), " ".join(chosen[:20])])]


def vocabulary_texts(tokenizer: Any, count: int, *, words: int = 8) -> list[str]:
    """Return `count` texts of words from the vocabulary of a transformers tokenizer, the last text in upper case.

    The tokens are drawn with a fixed seed and decoded: most are whole words, some are parts of words.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    drawn = random.Random(_SEED)
    texts = [tokenizer.decode([drawn.choice(ids) for _ in range(words)]) if ids else "" for _ in range(count)]
    return [*texts[:-1], *(text.upper() for text in texts[-1:])]


def long_text(tokenizer: Any, tokens: int) -> str:
    """Return a text of more than `tokens` tokens, with numbers in it so that a cut in another place shows."""
    text = " ".join(vocabulary_texts(tokenizer, 4, words=32)[:3]) or "the king and the queen walk"
    per_text = max(1, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return " ".join(f"{text} {number}" for number in range(tokens // per_text + 1))


def short_pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of neighbours, one pair in reverse order, and pairs with an empty text."""
    first, second = texts[:2]
    neighbours = list(zip(texts[::2], texts[1::2], strict=False))
    return [*neighbours, (second, first), (first, ""), ("", second), ("", "")]


def long_pairs(texts: Sequence[str], long: str) -> list[tuple[str, str]]:
    """Return pairs with a long second text, a long first text, and two long texts of equal and of unequal length."""
    first, second = texts[:2]
    return [(first, long), (long, second), (long, long), (long, long[: len(long) // 2])]
