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
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Backend, Batch
from gte_deploy.batching import collate
from gte_deploy.bundle import read_manifest
from gte_deploy.checkpoint_spec import read_json
from gte_deploy.errors import CheckpointError, GteDeployError, MissingDependencyError, ParityError
from gte_deploy.exporters.accuracy import ACCURACY_BOUNDS
from gte_deploy.exporters.checks import Check
from gte_deploy.exporters.odd_texts import ODD_TEXTS, PLAIN_TEXTS, long_text, pairs_of, token_texts, vocabulary_texts
from gte_deploy.exporters.source_view import is_original, loadable, rotation_frequencies
from gte_deploy.inputs import MAX_BATCH_TOKENS
from gte_deploy.model import Model
from gte_deploy.spec import ModelSpec, Precision, Target, Task
from gte_deploy.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

NAME = "answers"
# A longer text costs seconds of each side; where texts are cut at the limit itself is seen in the token ids.
_LONGEST_ASKED = 512
_MOST_FAILURES = 10
_TOP_K = 5
_LOOKED_AT = 50
_SHOWN = 60

_Numbers = NDArray[np.floating[Any]]


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
    """What is found, as it is found."""

    failures: list[str] = field(default_factory=list)
    compared: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        self.compared[what] = self.compared.get(what, 0) + number

    def check(self) -> Check:
        failures = self.failures[:_MOST_FAILURES]
        if len(self.failures) > _MOST_FAILURES:
            failures.append(f"and {len(self.failures) - _MOST_FAILURES:,} more")
        return Check(NAME, tuple(failures), self.compared, tuple(self.skipped))


def library_of(checkpoint: Path, task: Task) -> str:
    """The name of the library that answers for a checkpoint, for people."""
    if task == "classify" or (checkpoint / "modules.json").is_file() and task not in ("fill-mask", "token-classify"):
        return "sentence-transformers"
    return "transformers"


def check_bundle(
    bundle: Path,
    checkpoint: Path,
    spec: ModelSpec,
    *,
    precision: Precision,
    graph: Path | None,
    target: Target = "cpu",
    asked: Asked | None = None,
) -> Check:
    """Compare a bundle's folder, which needs no manifest yet, with the checkpoint that it was exported from.

    Where its graph runs on a GPU alone and there is none, PyTorch answers in its place, from the checkpoint as this
    package reads it, with the bundle's tokenizer and spec.

    Args:
        bundle: the folder; its tokenizer files are read.
        checkpoint: the folder of either layout.
        spec: of the bundle.
        precision: of the bundle.
        graph: of ONNX Runtime, or None.
        target: what that is made for.
        asked: what the export was asked for; None for nothing.
    """
    skipped: list[str] = []
    backend = _open_backend(checkpoint, spec, graph, target, skipped)
    answering = backend if backend is not None else _Recorder(spec)
    with contextlib.closing(_model(answering, bundle, spec)) as model:
        in_precision: Precision = "fp32" if answering.name == "torch" else precision
        check = check_answers(checkpoint, model, precision=in_precision, asked=asked, ids_only=backend is None)
    return dataclasses.replace(check, skipped=(*skipped, *check.skipped))


def verify_against(bundle: Path, checkpoint: Path) -> Check:
    """Compare a finished bundle with its checkpoint; a limit below the checkpoint's counts as asked for.

    Raises:
        BundleError: it is no bundle.
        ParityError: their answers differ.
        MissingDependencyError: torch or transformers is not installed.
    """
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, "torch")
    manifest = read_manifest(bundle)
    entry = manifest.graphs.get("onnxruntime")
    check = check_bundle(
        bundle,
        checkpoint,
        manifest.spec,
        precision=manifest.precision,
        graph=None if entry is None else bundle / entry.path,
        target=manifest.target,
        asked=Asked(limit="shorter"),
    )
    if not check.passed:
        raise ParityError(f"{bundle} does not answer as {checkpoint} does:\n  " + "\n  ".join(check.failures))
    return check


