"""Compares the answers of a bundle with those of the checkpoint's own library, from text to answer.

The comparison of graphs (`verification.parity`) starts from token ids and from a PyTorch model that this package built.
If this package misreads a prompt, a limit, a tokenizer's setting or a pooling, both sides of that comparison are wrong.
Here one side is AutoTokenizer, SentenceTransformer, CrossEncoder or a pipeline of transformers, which reads every file
of the checkpoint's folder for itself. Nothing is downloaded, and no code of a checkpoint runs.

To add a check, write a function of type `AnswerCheck` in a module here, and add it to `CHECKS`.
"""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gte_deploy.backends.choice import ENGINE_OF
from gte_deploy.bundle.manifest import Manifest, read_manifest
from gte_deploy.core.errors import BackendError, CheckpointError, ParityError, require_modules
from gte_deploy.core.spec import BackendName, Precision
from gte_deploy.exporters.verification.answers.closeness import Closeness
from gte_deploy.exporters.verification.answers.library import compare_answers
from gte_deploy.exporters.verification.answers.rotation import compare_rotation
from gte_deploy.exporters.verification.answers.source_libraries import SENTENCE_TRANSFORMERS_NAME, library_of
from gte_deploy.exporters.verification.answers.source_view import read_source
from gte_deploy.exporters.verification.answers.subject import AnswerCheck, Asked, Findings, Subject
from gte_deploy.exporters.verification.answers.token_ids import compare_token_ids
from gte_deploy.exporters.verification.checks import Check
from gte_deploy.loading import load, open_folder
from gte_deploy.model import Model

CHECKS: tuple[AnswerCheck, ...] = (compare_token_ids, compare_rotation, compare_answers)

_PYTORCH_ANSWERED = "The engine was not compared: PyTorch computed the answers, with the bundle's tokenizer."


def check_bundle(checkpoint: Path, model: Model, precision: Precision, asked: Asked | None = None) -> Check:
    """Compare a bundle's open model with the checkpoint that the bundle was exported from.

    Args:
        checkpoint: the checkpoint's folder, in either layout.
        model: the bundle's model; it stays open. It runs on PyTorch if this machine cannot run the bundle's engine:
            then only the bundle's tokenizer and spec are compared, and the result says so.
        precision: the bundle's precision, which sets the bounds.
        asked: the options of the export; None for the defaults.
    """
    on_torch = model.backend == "torch"
    check = check_answers(checkpoint, model, precision="fp32" if on_torch else precision, asked=asked)
    return dataclasses.replace(check, skipped=(_PYTORCH_ANSWERED, *check.skipped)) if on_torch else check


def verify_against(bundle: Path, checkpoint: Path) -> Check:
    """Compare a finished bundle with its checkpoint; a limit below the checkpoint's is no failure.

    Raises:
        BundleError: `bundle` is not a bundle.
        ParityError: the answers of the bundle and the checkpoint differ.
        MissingDependencyError: the [export] extra is not installed.
    """
    require_modules("torch", "transformers", "onnxruntime", extra="export")
    manifest = read_manifest(bundle)
    with contextlib.closing(_open(bundle, manifest, checkpoint)) as model:
        check = check_bundle(checkpoint, model, manifest.precision, Asked(limit="shorter"))
    if not check.passed:
        raise ParityError(f"{bundle} does not answer as {checkpoint} does:\n  " + "\n  ".join(check.failures))
    return check


def _open(bundle: Path, manifest: Manifest, checkpoint: Path) -> Model:
    """Open a bundle on its engine for CPUs; if none runs here, on PyTorch with the checkpoint's weights."""
    from gte_deploy.backends.torch import open_torch_backend

    engines: tuple[BackendName, ...] = ("onnx", "openvino", "executorch")
    for engine in engines:
        if ENGINE_OF[engine] in manifest.graphs:
            try:
                return load(bundle, backend=engine)
            except BackendError:  # its engine needs another machine
                break
    backend, _ = open_torch_backend(checkpoint, task=manifest.spec.task)
    return open_folder(bundle, backend, manifest.spec)


def check_answers(
    checkpoint: Path, model: Model, *, precision: Precision = "fp32", asked: Asked | None = None
) -> Check:
    """Run every check of `CHECKS` on an open model and its checkpoint.

    Args:
        checkpoint: the folder, in either layout, that the model came from.
        model: the model, on any backend; it stays open.
        precision: the precision of the model's weights, which sets the bounds.
        asked: the options of the export; None for the defaults.
    """
    findings = Findings()
    with _quiet():
        try:
            subject = _subject(checkpoint, model, Closeness.of(precision), asked or Asked(), findings)
            if subject is not None:
                for check in CHECKS:
                    check(subject, findings)
        except CheckpointError as error:
            findings.skipped.append(f"The checkpoint's own library was not used: {error}")
    return findings.check()


def _subject(checkpoint: Path, model: Model, close: Closeness, asked: Asked, findings: Findings) -> Subject | None:
    """Return both sides, or None if AutoTokenizer does not read the checkpoint."""
    from transformers import AutoTokenizer

    is_sentence = library_of(checkpoint, model.spec.task) == SENTENCE_TRANSFORMERS_NAME
    files = read_source(checkpoint, by_sentence_transformers=is_sentence)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            files.model, local_files_only=True, trust_remote_code=False, **files.tokenizer_arguments
        )
    except Exception as error:  # another project's library raises errors of any kind
        findings.skipped.append(f"Token ids were not compared: AutoTokenizer does not read the checkpoint ({error}).")
        return None
    return Subject(model, files, tokenizer, type(tokenizer).__name__, close, asked)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings and progress bars: the checks compare what they would warn of."""
    from transformers.utils import logging as hf_logging

    previous = logging.root.manager.disable
    bars = hf_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(previous, logging.ERROR))
        hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(previous)
            if bars:
                hf_logging.enable_progress_bar()
