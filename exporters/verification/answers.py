"""Text in, answer out: a bundle against the checkpoint's own library, which reads every file of it independently.

The comparison of graphs (`parity`) starts from token ids and from a PyTorch model that was built from the same reading
of the checkpoint's files. Whatever was misread there, a prompt, a limit, a tokenizer's setting, a pooling, is on both
of its sides. Here one side is AutoTokenizer, SentenceTransformer, CrossEncoder or a pipeline of transformers, which
are given the checkpoint's folder and nothing else. Nothing is downloaded and no code of a checkpoint is run.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Backend, Batch
from gte_deploy.backends.choice import ENGINE_OF
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.errors import BackendError, CheckpointError, GteDeployError, MissingDependencyError, ParityError
from gte_deploy.core.spec import ModelSpec, Precision
from gte_deploy.exporters.verification.checks import Check
from gte_deploy.exporters.verification.closeness import Closeness, Question, named
from gte_deploy.exporters.verification.odd_texts import (
    ODD_TEXTS,
    PLAIN_TEXTS,
    long_pairs,
    long_text,
    short_pairs,
    token_texts,
    vocabulary_texts,
)
from gte_deploy.exporters.verification.source_libraries import (
    SENTENCE_TRANSFORMERS,
    Library,
    Texts,
    library_of,
    open_library,
    short,
)
from gte_deploy.exporters.verification.source_view import SourceFiles, loadable, read_source, rotation_frequencies
from gte_deploy.loading import BackendName, load, stored_query_weights
from gte_deploy.model import Model
from gte_deploy.text.inputs import MAX_BATCH_TOKENS
from gte_deploy.text.tokenization import load_tokenizer

NAME = "answers"
# A longer text costs seconds of each side; where texts are cut at the limit itself is seen in the token ids.
_LONGEST_ASKED = 512
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Asked:
    """What an export was asked for in place of what the checkpoint says.

    Args:
        pooling: "mean" or "cls", or "auto".
        limit: whose limit the bundle has: the checkpoint's "own", one that was "asked" for, or one that may be
            "shorter" than the checkpoint's, of a bundle that does not say.
    """

    pooling: str = "auto"
    limit: Literal["own", "asked", "shorter"] = "own"


@dataclass
class _Findings:
    """What is found, as it is found; failures by what was asked."""

    failures: dict[str, list[str]] = field(default_factory=dict)
    compared: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        self.compared[what] = self.compared.get(what, 0) + number

    def fail(self, what: str, *lines: str) -> None:
        self.failures.setdefault(what, []).extend(lines)

    def check(self) -> Check:
        failures = []
        for what, lines in self.failures.items():
            more = [f"and {len(lines) - _MOST_SHOWN:,} more of {what}"] if len(lines) > _MOST_SHOWN else []
            failures += [*lines[:_MOST_SHOWN], *more]
        return Check(NAME, tuple(failures), self.compared, tuple(dict.fromkeys(self.skipped)))


def check_bundle(
    bundle: Path,
    checkpoint: Path,
    spec: ModelSpec,
    *,
    precision: Precision,
    backend: Backend | None,
    asked: Asked | None = None,
) -> Check:
    """Compare a bundle's folder, which needs no manifest yet, with the checkpoint that it was exported from.

    Where this machine cannot run it, PyTorch answers in its place, from the checkpoint as this package reads it, with
    the bundle's tokenizer and spec.

    Args:
        bundle: the folder; its tokenizer files are read.
        checkpoint: the folder of either layout.
        spec: of the bundle.
        precision: of the bundle.
        backend: runs the bundle's graph, and is closed here; None where this machine cannot run it.
        asked: what the export was asked for; None for nothing.
    """
    from gte_deploy.backends.torch import open_torch_backend

    skipped: list[str] = []
    if backend is None:
        backend, _ = open_torch_backend(checkpoint, task=spec.task)
        skipped.append("The engine's own answers were not compared: PyTorch gave them, with the bundle's tokenizer.")
    with contextlib.closing(_model(backend, bundle, spec)) as model:
        in_precision: Precision = "fp32" if backend.name == "torch" else precision
        check = check_answers(checkpoint, model, precision=in_precision, asked=asked)
    return dataclasses.replace(check, skipped=(*skipped, *check.skipped))


def verify_against(bundle: Path, checkpoint: Path) -> Check:
    """Compare a finished bundle with its checkpoint; a limit below the checkpoint's counts as asked for.

    Raises:
        BundleError: it is no bundle.
        ParityError: their answers differ.
        MissingDependencyError: the [export] extra is not installed.
    """
    for module in ("torch", "transformers", "onnxruntime"):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, "export")
    manifest, asked = read_manifest(bundle), Asked(limit="shorter")
    of_cpus: tuple[BackendName, ...] = ("onnx", "openvino")
    found: list[BackendName] = [name for name in of_cpus if ENGINE_OF[name] in manifest.graphs]
    engine = found[0] if found else None
    try:
        model = None if engine is None else load(bundle, backend=engine)
    except BackendError:  # its engine needs another machine
        model = None
    if model is None:
        check = check_bundle(bundle, checkpoint, manifest.spec, precision="fp32", backend=None, asked=asked)
    else:
        with contextlib.closing(model):
            check = check_answers(checkpoint, model, precision=manifest.precision, asked=asked)
    if not check.passed:
        raise ParityError(f"{bundle} does not answer as {checkpoint} does:\n  " + "\n  ".join(check.failures))
    return check


def check_answers(
    checkpoint: Path,
    model: Model,
    *,
    precision: Precision = "fp32",
    asked: Asked | None = None,
) -> Check:
    """Compare an open model with the checkpoint's own library: token ids on odd texts, then answers on a few.

    Args:
        checkpoint: the folder of either layout that the model came from.
        model: on any backend; it is left open.
        precision: of its weights; the bounds follow it.
        asked: what differs from the checkpoint on purpose; None for nothing.
    """
    findings, asked = _Findings(), asked or Asked()
    with _quiet():
        try:
            _compare_all(checkpoint, model, Closeness.of(precision), asked, findings)
        except CheckpointError as error:
            findings.skipped.append(f"The checkpoint's own library was not asked: {error}")
    return findings.check()


def _compare_all(checkpoint: Path, model: Model, close: Closeness, asked: Asked, findings: _Findings) -> None:
    from transformers import AutoTokenizer

    is_sentence = library_of(checkpoint, model.spec.task) == SENTENCE_TRANSFORMERS
    files = read_source(checkpoint, by_sentence_transformers=is_sentence)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            files.model, local_files_only=True, trust_remote_code=False, **files.tokenizer_arguments
        )
    except Exception as error:  # whatever a library of others raises
        findings.skipped.append(f"Token ids were not compared: AutoTokenizer does not read the checkpoint ({error}).")
        return
    # The class is looked up for the model type: under the native one it may be another.
    source = _Source(files, tokenizer, type(tokenizer).__name__)
    if files.lowercases:
        _lowercase(tokenizer)
    _compare_ids(model, source, findings)
    if files.config:
        _compare_rotation(files, findings)
    if files.has_adapter:
        findings.skipped.append("Answers were not compared: the checkpoint has an adapter, which peft has merged.")
    elif files.model != checkpoint and files.is_original:
        findings.skipped.append("Answers were not compared: an original checkpoint in a module's folder is not opened.")
    else:
        _compare_answers(model, source, close, asked, findings)


def _compare_answers(model: Model, source: "_Source", close: Closeness, asked: Asked, findings: _Findings) -> None:
    opened = loadable(
        source.files,
        tokenizer_class=source.tokenizer_class,
        pad_token_id=source.tokenizer.pad_token_id,
        pooling=asked.pooling,
    )
    with opened as folder:
        library = open_library(folder, model.spec, findings.skipped)
        if library is not None:
            findings.compared["library"] = library[1]
            _compare_library(model, library[0], source, close, asked, findings)


@dataclass(frozen=True)
class _Source:
    """A checkpoint as AutoTokenizer and plain JSON give it."""

    files: SourceFiles
    tokenizer: Any
    tokenizer_class: str

    @property
    def has_token_types(self) -> bool:
        return (
            self.files.config.get("type_vocab_size") or 0
        ) > 1 and "token_type_ids" in self.tokenizer.model_input_names


# --- what answers on our side ---------------------------------------------------------------------------------------


class _Recorder:
    """A backend that keeps each batch it is given, and answers zeros."""

    name = "recorder"
    device = "cpu"
    num_threads = 1
    outputs: tuple[str, ...] = ("last_hidden_state", "logits")
    precision: Precision = "fp32"

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.batches: list[Batch] = []

    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`."""
        self.batches.append(batch)
        return {name: np.zeros((len(batch.input_ids), self._spec.num_labels), np.float32) for name in outputs}

    def close(self) -> None:
        """See `Backend.close`."""