def check_answers(
    checkpoint: Path,
    model: Model,
    *,
    precision: Precision = "fp32",
    asked: Asked | None = None,
    ids_only: bool = False,
) -> Check:
    """Compare an open model with the checkpoint's own library: token ids on odd texts, then answers on a few.

    Args:
        checkpoint: the folder of either layout that the model came from.
        model: on any backend; it is left open.
        precision: of its weights; the bounds follow it.
        asked: what differs from the checkpoint on purpose; None for nothing.
        ids_only: whether the model cannot answer here.
    """
    findings, asked = _Findings(), asked or Asked()
    with _quiet():
        try:
            _compare_all(checkpoint, model, _Closeness.of(precision), asked, ids_only, findings)
        except CheckpointError as error:
            findings.skipped.append(f"The checkpoint's own library was not asked: {error}")
    return findings.check()


def _compare_all(
    checkpoint: Path, model: Model, close: "_Closeness", asked: Asked, ids_only: bool, findings: _Findings
) -> None:
    from transformers import AutoTokenizer

    config = read_json(checkpoint / "config.json")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a library of others raises
        findings.skipped.append(f"Token ids were not compared: AutoTokenizer does not read the checkpoint ({error}).")
        return
    # The class is looked up for the model type: under the native one it may be another.
    source = _Source(checkpoint, config, tokenizer, type(tokenizer).__name__)
    if _lowercases(checkpoint, model.spec.task):
        _lowercase(tokenizer)
    _compare_ids(model, source, findings)
    _compare_rotation(source, findings)
    if ids_only:
        return
    opened = loadable(
        checkpoint,
        tokenizer_class=source.tokenizer_class,
        pad_token_id=tokenizer.pad_token_id,
        pooling=asked.pooling,
    )
    with opened as folder:
        library = _open_library(folder, model.spec, findings)
        if library is not None:
            _compare_library(model, library, source, close, asked, findings)


@dataclass(frozen=True)
class _Source:
    """A checkpoint as AutoTokenizer and plain JSON give it."""

    checkpoint: Path
    config: Mapping[str, Any]
    tokenizer: Any
    tokenizer_class: str

    @property
    def has_token_types(self) -> bool:
        return (self.config.get("type_vocab_size") or 0) > 1 and "token_type_ids" in self.tokenizer.model_input_names


# --- what answers on our side ---------------------------------------------------------------------------------------


class _Recorder:
    """A backend that keeps each batch it is given, and answers zeros."""

    name = "recorder"
    device = "cpu"
    num_threads = 1
    outputs = ("last_hidden_state", "logits")
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
    return Model(backend, tokenizer, spec, max_batch_tokens=MAX_BATCH_TOKENS, path=bundle, backend_reason="a check")


def _open_backend(
    checkpoint: Path, spec: ModelSpec, graph: Path | None, target: Target, skipped: list[str]
) -> Backend | None:
    from gte_deploy.backends.onnx_backend import OnnxBackend
    from gte_deploy.backends.torch_backend import open_torch_backend
    from gte_deploy.exporters.cuda_graph import has_cuda

    if graph is not None and (target == "cpu" or has_cuda()):
        return OnnxBackend(graph, spec, device="cuda" if target == "cuda" else "cpu")
    backend = open_torch_backend(checkpoint)
    if backend.spec.task != spec.task:
        skipped.append(f"Answers were not compared: no engine of this bundle runs here, for task {spec.task}.")
        return None
    skipped.append("The engine's own answers were not compared: PyTorch gave them, with the bundle's tokenizer.")
    return backend


# --- token ids ------------------------------------------------------------------------------------------------------


