"""The texts of an export, for calibration and for measuring the accuracy, and what is doubtful in a user's own."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gte_deploy.core.errors import InputError
from gte_deploy.exporters.options import ExportRequest
from gte_deploy.exporters.targets.calibration import CalibrationOptions
from gte_deploy.exporters.verification.texts import (
    OWN,
    CalibrationTexts,
    ChosenTexts,
    EvaluationTexts,
    Languages,
    calibration_texts,
    evaluation_texts,
)
from gte_deploy.text.tokenization import TextTokenizer

# The measurements behind these numbers are in docs/numerics.md, "Your own texts".
_FEW_TOKENS = 1000
_FREQUENT = 30
"""Number of the most frequent words that tell languages apart."""
_FEW_FREQUENT = 0.5
"""Texts in one language have nine in ten of each other's most frequent words, texts in related ones at most 0.6."""
_MANY_UNKNOWN = 0.1
_ALL_UNKNOWN = 0.9
_READ_TOKENS = 50_000  # a file is judged by its first texts


def choose_texts(request: ExportRequest, tokenizer: TextTokenizer, vocab_size: int) -> ChosenTexts:
    """Return the texts of an export, as its options and the vocabulary choose them.

    Args:
        request: the export.
        tokenizer: the model's tokenizer.
        vocab_size: number of rows of the model's vocabulary.

    Raises:
        InputError: a file cannot be read, or the tokenizer knows almost none of its words.
    """
    if request.precision == "fp32":
        return ChosenTexts(None, EvaluationTexts({}, ""))  # it is compared on batches alone
    options = request.target.options
    has_ranges = isinstance(options, CalibrationOptions) and request.precision in ("int8", "fp8")
    languages: Languages = options.languages if has_ranges else "auto"
    file = request.options.eval_texts
    evaluation = evaluation_texts(tokenizer, vocab_size, languages=languages, file=file and Path(file))
    remarks: list[str] = []
    if file is not None:
        own = _Words(evaluation.texts[OWN], tokenizer)
        remarks += own.remarks(evaluation.source, "the accuracy on so few is a rough estimate")
    if not has_ranges:
        return ChosenTexts(None, evaluation, remarks)
    file = options.calibration
    calibration = calibration_texts(
        tokenizer, vocab_size, languages=languages, file=file and Path(file), evaluation=evaluation
    )
    if file is not None:
        own = _Words(calibration.texts, tokenizer)
        remarks += own.remarks(calibration.source, "ranges from so few clip other texts")
        remarks += _differences(own, calibration, evaluation, tokenizer)
    return ChosenTexts(calibration, evaluation, remarks)


class _Words:
    """The tokens of texts, without special ones: how many there are, how many are unknown, and which are words."""

    def __init__(self, texts: Sequence[str], tokenizer: TextTokenizer) -> None:
        special = {*tokenizer.template.prefix, *tokenizer.template.suffix}
        self.tokens = self.unknown = 0
        self.counts: Counter[int] = Counter()
        for text in texts:
            (row,) = tokenizer.encode_texts([text], max_length=_READ_TOKENS, truncation=True)
            found = [token for token in row if token not in special]
            self.tokens += len(found)
            self.unknown += sum(token == tokenizer.unk_token_id for token in found)
            self.counts.update(found)
            if self.tokens >= _READ_TOKENS:
                break
        for token in list(self.counts):
            if not any(letter.isalpha() for letter in tokenizer.id_to_token(token) or ""):
                del self.counts[token]

    def remarks(self, source: str, consequence: str) -> list[str]:
        """Return the doubts about the texts alone.

        Raises:
            InputError: almost all tokens are unknown.
        """
        share = self.unknown / max(self.tokens, 1)
        if share > _ALL_UNKNOWN:
            raise InputError(
                f"{source}: the model's vocabulary does not know {share:.0%} of the tokens; expected texts in a "
                "language and script of the model"
            )
        found = []
        if self.tokens < _FEW_TOKENS:
            found.append(
                f"{source}: {self.tokens:,} tokens, and {consequence}; give {_FEW_TOKENS:,} or more, some hundred texts"
            )
        if share > _MANY_UNKNOWN:
            found.append(f"{source}: the model's vocabulary does not know {share:.0%} of the tokens")
        return found


def _differences(
    own: _Words, calibration: CalibrationTexts, evaluation: EvaluationTexts, tokenizer: TextTokenizer
) -> list[str]:
    """Return the doubts about calibration texts beside those that measure the accuracy."""
    found, far = [], []
    for language, texts in evaluation.texts.items():
        frequent = [token for token, _ in _Words(texts, tokenizer).counts.most_common(_FREQUENT)]
        if sum(token in own.counts for token in frequent) < _FEW_FREQUENT * len(frequent):
            far.append(language)
    if far:
        what = "" if far == [OWN] else f" in {', '.join(far)}"
        found.append(
            f"{calibration.source} lack most of the frequent words of the texts that measure the accuracy{what}: "
            f"{evaluation.source}. INT8 and FP8 clip what calibration has not seen. Calibrate on texts in all "
            "languages that the model will read; if it will read only such as these, give others to --eval-texts."
        )
    read = set(calibration.texts)
    if same := sum(text in read for texts in evaluation.texts.values() for text in texts):
        found.append(
            f"{same:,} texts of {evaluation.source} are also in {calibration.source}: the accuracy on them is better "
            "than on texts that calibration has not seen"
        )
    return found
