"""A user's own texts for calibration and for the verdict: what is doubtful in them is told before the work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.exporters.export import export
from gte_deploy.exporters.options import make_request
from gte_deploy.exporters.text_choice import choose_texts
from gte_deploy.exporters.verification.texts import ChosenTexts, builtin_texts
from gte_deploy.models import builtin_path
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer

ENGLISH = [text for text in builtin_texts("calibration") if text]
HELD_OUT = [text for text in builtin_texts("evaluation") if text]


def declaration(language: str) -> list[str]:
    """The articles of the Universal Declaration of Human Rights in a language."""
    lines = [line.partition(" ") for line in builtin_texts("multilingual-evaluation")]
    return [text for code, _, text in lines if code == language]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(builtin_path())


def written(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def chosen(tokenizer: TextTokenizer, **options: object) -> ChosenTexts:
    return choose_texts(make_request(**{"precision": "int8", **options}), tokenizer, 30528)


def test_built_in_texts_and_good_texts_raise_no_doubt(tokenizer, tmp_path):
    assert not chosen(tokenizer).remarks
    assert not chosen(tokenizer, languages="multilingual").remarks
    own = written(tmp_path / "own.txt", ENGLISH[:30])
    assert not chosen(tokenizer, calibration=own).remarks
    assert not chosen(tokenizer, calibration=own, eval_texts=written(tmp_path / "eval.txt", HELD_OUT[:40])).remarks


def test_few_texts_are_told(tokenizer, tmp_path):
    (line,) = chosen(tokenizer, calibration=written(tmp_path / "own.txt", ENGLISH[:5])).remarks
    assert line.startswith("your texts in own.txt: ") and "ranges from so few clip other texts" in line
    (line,) = chosen(tokenizer, eval_texts=written(tmp_path / "own.txt", HELD_OUT[:3])).remarks
    assert "the accuracy on so few is a rough estimate; give 1,000 or more" in line


@pytest.mark.parametrize("language", ["fr", "de", "es", "nl", "ru", "ar", "ja", "ko", "vi"])
def test_texts_in_another_language_are_told(tokenizer, tmp_path, language):
    own = written(tmp_path / "own.txt", declaration(language) * 3)
    lines = chosen(tokenizer, calibration=own).remarks
    assert any("lack most of the frequent words" in line and "in en: built-in English prose" in line for line in lines)
    # They are right for a model that reads only such texts, which measure the accuracy then.
    lines = chosen(tokenizer, calibration=own, eval_texts=written(tmp_path / "eval.txt", declaration(language))).remarks
    assert not any("lack" in line for line in lines)


def test_each_language_that_calibration_lacks_is_named(tokenizer, tmp_path):
    own = written(tmp_path / "own.txt", ENGLISH + declaration("fr") + declaration("ru"))
    line, same = chosen(tokenizer, calibration=own, languages="multilingual").remarks
    named = line.partition("measure the accuracy in ")[2].partition(":")[0].split(", ")
    assert {"de", "ja", "ar"} <= set(named) and not {"en", "fr", "ru"} & set(named)
    assert "are also in your texts in own.txt" in same  # those in French and Russian


def test_words_that_the_vocabulary_does_not_know(tokenizer, tmp_path):
    """bert-base-uncased has no Thai letters."""
    thai = declaration("th")
    with pytest.raises(InputError, match=r"your texts in own\.txt: .* does not know 100% of the tokens"):
        chosen(tokenizer, calibration=written(tmp_path / "own.txt", thai))
    with pytest.raises(InputError, match="does not know"):
        chosen(tokenizer, eval_texts=written(tmp_path / "own.txt", thai))
    mixed = [f"{text} {' '.join(thai[0].split()[:1] * (len(text.split()) // 4))}" for text in ENGLISH[:30]]
    lines = chosen(tokenizer, calibration=written(tmp_path / "own.txt", mixed)).remarks
    assert any(line.startswith("your texts in own.txt: the model's vocabulary does not know 1") for line in lines)


def test_texts_that_calibrate_and_judge_are_told(tokenizer, tmp_path):
    own, judge = written(tmp_path / "own.txt", ENGLISH), written(tmp_path / "eval.txt", ENGLISH[:40] + HELD_OUT)
    (line,) = chosen(tokenizer, calibration=own, eval_texts=judge).remarks
    assert line.startswith("40 texts of your texts in eval.txt are also in your texts in own.txt")


def test_what_a_verdict_leaves_out_of_a_users_texts_is_held_out(tokenizer, tmp_path):
    judge = written(tmp_path / "eval.txt", HELD_OUT)
    found = chosen(tokenizer, eval_texts=judge)
    assert (
        found.calibration is not None
        and found.evaluation.texts == {"own": HELD_OUT}
        and [*found.calibration.held_out] == ["en", "own"]
    )


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"format": "executorch"}])
def test_fp32_has_no_texts_to_judge_by(tmp_path, options):
    with pytest.raises(InputError, match="eval_texts is for precision .*int8.*, and the precision is fp32"):
        make_request(**options, eval_texts=written(tmp_path / "own.txt", ENGLISH))


def request(option: str, file: Path) -> None:
    given: dict[str, Any] = {option: file}
    make_request(precision="int8", **given)


@pytest.mark.parametrize("option", ["calibration", "eval_texts"])
def test_a_file_that_cannot_be_read_is_refused_before_the_work(tmp_path, option):
    with pytest.raises(InputError, match=r"missing\.txt cannot be read"):
        request(option, tmp_path / "missing.txt")
    with pytest.raises(InputError, match="holds no text"):
        request(option, written(tmp_path / "empty.txt", [" "]))


def test_a_verdict_on_a_users_texts(tmp_path):
    """The report names the texts and counts their tokens as the tokenizers library does."""
    from tokenizers import Tokenizer

    texts = HELD_OUT[:20]
    file, lines = written(tmp_path / "mine.txt", texts), []
    options = {"precision": "int8-weight", "max_length": 64, "eval_texts": file}
    result = export(None, tmp_path / "bundle", **options, progress=lines.append)
    library = Tokenizer.from_file(str(builtin_path() / "tokenizer.json"))
    library.no_truncation()
    words = sum(len(library.encode(text, add_special_tokens=False).ids) for text in texts)
    accuracy = result.parity.engines[0].accuracy
    # Each word once in its text and once in a window, beside the special tokens of each piece.
    assert accuracy is not None and 2 * words < accuracy.tokens < 2.2 * words and accuracy.is_own
    report = json.loads((result.path / "report.json").read_text(encoding="utf-8"))
    named = report["parity"]["texts"]
    assert (named["source"], named["texts"], named["languages"]) == ("your texts in mine.txt", 20, [])
    assert named["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"accuracy on {accuracy.tokens:,} tokens of your texts in mine.txt" in lines
    page = (result.path / "report.html").read_text(encoding="utf-8")
    assert f"{accuracy.tokens:,} tokens of your texts" in page
    assert f"20 texts: your texts in mine.txt; sha256 {named['sha256']}" in page
    warned = "warning: your texts in mine.txt: "
    early = [line for line in lines[: lines.index("load the weights")] if line.startswith(warned)]
    assert bool(early) is (words < 1000) and [line.removeprefix("warning: ") for line in early] == [
        line for line in result.parity.caveats if line.startswith("your texts")
    ]


def test_a_users_texts_decide_the_verdict(tmp_path):
    """Calibrated on English prose, the built-in model in INT8 keeps its bounds there and misses them on Japanese."""
    options = {"precision": "int8", "max_length": 64, "bounds": "report"}
    japanese = written(tmp_path / "ja.txt", declaration("ja"))
    found = export(None, tmp_path / "bundle", **options, eval_texts=japanese)
    assert any("on text: token cosine" in line for line in found.manifest.missed_bounds)