def _compare_ids(model: Model, source: _Source, findings: _Findings) -> None:
    """The ids, masks and token types that the model is fed, with AutoTokenizer's."""
    tokenizer, limit = source.tokenizer, model.spec.max_length
    written = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    long = long_text(tokenizer, limit)
    prompted = [prompt + text for prompt in model.spec.prompts.values() for text in PLAIN_TEXTS]
    texts = [*ODD_TEXTS, *PLAIN_TEXTS, *token_texts(written), *vocabulary_texts(tokenizer, 8), *prompted, long]
    for text in dict.fromkeys(texts):
        _compare_tokens([text], lambda t=text: model.tokenize([t], truncation=True), source, limit, findings)
    batch = [*PLAIN_TEXTS, "", long[:200]]
    _compare_tokens(batch, lambda: model.tokenize(batch, truncation=True), source, limit, findings)
    findings.compared["tokenizer"] = f"{source.tokenizer_class} of transformers {_version('transformers')}"
    if model.spec.task == "classify":
        for pair in pairs_of([*PLAIN_TEXTS[:4], *vocabulary_texts(tokenizer, 4)], long):
            _compare_tokens([pair], lambda p=pair: _fed(model, p), source, limit, findings)


def _fed(model: Model, pair: tuple[str, str]) -> dict[str, NDArray[np.int64]]:
    """What `predict` gives to the backend for one pair."""
    recorder = _Recorder(model.spec)
    recording = Model(
        recorder, model._tokenizer, model.spec, max_batch_tokens=MAX_BATCH_TOKENS, path=model.path, backend_reason=""
    )
    recording.predict([pair], truncation=True)
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
        findings.failures.append(f"{_named('token ids', inputs[0])} are refused: {error}")
        return
    for row, given in enumerate(inputs):
        wanted, found = (_real_rows(side, row, source) for side in (theirs, ours))
        for what in wanted:
            if wanted[what] != found[what]:
                difference = _first_difference(found[what], wanted[what])
                findings.failures.append(f"{_named(what, given)}: {difference}")
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


def _lowercases(checkpoint: Path, task: Task) -> bool:
    """Whether sentence-transformers lower-cases texts, whatever the tokenizer does."""
    modules = read_json(checkpoint / "modules.json")
    if not modules or library_of(checkpoint, task) != "sentence-transformers":
        return False
    config = read_json(checkpoint / str(modules[0].get("path", "")) / "sentence_bert_config.json") or {}
    return config.get("do_lower_case") is True


def _lowercase(tokenizer: Any) -> None:
    from tokenizers import normalizers

    own = tokenizer.backend_tokenizer.normalizer
    steps = [normalizers.Lowercase(), *([] if own is None else [own])]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)


def _compare_rotation(source: _Source, findings: _Findings) -> None:
    """RoPE as this package read it with RoPE as the formulas, or transformers, make it of the same config.json."""
    from transformers import AutoConfig
    from transformers.models.gte.modeling_gte import GteRotaryEmbedding

    from gte_deploy.models.config import read_config

    if is_original(source.checkpoint):
        wanted, scale = rotation_frequencies(source.config), 1.0
    else:
        config = AutoConfig.from_pretrained(source.checkpoint, local_files_only=True, trust_remote_code=False)
        rotary: Any = GteRotaryEmbedding(config)
        wanted, scale = rotary.inv_freq.double().numpy(), rotary.attention_scaling
    rotary = GteRotaryEmbedding(read_config(source.checkpoint))
    found = rotary.inv_freq.double().numpy()
    findings.count("rotation frequencies", len(wanted))
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-5, atol=0):
        findings.failures.append(
            f"rotation frequencies of config.json: {found[:4].tolist()}… here, {wanted[:4].tolist()}… by its formula"
        )
    if rotary.attention_scaling != scale:
        findings.failures.append(f"RoPE scales attention by {rotary.attention_scaling} here, by {scale} there")


