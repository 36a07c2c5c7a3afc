"""The built-in texts for calibrating INT8: English prose, or several languages for a vocabulary of several scripts."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

from family_checkpoints import make_family_checkpoint  # noqa: E402
from gte_deploy.bundle.manifest import read_manifest  # noqa: E402
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
    found = calibration_texts(tokenizer, 2000)
    assert ("20 languages" in found.source) is (len(found.languages) == 20) is expected
    assert any("человек" in text for text in found.texts) is expected
    assert any("Congress" in text for text in found.texts)


def test_single_letters_and_mixed_words_are_no_words(tmp_path):
    letters = [chr(first + i) for first in SCRIPTS.values() for i in range(25)]
    assert not is_multilingual(tokenizer_of(tmp_path, [*letters, *(f"a{letter}" for letter in letters)] * 2), 2000)


def test_the_built_in_model_is_calibrated_in_english():
    tokenizer = load_tokenizer(builtin_path())
    assert not is_multilingual(tokenizer, 30528)
    found = calibration_texts(tokenizer, 30528)
    assert found.texts == [text for text in builtin_texts("calibration") if text] and found.languages == ("en",)
    assert found.source.startswith("built-in English prose") and [*found.held_out] == ["en"]
    assert calibration_texts(tokenizer, 30528, languages="multilingual").texts != found.texts


def test_what_a_manifest_says_about_the_texts(tmp_path):
    """The digest is that of the file, as sha256sum prints it for lines that are not blank."""
    file = tmp_path / "mine.txt"
    file.write_text("one\nzwei\n", encoding="utf-8")
    tokenizer = load_tokenizer(builtin_path())
    entry = calibration_texts(tokenizer, 30528, file=file).entry
    assert (entry.source, entry.languages, entry.texts) == ("your texts in mine.txt", (), 2)
    assert entry.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(tmp_path) not in entry.describe()


def test_the_texts_are_in_the_languages_that_are_named():
    """One first article for each language, and every script in several words."""
    texts = [text for text in builtin_texts("multilingual") if text]
    assert len(texts) == len(set(texts)) and sum(len(text.encode()) for text in texts) < 40_000
    scripts = Counter(unicodedata.name(c, "?").split()[0] for text in texts for c in text if c.isalpha())
    wanted = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL", "THAI")
    assert min(scripts[script] for script in wanted) >= 50
    assert not set(texts) & set(builtin_texts("evaluation"))


def test_languages_choose_what_measures_a_users_calibration(tmp_path):
    (tmp_path / "mine.txt").write_text("one\n")
    tokenizer = load_tokenizer(builtin_path())
    for languages, count in (("auto", 1), ("english", 1), ("multilingual", 20)):
        found = calibration_texts(tokenizer, 30528, languages=languages, file=tmp_path / "mine.txt")
        assert (found.texts, len(found.held_out)) == (["one"], count)


def test_an_export_says_which_texts_it_took(tmp_path):
    from gte_deploy.exporters.graph.build import build_graphs
    from gte_deploy.exporters.quantization.recipes import calibrated

    folder, lines = make_family_checkpoint(tmp_path, "bert", "embed", num_hidden_layers=1), []
    spec = describe(folder).spec
    options = {"task": "embed", "max_length": spec.max_length, "pooling": "cls", "token_types": spec.token_types}
    graph = build_graphs(load_model(folder), **options)["onnxruntime"]
    tokenizer = load_tokenizer(folder)
    chosen = calibration_texts(tokenizer, spec.vocab_size, languages="multilingual")
    found = calibrated(graph, spec, tokenizer, chosen, lines.append)
    assert "tokens of built-in texts in 20 languages (--calibration takes your own texts)" in lines[0]
    assert len(found.held_out) == 20
    assert found.texts[0].startswith("All human beings are born free")


def test_a_bundle_names_its_texts_and_its_accuracy_in_each_language(tmp_path, monkeypatch):
    from gte_deploy.exporters import export as export_module

    monkeypatch.setattr(export_module, "EVALUATION_TOKENS", 200)
    folder = make_family_checkpoint(tmp_path / "xlm-r", "xlm-roberta", "embed", num_hidden_layers=1)
    options = {"precision": "int8", "languages": "multilingual", "bounds": "report"}
    result = export_module.export(folder, tmp_path / "bundle", **options)
    entry = read_manifest(result.path).calibration
    assert entry == result.manifest.calibration and len(entry.languages) == 20 and entry.texts == 116
    texts = calibration_texts(load_tokenizer(folder), 200, languages="multilingual").texts
    assert entry.sha256 == hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()
    report = json.loads((result.path / "report.json").read_text(encoding="utf-8"))
    assert report["calibration"]["sha256"] == entry.sha256
    for engine in report["parity"]["engines"]:
        accuracy = engine["accuracy"]
        assert tuple(accuracy["languages"]) == entry.languages
        assert sum(own["tokens"] for own in accuracy["languages"].values()) == accuracy["tokens"]
        assert min(own["tokens"] for own in accuracy["languages"].values()) > 0
    page = (result.path / "report.html").read_text(encoding="utf-8")
    assert "tokens of texts in 20 languages" in page and "onnxruntime int8, by language" in page
    assert "<dd>116 texts: built-in texts in 20 languages" in page and entry.sha256 in page
