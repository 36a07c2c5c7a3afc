"""Compares answers, limits and labels with those of the checkpoint's own library."""

from typing import Any

from gte_deploy.core.errors import GteDeployError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.verification.answers.closeness import Closeness, Question
from gte_deploy.exporters.verification.answers.odd_texts import ODD_TEXTS, PLAIN_TEXTS, long_text, vocabulary_texts
from gte_deploy.exporters.verification.answers.source_libraries import AskedTexts, OpenLibrary, open_library, short
from gte_deploy.exporters.verification.answers.source_view import loadable
from gte_deploy.exporters.verification.answers.subject import Asked, Findings, Subject

# A longer text costs seconds on each side, and the comparison of token ids already covers texts above the limit.
_MAX_LENGTH = 512


def compare_answers(subject: Subject, findings: Findings) -> None:
    """Open the checkpoint in its own library, and compare both sides' answers to the same questions."""
    files = subject.files
    if files.has_adapter:
        findings.skipped.append("Answers were not compared: the checkpoint has an adapter, which peft has merged.")
        return
    if files.model != files.checkpoint and files.is_original:
        findings.skipped.append("Answers were not compared: an original checkpoint in a module's folder is not opened.")
        return
    if files.network is not None:
        findings.skipped.append(
            f"The network was not compared with the published one, whose code is the checkpoint's and never runs: the "
            f"library ran this package's network for {files.network}."
        )
    opened = loadable(
        files,
        tokenizer_class=subject.tokenizer_class,
        pad_token_id=subject.tokenizer.pad_token_id,
        pooling=subject.asked.pooling,
    )
    with opened as folder:
        library = open_library(folder, subject.model.spec, findings.skipped)
        if library is not None:
            stand_in = "" if files.network is None else " with the network of gte-deploy"
            findings.compared["library"] = library[1] + stand_in
            _compare_with(library[0], subject, findings)


def _compare_with(library: OpenLibrary, subject: Subject, findings: Findings) -> None:
    spec, limit = subject.model.spec, subject.asked.limit
    _compare_facts(spec, library, subject.asked, findings)
    has_own_limit = limit == "own" or (limit == "shorter" and library.limit <= spec.max_length)
    cut = min(spec.max_length, _MAX_LENGTH)
    if not has_own_limit or library.limit > _MAX_LENGTH:
        library.cut(cut)
    texts = [*PLAIN_TEXTS, " ".join(ODD_TEXTS[6:9]), "  white \n space  ", *vocabulary_texts(subject.tokenizer, 5)]
    given = AskedTexts(texts, long_text(subject.tokenizer, cut), cut, subject.tokenizer.mask_token)
    for question in library.questions(subject.model, given):
        _ask_both(question, subject.close, findings)


def _compare_facts(spec: ModelSpec, library: OpenLibrary, asked: Asked, findings: Findings) -> None:
    """Compare the spec with the limit, the similarity and the labels that the library states."""
    longer, shorter = spec.max_length > library.limit, spec.max_length < library.limit
    facts: list[tuple[str, Any, Any]] = []
    if asked.limit != "asked" and (longer or (shorter and asked.limit == "own")):
        facts.append(("longest input in tokens", spec.max_length, library.limit))
    if library.similarity is not None:
        facts.append(("similarity", spec.similarity or "cosine", library.similarity))
    if spec.task in ("classify", "token-classify"):
        labels = {int(index): str(label) for index, label in library.config.id2label.items()}
        facts.append(("labels", dict(spec.id2label), labels))
    for what, found, wanted in facts:
        if found != wanted:
            findings.fail(what, f"{what}: {found} here, {wanted} in {library.title}")


def _ask_both(question: Question, close: Closeness, findings: Findings) -> None:
    try:
        theirs = question.theirs()
    except Exception as error:  # another project's library raises errors of any kind
        findings.skipped.append(f"{question.what} was not compared: the library fails on it ({short(error)}).")
        return
    findings.count("answers", len(question.inputs))
    try:
        ours = question.ours()
    except GteDeployError as error:
        findings.fail(question.what, f"{question.named()} is refused: {error}")
        return
    if lines := close.differences(question, ours, theirs):
        findings.fail(question.what, *lines)