# --- the libraries --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Library:
    """A checkpoint opened by its own library.

    Args:
        title: its class, for people.
        limit: longest input in tokens, as it says.
        cut: sets another limit.
        questions: yields what both sides are asked, given the model and texts.
        config: of transformers.
    """

    title: str
    limit: int
    cut: Callable[[int], None]
    questions: "Callable[[Model, _Texts], Iterator[_Question]]"
    config: Any


@dataclass(frozen=True)
class _Texts:
    """What is asked: short `texts`, one longer than `cut`, the limit of both sides, and the mask token, if any."""

    texts: list[str]
    long: str
    cut: int
    mask: str | None

    @property
    def all(self) -> list[str]:
        return [*self.texts, self.long]

    @property
    def length(self) -> dict[str, Any]:
        """The arguments of this package's methods."""
        return {"truncation": True, "max_length": self.cut}


@dataclass(frozen=True)
class _Question:
    """One question to both sides; the answers are numbers whose first axis is `inputs`, or the pipeline's lists."""

    what: str
    inputs: Sequence[Any]
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def _open_library(folder: Path, spec: ModelSpec, findings: _Findings) -> _Library | None:
    """The library that the checkpoint is for; None, and why among what is skipped, where it is not to be had."""
    name = library_of(folder, spec.task)
    open_it: Callable[[Path, ModelSpec], _Library] = _open_transformers
    if name == "sentence-transformers":
        if importlib.util.find_spec("sentence_transformers") is None:
            findings.skipped.append(
                "Pooling, prompts, activations and limits were not compared with the checkpoint's own library, which "
                "is not installed: pip install sentence-transformers"
            )
            name = "transformers"
        elif spec.task == "classify":
            open_it = _open_cross_encoder
        else:
            open_it = _open_sentence_transformer
    try:
        library = open_it(folder, spec)
    except Exception as error:  # whatever a library of others raises
        findings.skipped.append(f"Answers were not compared: {name} does not load the checkpoint ({_short(error)}).")
        return None
    findings.compared["library"] = f"{library.title} of {name} {_version(name)}"
    return library


def _compare_library(
    model: Model, library: _Library, source: _Source, close: "_Closeness", asked: Asked, findings: _Findings
) -> None:
    _compare_facts(model.spec, library, asked, findings)
    own = asked.limit == "own" or library.limit <= model.spec.max_length and asked.limit == "shorter"
    cut = min(model.spec.max_length, _LONGEST_ASKED)
    if not own or library.limit > _LONGEST_ASKED:
        library.cut(cut)
    texts = [*PLAIN_TEXTS, " ".join(ODD_TEXTS[6:9]), "  white \n space  ", *vocabulary_texts(source.tokenizer, 5)]
    given = _Texts(texts, long_text(source.tokenizer, cut), cut, source.tokenizer.mask_token)
    for question in library.questions(model, given):
        _put(question, close, findings)


def _compare_facts(spec: ModelSpec, library: _Library, asked: Asked, findings: _Findings) -> None:
    """What the library says of itself with what the spec says."""
    longer, shorter = spec.max_length > library.limit, spec.max_length < library.limit
    if asked.limit != "asked" and (longer or shorter and asked.limit == "own"):
        findings.failures.append(
            f"longest input: {spec.max_length:,} tokens here, {library.limit:,} in {library.title}"
        )
    if spec.task in ("classify", "token-classify"):
        wanted = {int(index): str(label) for index, label in library.config.id2label.items()}
        if dict(spec.id2label) != wanted:
            findings.failures.append(f"labels: {dict(spec.id2label)} here, {wanted} in {library.title}")


def _put(question: _Question, close: "_Closeness", findings: _Findings) -> None:
    try:
        theirs = question.theirs()
    except Exception as error:  # whatever a library of others raises
        findings.skipped.append(f"{question.what} was not compared: the library fails on it ({_short(error)}).")
        return
    findings.count("answers", len(question.inputs))
    try:
        ours = question.ours()
    except GteDeployError as error:
        findings.failures.append(f"{question.what} is refused: {error}")
        return
    compare = close.answers if isinstance(theirs, list) else close.numbers
    findings.failures += compare(question, ours, theirs)