def _model(backend: Backend, bundle: Path, spec: ModelSpec) -> Model:
    tokenizer = load_tokenizer(bundle)
    return Model(
        backend,
        tokenizer,
        spec,
        max_batch_tokens=MAX_BATCH_TOKENS,
        path=bundle,
        backend_reason="a check",
        query_weights=None if spec.sparse is None else stored_query_weights(bundle, spec),
    )


# --- token ids ------------------------------------------------------------------------------------------------------


def _compare_ids(model: Model, source: _Source, findings: _Findings) -> None:
    """The ids, masks and token types that the model is fed, with AutoTokenizer's."""
    tokenizer, limit = source.tokenizer, model.spec.max_length
    written = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    long = long_text(tokenizer, limit)
    prompted = [prompt + text for prompt in model.spec.prompts.values() for text in PLAIN_TEXTS]
    texts = [*ODD_TEXTS, *PLAIN_TEXTS, *token_texts(written), *vocabulary_texts(tokenizer, 8), *prompted, long]
    tokenize = partial(model.tokenize, truncation=True)
    for batch in (*([text] for text in dict.fromkeys(texts)), [*PLAIN_TEXTS, "", long[:200]]):
        _compare_tokens(batch, partial(tokenize, batch), source, limit, findings)
    findings.compared["tokenizer"] = (
        f"{source.tokenizer_class} of transformers {importlib.metadata.version('transformers')}"
    )
    if model.spec.task == "classify":
        some = [*PLAIN_TEXTS[:4], *vocabulary_texts(tokenizer, 4)]
        for pair in (*short_pairs(some), *long_pairs(some, long)):
            _compare_tokens([pair], partial(_fed, model, pair), source, limit, findings)


