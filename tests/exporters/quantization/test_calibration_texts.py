"""The built-in texts for calibrating INT8: English prose, or several languages for a vocabulary of several scripts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

from family_checkpoints import make_family_checkpoint  # noqa: E402
from gte_deploy.core.errors import InputError  # noqa: E402
from gte_deploy.exporters.targets.cpu import CpuOptions  # noqa: E402
from gte_deploy.exporters.verification.texts import builtin_texts, calibration_texts, is_multilingual  # noqa: E402
from gte_deploy.models import builtin_path  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.models.description import describe  # noqa: E402
from gte_deploy.models.tokenizer import resolve_tokenizer  # noqa: E402
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer  # noqa: E402

SCRIPTS = {"CYRILLIC": 0x430, "GREEK": 0x3B1, "ARABIC": 0x628, "DEVANAGARI": 0x915}


def tokenizer_of(folder: Path, words: list[str]) -> TextTokenizer:
    """An XLM-R tokenizer with these words."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -5.0) for word in dict.fromkeys(words)]
    transformers.XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)]).save_pretrained(folder)
    return TextTokenizer(**resolve_tokenizer(folder).parts())


def words_of(script: str, count: int) -> list[str]:
    """Different words of two letters."""
    first = SCRIPTS[script]
    letters = [c for c in map(chr, range(first, first + 60)) if c.isalpha() and unicodedata.name(c).startswith(script)]
    return [a + b for a in letters for b in letters][:count]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"CYRILLIC": 100, "GREEK": 100, "ARABIC": 100}, True),
        ({"CYRILLIC": 100, "GREEK": 100, "ARABIC": 99}, False),
        ({"CYRILLIC": 300, "GREEK": 300}, False),
    ],
)
def test_three_scripts_make_a_vocabulary_multilingual(counts, expected, tmp_path):
    words = [word for script, count in counts.items() for word in words_of(script, count)]
    tokenizer = tokenizer_of(tmp_path, ["the", *words])
    assert is_multilingual(tokenizer, 2000) is expected
    texts, what = calibration_texts("auto", tokenizer, 2000)
    assert ("18 languages" in what) is expected
    assert any("человек" in text for text in texts) is expected and any("Congress" in text for text in texts)


def test_single_letters_and_mixed_words_are_no_words(tmp_path):
    letters = [chr(first + i) for first in SCRIPTS.values() for i in range(25)]
    assert not is_multilingual(tokenizer_of(tmp_path, [*letters, *(f"a{letter}" for letter in letters)] * 2), 2000)


def test_the_built_in_model_is_calibrated_in_english():
    tokenizer = load_tokenizer(builtin_path())
    assert not is_multilingual(tokenizer, 30528)
    texts, what = calibration_texts("auto", tokenizer, 30528)
    assert texts == builtin_texts("calibration") and what.startswith("built-in English prose")
    assert calibration_texts("multilingual", tokenizer, 30528)[0] != texts
    assert calibration_texts(["mine"], tokenizer, 30528) == (["mine"], "your texts")


def test_the_texts_are_in_the_languages_that_are_named():
    """One first article for each language, and every script in several words."""
    texts = [text for text in builtin_texts("multilingual") if text]
    assert len(texts) == len(set(texts)) and sum(len(text.encode()) for text in texts) < 40_000
    scripts = Counter(unicodedata.name(c, "?").split()[0] for text in texts for c in text if c.isalpha())
    wanted = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL", "THAI")
    assert min(scripts[script] for script in wanted) >= 50
    assert not set(texts) & set(builtin_texts("evaluation"))


def test_a_file_and_languages_contradict_each_other(tmp_path):
    (tmp_path / "mine.txt").write_text("one\n")
    assert CpuOptions(languages="multilingual").texts() == "multilingual"
    assert CpuOptions(calibration=tmp_path / "mine.txt").texts() == ["one"]
    with pytest.raises(InputError, match="languages is 'english' and calibration is a file"):
        CpuOptions(calibration=tmp_path / "mine.txt", languages="english").texts()


def test_an_export_says_which_texts_it_took(tmp_path):
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.quantization.recipes import calibrated

    folder, lines = make_family_checkpoint(tmp_path, "bert", "embed", num_hidden_layers=1), []
    spec = describe(folder).spec
    options = {"task": "embed", "max_length": spec.max_length, "pooling": "cls", "token_types": spec.token_types}
    graph = build_graphs(load_model(folder), **options)["onnxruntime"]
    found = calibrated(graph, spec, load_tokenizer(folder), "multilingual", lines.append)
    assert "tokens of built-in texts in 18 languages (--calibration takes your own texts)" in lines[0]
    assert found.texts[0].startswith("All human beings are born free")