def _open_sentence_transformer(folder: Path, spec: ModelSpec) -> _Library:
    from sentence_transformers import SentenceTransformer

    opened = SentenceTransformer(str(folder), **_locally())
    limit = min(opened.max_seq_length or spec.max_length, opened[0].auto_model.config.max_position_embeddings)

    def questions(model: Model, given: _Texts) -> Iterator[_Question]:
        few = given.texts[-4:]

        def ask(what: str, texts: list[str], method: str = "encode", **options: Any) -> _Question:
            return _Question(
                what,
                texts,
                lambda: getattr(model, method)(texts, **options, **given.length),
                lambda: getattr(opened, method)(texts, **options, show_progress_bar=False),
            )

        yield ask("encode", given.all)
        for name in opened.prompts:
            yield ask(f"encode with the prompt {name!r}", few, prompt_name=name)
        if opened.default_prompt_name is not None:
            yield ask("encode without a prompt", few, prompt="")
        yield ask("encode_query", few, "encode_query")
        yield ask("encode_document", few, "encode_document")
        width = max(1, (opened.get_embedding_dimension() or 2) // 2)
        yield ask("encode, truncated and normalised", few, truncate_dim=width, normalize_embeddings=True)

    return _Library(
        "SentenceTransformer",
        limit,
        lambda cut: setattr(opened, "max_seq_length", cut),
        questions,
        opened[0].auto_model.config,
    )


def _open_cross_encoder(folder: Path, spec: ModelSpec) -> _Library:
    import torch
    from sentence_transformers import CrossEncoder

    opened = CrossEncoder(str(folder), **_locally())
    config = opened.model.config
    limit = min(opened.max_seq_length or spec.max_length, config.max_position_embeddings)

    def questions(model: Model, given: _Texts) -> Iterator[_Question]:
        pairs = pairs_of(given.texts, given.long)[:-3]
        few = pairs[:4]

        def ask(what: str, inputs: list[Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> _Question:
            return _Question(
                what,
                inputs,
                lambda: model.predict(inputs, **ours, **given.length),
                lambda: opened.predict(inputs, **theirs, show_progress_bar=False),
            )

        yield ask("predict", pairs, {}, {})
        raw = ({"activation_fn": lambda logits: logits}, {"activation_fn": torch.nn.Identity()})
        yield ask("predict without activation", few, *raw)
        if spec.num_labels > 1:
            yield ask("predict with softmax", few, {"apply_softmax": True}, {"apply_softmax": True})
        if "prompt_name" in inspect.signature(model.predict).parameters:
            for name in opened.prompts:
                yield ask(f"predict with the prompt {name!r}", few, {"prompt_name": name}, {"prompt_name": name})
        yield _Question(
            "predict of single texts",
            given.texts[:4],
            lambda: model.predict([[text] for text in given.texts[:4]], **given.length),
            lambda: np.stack([opened.predict(text, show_progress_bar=False) for text in given.texts[:4]]),
        )

    return _Library("CrossEncoder", limit, lambda cut: setattr(opened, "max_seq_length", cut), questions, config)


def _locally() -> dict[str, Any]:
    import torch

    # The stored type may be 16 bits: the comparison is with the function, not with its rounding.
    weights = {"dtype": torch.float32, "use_safetensors": True}
    return {"device": "cpu", "local_files_only": True, "trust_remote_code": False, "model_kwargs": weights}


def _open_transformers(folder: Path, spec: ModelSpec) -> _Library:
    """The class of transformers for the task, fed by AutoTokenizer; for fill-mask its pipeline."""
    import torch
    from transformers import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    classes: Mapping[str, Any] = {
        "fill-mask": AutoModelForMaskedLM,
        "classify": AutoModelForSequenceClassification,
        "token-classify": AutoModelForTokenClassification,
    }
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
    network: Any = classes.get(spec.task, AutoModel).from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, **options
    )
    network.eval()
    limit = min(tokenizer.model_max_length, network.config.max_position_embeddings)
    made = _Network(network, tokenizer, frozenset(tokenizer.get_vocab().values()))
    asks = made.masks if spec.task == "fill-mask" else made.tensors
    return _Library(type(network).__name__, limit, lambda cut: None, asks, network.config)


@dataclass(frozen=True)
class _Network:
    """A model of transformers, its tokenizer, and the ids that this has a token for."""

    network: Any
    tokenizer: Any
    known: frozenset[int]

    def masks(self, model: Model, given: _Texts) -> Iterator[_Question]:
        """The fill-mask pipeline's answers to texts with one mask and with two."""
        from transformers import pipeline

        mask = given.mask
        if mask is None:
            return
        pipe: Any = pipeline("fill-mask", model=self.network, tokenizer=self.tokenizer, device="cpu")
        cut = {"truncation": True, "max_length": given.cut}
        singles, doubles = given.texts[::2], given.texts[1::2]
        texts = [f"{text} {mask}." for text in singles] + [f"{mask} {text} {mask}" for text in doubles]
        for masked in (*texts, f"{given.texts[0]} {mask} {given.long}"):
            yield _Question(
                "fill_mask",
                [masked],
                lambda t=masked: model.fill_mask(t, top_k=_TOP_K, **given.length),
                lambda t=masked: self._known(pipe(t, top_k=_LOOKED_AT, tokenizer_kwargs=cut)),
            )

    def tensors(self, model: Model, given: _Texts) -> Iterator[_Question]:
        """Logits, or hidden states where there is no head, of each text."""
        name = "logits" if model.spec.task in ("classify", "token-classify") else "last_hidden_state"
        for text in given.all:
            yield _Question(
                name,
                [text],
                lambda t=text: _tensor(model, t, name, given),
                lambda t=text: self._tensor(t, name, given),
            )

    def _tensor(self, text: str, name: str, given: _Texts) -> _Numbers:
        import torch

        encoded = self.tokenizer(text, truncation=True, max_length=given.cut, return_tensors="pt")
        with torch.inference_mode():
            array: _Numbers = self.network(**encoded)[name].numpy()
        return array

    def _known(self, answers: list[Any]) -> list[Any]:
        """Without the rows that only pad the vocabulary, which this package never answers."""
        if isinstance(answers[0], list):
            return [self._known(each) for each in answers]
        return [answer for answer in answers if answer["token"] in self.known]


def _tensor(model: Model, text: str, name: str, given: _Texts) -> _Numbers:
    encoded = model.tokenize([text], **given.length)
    batch = dataclasses.replace(collate(encoded["input_ids"].tolist(), pad_token_id=model.spec.pad_token_id))
    return model._backend.run(batch, (name,))[name]


# --- how close is close enough --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Closeness:
    """How far answers may be apart.

    Args:
        relative: |ours - theirs| over |theirs|: their largest values where every answer must fit, else their root mean
            squares.
        cosine: of two vectors, at least; on average where not every answer must fit.
        each: whether every answer must fit, as float32 must; a lower precision is held to averages.
    """

    relative: float
    cosine: float
    each: bool

    @classmethod
    def of(cls, precision: Precision) -> "_Closeness":
        """As tight as float32 sums allow, or as the precision is held to on text."""
        if precision == "fp32":
            return cls(relative=1e-4, cosine=0.99999, each=True)
        cosine = ACCURACY_BOUNDS[precision].cosine_mean
        # Vectors of equal length at this cosine differ by sqrt(2 (1 - cosine)); single scores scatter more.
        return cls(relative=4 * math.sqrt(2 * (1 - cosine)), cosine=cosine, each=False)

    def numbers(self, question: _Question, ours: Any, theirs: Any) -> list[str]:
        """What differs between two arrays, the first axis being the question's inputs."""
        found, wanted = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
        if found.shape != wanted.shape:
            return [f"{question.what}: shape {list(found.shape)} here, {list(wanted.shape)} from the library"]
        if not self.each:
            return self._on_average(question, found, wanted)
        scale = np.abs(wanted).max()
        failures = []
        for given, a, b in zip(question.inputs, found, wanted, strict=True):
            apart, cosine = np.abs(a - b).max() / scale, _cosines(a, b).min()
            if not (apart <= self.relative and cosine >= self.cosine):
                failures.append(f"{_named(question.what, given)}: {_numbers_apart(a, b, apart, cosine)}")
        return failures

    def _on_average(self, question: _Question, found: _Numbers, wanted: _Numbers) -> list[str]:
        apart = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
        cosine = _cosines(found, wanted).mean()
        if apart <= self.relative and cosine >= self.cosine:
            return []
        worst = int(np.argmax(np.abs(found - wanted).reshape(len(found), -1).max(axis=1)))
        shown = _numbers_apart(found[worst], wanted[worst], apart, cosine)
        return [f"{_named(question.what, question.inputs[worst])}, the worst of {len(found)}: {shown}"]

    def answers(self, question: _Question, ours: Any, theirs: Any) -> list[str]:
        """What differs between the answers for the masks of one text; theirs are more, so that ties may swap."""
        found, wanted = ([side] if isinstance(side[0], dict) else side for side in (ours, theirs))
        if len(found) != len(wanted):
            return [f"{_named(question.what, question.inputs[0])}: {len(found)} masks here, {len(wanted)} there"]
        for a, b in zip(found, wanted, strict=True):
            if difference := self._answer_apart(a, b):
                return [f"{_named(question.what, question.inputs[0])}: {difference}"]
        return []

    def _answer_apart(self, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
        by_token = {answer["token"]: answer for answer in theirs}
        allowed = self.relative * max(theirs[0]["score"], 0.0 if self.each else 1.0)
        for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            same = by_token.get(a["token"])
            if same is None:
                if self.each:
                    return f"answer {place + 1} is {a['token_str']!r} here, {b['token_str']!r} from the library"
                continue
            if any(abs(a["score"] - other["score"]) > allowed for other in (b, same)):
                return (
                    f"answer {place + 1} is {a['token_str']!r} with {a['score']:.6f} here, {b['token_str']!r} with "
                    f"{b['score']:.6f} from the library"
                )
            for key in ("token_str", "sequence"):
                if a[key] != same[key]:
                    return f"{key} is {_quoted(a[key])} here, {_quoted(same[key])} from the library"
        return None


def _cosines(ours: _Numbers, theirs: _Numbers) -> _Numbers:
    """Along the last axis; 1 where that has one number, or both are zero."""
    if ours.ndim == 0 or ours.shape[-1] == 1:
        return np.ones(1)
    a, b = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, ours.shape[-1])
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (norms == 0) & np.all(a == b, axis=1)
    return np.where(both_zero, 1.0, np.einsum("ij,ij->i", a, b) / np.where(norms == 0, 1.0, norms))


def _numbers_apart(ours: _Numbers, theirs: _Numbers, apart: float, cosine: float) -> str:
    at = np.unravel_index(int(np.argmax(np.abs(ours - theirs))), ours.shape) if ours.ndim else ()
    place = f" at {[int(i) for i in at]}" if at else ""
    vector = f", cosine {cosine:.6f}" if ours.ndim and ours.shape[-1] > 1 else ""
    return f"{ours[at]:.6f} here, {theirs[at]:.6f} from the library{place}; relative difference {apart:.1e}{vector}"


def _named(what: str, given: Any) -> str:
    texts = given if isinstance(given, tuple) else (given,)
    return f"{what} of {', '.join(map(_quoted, texts))}"


def _quoted(text: str) -> str:
    whole = ascii(text)
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}…' ({len(text):,} characters)"


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


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