def _fed(model: Model, pair: tuple[str, str]) -> dict[str, NDArray[np.int64]]:
    """What `predict` gives to the backend for one pair."""
    recorder = _Recorder(model.spec)
    recording = Model(
        recorder, model._tokenizer, model.spec, max_batch_tokens=MAX_BATCH_TOKENS, path=model.path, backend_reason=""
    )
    recording.predict([pair], prompt="", truncation=True)
    (batch,) = recorder.batches
    fed = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return fed if batch.token_type_ids is None else {**fed, "token_type_ids": batch.token_type_ids}


def _compare_tokens(
    inputs: Sequence[str | tuple[str, str]],
    ask: Callable[[], Mapping[str, NDArray[np.int64]]],
    source: _Source,
    limit: int,
    findings: _Findings,
) -> None:
    theirs = source.tokenizer(list(inputs), truncation=True, max_length=limit, padding=True, return_tensors="np")
    findings.count("pairs tokenised" if isinstance(inputs[0], tuple) else "texts tokenised", len(inputs))
    try:
        ours = ask()
    except GteDeployError as error:
        findings.fail("token ids", f"{named('token ids', inputs[0])} are refused: {error}")
        return
    for row, given in enumerate(inputs):
        wanted, found = (_real_rows(side, row, source) for side in (theirs, ours))
        for what in wanted:
            if wanted[what] != found[what]:
                findings.fail(what, f"{named(what, given)}: {_first_difference(found[what], wanted[what])}")
                break


def _real_rows(side: Mapping[str, Any], row: int, source: _Source) -> dict[str, list[int]]:
    """Ids and token types of the real tokens of a row, and what stands at its padding.

    Where a tokenizer pads on the left, the places differ and the tokens must not.
    """
    real = np.asarray(side["attention_mask"][row]) == 1
    ids = np.asarray(side["input_ids"][row])
    types = np.asarray(side["token_type_ids"][row]) if "token_type_ids" in side else np.zeros_like(ids)
    return {
        "token ids": ids[real].tolist(),
        "token types": types[real].tolist() if source.has_token_types else [],
        "padding": ids[~real].tolist(),
    }


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    if len(ours) != len(theirs):
        start = f"{len(ours):,} here and {len(theirs):,} there; "
    else:
        start = ""
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f"{start}from place {at} on {ours[at : at + 6]} here, {theirs[at : at + 6]} from AutoTokenizer"


def _lowercase(tokenizer: Any) -> None:
    from tokenizers import normalizers

    own = tokenizer.backend_tokenizer.normalizer
    steps = [normalizers.Lowercase(), *([] if own is None else [own])]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)


def _compare_rotation(source: SourceFiles, findings: _Findings) -> None:
    """RoPE as this package read it with RoPE as the formulas, or transformers, make it of the same config.json."""
    from transformers import AutoConfig
    from transformers.models.gte.modeling_gte import GteRotaryEmbedding

    from gte_deploy.models.config import read_config

    if source.is_original:
        wanted, scale = rotation_frequencies(source.config), 1.0
    else:
        config: Any = AutoConfig.from_pretrained(source.model, local_files_only=True, trust_remote_code=False)
        rotary: Any = GteRotaryEmbedding(config)
        wanted, scale = rotary.inv_freq.double().numpy(), rotary.attention_scaling
    rotary = GteRotaryEmbedding(read_config(source.model))
    found = rotary.inv_freq.double().numpy()
    findings.count("rotation frequencies", len(wanted))
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-5, atol=0):
        findings.fail(
            "rotation",
            f"rotation frequencies of config.json: {found[:4].tolist()}… here, {wanted[:4].tolist()}… by its formula",
        )
    if rotary.attention_scaling != scale:
        findings.fail("rotation", f"RoPE scales attention by {rotary.attention_scaling} here, by {scale} there")


# --- answers --------------------------------------------------------------------------------------------------------


def _compare_library(
    model: Model, library: Library, source: _Source, close: Closeness, asked: Asked, findings: _Findings
) -> None:
    _compare_facts(model.spec, library, asked, findings)
    as_it_is = asked.limit == "own" or (asked.limit == "shorter" and library.limit <= model.spec.max_length)
    cut = min(model.spec.max_length, _LONGEST_ASKED)
    if not as_it_is or library.limit > _LONGEST_ASKED:
        library.cut(cut)
    texts = [*PLAIN_TEXTS, " ".join(ODD_TEXTS[6:9]), "  white \n space  ", *vocabulary_texts(source.tokenizer, 5)]
    given = Texts(texts, long_text(source.tokenizer, cut), cut, source.tokenizer.mask_token)
    for question in library.questions(model, given):
        _put(question, close, findings)


def _compare_facts(spec: ModelSpec, library: Library, asked: Asked, findings: _Findings) -> None:
    """What the library says of itself with what the spec says."""
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


def _put(question: Question, close: Closeness, findings: _Findings) -> None:
    try:
        theirs = question.theirs()
    except Exception as error:  # whatever a library of others raises
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and progress bars of the libraries: what they complain of is compared."""
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
