"""Opens a checkpoint in its own library, and yields the questions for this library and this package.

SentenceTransformer, CrossEncoder, SparseEncoder or transformers read the checkpoint's folder for themselves. They stay
off the network, load no pickle and run no code of the checkpoint.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gte_deploy.core.files import read_json
from gte_deploy.core.spec import ModelSpec, TaskName
from gte_deploy.exporters.verification.answers.closeness import Question
from gte_deploy.exporters.verification.answers.odd_texts import long_pairs, short_pairs
from gte_deploy.model import Model
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import HIDDEN, filled
from gte_deploy.tasks.sparse import TOKEN_WEIGHTS
from gte_deploy.text.batching import collate

SENTENCE_TRANSFORMERS_NAME = "sentence-transformers"
_TOP_K = 5
_LOOKED_AT = 50
_FEW = 4
_LOCALLY = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class AskedTexts:
    """The texts of the questions: short ones, one longer than `cut` (the limit of both sides), and any mask token."""

    texts: list[str]
    long: str
    cut: int
    mask: str | None

    @property
    def all(self) -> list[str]:
        """The short texts and the long one."""
        return [*self.texts, self.long]

    @property
    def ragged(self) -> list[str]:
        """A batch with much padding."""
        return [self.texts[0], self.long]

    @property
    def few(self) -> list[str]:
        """A few texts, for questions that cost another run of both models."""
        return self.texts[-_FEW:]

    @property
    def length(self) -> dict[str, Any]:
        """The arguments that set the limit in this package's methods."""
        return {"truncation": True, "max_length": self.cut}


@dataclass(frozen=True)
class OpenLibrary:
    """A checkpoint opened by its own library.

    Args:
        title: the name of the library's class, for people.
        limit: the library's longest input in tokens.
        cut: sets another limit.
        questions: yields the questions for both sides, given the model and texts.
        config: the config of transformers.
        similarity: the library's similarity function for embeddings, if it has one.
    """

    title: str
    limit: int
    cut: Callable[[int], None]
    questions: Callable[[Model, AskedTexts], Iterator[Question]]
    config: Any
    similarity: str | None = None


def library_of(checkpoint: Path, task: TaskName) -> str:
    """Return the name of the library that a checkpoint's answers are compared with."""
    of_its_kind = task in ("classify", "sparse", "multi-vector") or (
        TASKS[task].pools and (checkpoint / "modules.json").is_file()
    )
    return SENTENCE_TRANSFORMERS_NAME if of_its_kind else "transformers"


def open_library(folder: Path, spec: ModelSpec, skipped: list[str]) -> tuple[OpenLibrary, str] | None:
    """Open a checkpoint in its own library, and return the library and its name with the version.

    None if the checkpoint cannot be opened; a sentence for each thing that is not compared is added to `skipped`.
    """
    name = library_of(folder, spec.task)
    if name == SENTENCE_TRANSFORMERS_NAME and importlib.util.find_spec("sentence_transformers") is None:
        skipped.append(
            "Pooling, prompts, activations and limits were not compared: the checkpoint's own library is not "
            "installed: pip install sentence-transformers"
        )
        name = "transformers"
    try:
        opener = _OPENERS[spec.task] if name == SENTENCE_TRANSFORMERS_NAME else open_transformers
        library = opener(folder, spec)
    except Exception as error:  # another project's library raises errors of any kind
        skipped.append(f"Answers were not compared: {name} does not load the checkpoint ({short(error)}).")
        return None
    return library, f"{library.title} of {name} {importlib.metadata.version(name)}"


def short(error: Exception) -> str:
    """Return an error of a library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def open_sentence_transformer(folder: Path, spec: ModelSpec) -> OpenLibrary:
    """Open a checkpoint in SentenceTransformer, with questions to `encode`, `encode_query` and `encode_document`."""
    from sentence_transformers import SentenceTransformer

    opened: Any = SentenceTransformer(str(folder), **_options())

    def questions(model: Model, given: AskedTexts) -> Iterator[Question]:
        def ask(what: str, texts: list[str], method: str = "encode", **options: Any) -> Question:
            return Question(
                what,
                texts,
                lambda: getattr(model, method)(texts, **options, **given.length),
                lambda: getattr(opened, method)(texts, **options, show_progress_bar=False),
            )

        # Two questions: the library pads every row of a batch to the longest.
        yield ask("encode", given.texts)
        yield ask("encode", given.ragged)
        for name, prompt in opened.prompts.items():
            if prompt or name in model.spec.prompts:  # the library adds empty prompts of its own
                yield ask(f"encode with the prompt {name!r}", given.few, prompt_name=name)
        if opened.default_prompt_name is not None:
            yield ask("encode without a prompt", given.few, prompt="")
        yield ask("encode_query", given.few, "encode_query")
        yield ask("encode_document", given.few, "encode_document")
        width = max(1, (opened.get_embedding_dimension() or 2) // 2)
        yield ask("encode, truncated and normalised", given.few, truncate_dim=width, normalize_embeddings=True)

    return _library("SentenceTransformer", opened, spec, questions, similarity=opened.similarity_fn_name)


def open_sparse_encoder(folder: Path, spec: ModelSpec) -> OpenLibrary:
    """Open a checkpoint in SparseEncoder, with questions to `encode` and its variants that give dense rows."""
    from sentence_transformers import SparseEncoder

    opened: Any = SparseEncoder(str(folder), **_options())
    stored = read_json(folder / "modules.json")
    if stored and len(stored) != len(opened):
        # The library adds an autoencoder with random weights to a checkpoint of another class.
        raise ValueError(f"it adds modules to the {len(stored)} of modules.json")

    def questions(model: Any, given: AskedTexts) -> Iterator[Question]:
        dense = {"convert_to_sparse_tensor": False}

        def ask(method: str, texts: list[str]) -> Question:
            theirs = getattr(opened, method.removesuffix("_sparse"))
            return Question(
                method,
                texts,
                lambda: getattr(model, method)(texts, convert_to_tensor=True, **dense, **given.length).numpy(),
                lambda: theirs(texts, **dense, show_progress_bar=False).numpy(),
            )

        yield ask("encode_sparse", given.texts)
        yield ask("encode_document", given.ragged)
        yield ask("encode_query", given.few)

    return _library("SparseEncoder", opened, spec, questions)


def open_cross_encoder(folder: Path, spec: ModelSpec) -> OpenLibrary:
    """Open a checkpoint in CrossEncoder, with questions to `predict` for pairs and for single texts."""
    import torch
    from sentence_transformers import CrossEncoder

    opened: Any = CrossEncoder(str(folder), **_options())
    seen = _Seen()
    opened.model.register_forward_hook(seen.remember)

    def questions(model: Model, given: AskedTexts) -> Iterator[Question]:
        pairs = short_pairs(given.texts)

        def ask(what: str, inputs: list[Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Question:
            return Question(
                what,
                inputs,
                lambda: model.predict(inputs, **ours, **given.length),
                lambda: opened.predict(inputs, **theirs, show_progress_bar=False),
                "scores",
                seen.scale,
            )

        yield ask("predict", pairs, {}, {})
        yield ask("predict", long_pairs(given.texts, given.long)[:3], {}, {})
        raw = ({"activation_fn": lambda logits: logits}, {"activation_fn": torch.nn.Identity()})
        yield ask("predict without activation", pairs[:_FEW], *raw)
        if spec.num_labels > 1:
            yield ask("predict with softmax", pairs[:_FEW], {"apply_softmax": True}, {"apply_softmax": True})
        if "prompt_name" in inspect.signature(model.predict).parameters:
            for name in filter(opened.prompts.get, opened.prompts):
                yield ask(
                    f"predict with the prompt {name!r}", pairs[:_FEW], {"prompt_name": name}, {"prompt_name": name}
                )
        # The library takes only one single text in a call.
        yield Question(
            "predict of single texts",
            given.few,
            lambda: model.predict([[text] for text in given.few], **given.length),
            lambda: np.stack([opened.predict(text, show_progress_bar=False) for text in given.few]),
            "scores",
            seen.scale,
        )

    return _library("CrossEncoder", opened, spec, questions)


def open_multi_vector_encoder(folder: Path, spec: ModelSpec) -> OpenLibrary:
    """Open a checkpoint in MultiVectorEncoder, with questions to `encode_query` and `encode_document`."""
    from sentence_transformers import MultiVectorEncoder

    opened: Any = MultiVectorEncoder(str(folder), **_options())
    first, found = opened[0], spec.multi_vector
    assert found is not None  # a model for this task has one
    own = {"query": first.query_length, "document": first.document_length}
    has_fixed_queries = (first.query_expansion or {}).get("strategy") == "fixed"

    def questions(model: Model, given: AskedTexts) -> Iterator[Question]:
        # Both sides keep their own lengths, unless the export has shortened them; long texts would cost seconds.
        most = {side: min(length or opened.max_seq_length, given.cut) for side, length in own.items()}
        first.document_length = most["document"]
        if not has_fixed_queries:
            first.query_length = most["query"]
        queries = found.query_length if has_fixed_queries else min(found.query_length, given.cut)
        documents = min(found.document_length, given.cut)

        def ask(method: str, length: int, texts: list[str]) -> Iterator[Question]:
            ours = cache(lambda: getattr(model, method)(texts, truncation=True, max_length=length))
            theirs = cache(lambda: getattr(opened, method)(texts, convert_to_numpy=True, show_progress_bar=False))
            # One question for each text, since their numbers of tokens differ.
            for i, text in enumerate(texts):
                yield Question(method, [text], partial(_one_of, ours, i), partial(_one_of, theirs, i))

        # The library makes the token before a text special, and then finds it inside other texts as well; PyLate, to
        # which the format belongs, does not.
        prefixes = [opened.tokenizer.convert_ids_to_tokens(token) for token in found.prefixes]
        for texts in (given.texts, given.ragged):
            for prefix in prefixes:
                texts = [text.replace(prefix.strip(), "") for text in texts]
            yield from ask("encode_query", queries, texts)
            yield from ask("encode_document", documents, texts)

    library = _library("MultiVectorEncoder", opened, spec, questions, similarity=opened.similarity_fn_name)
    return dataclasses.replace(library, limit=spec.max_length, cut=lambda cut: None)


def _one_of(answers: Callable[[], Any], index: int) -> Any:
    """Return the embeddings of one text as [1, T, D]."""
    return answers()[index][None]


def open_transformers(folder: Path, spec: ModelSpec) -> OpenLibrary:
    """Open a checkpoint in the task's class of transformers, with AutoTokenizer and, for two tasks, a pipeline."""
    opened = _open_network(folder, spec)
    config = opened.network.config
    limit = min(opened.tokenizer.model_max_length, _places(config))
    asks = opened.masks if spec.task == "fill-mask" else opened.tensors
    return OpenLibrary(opened.title, limit, lambda cut: None, asks, config)


def _open_network(folder: Path, spec: ModelSpec) -> "_Network":
    import torch
    import transformers

    classes = {
        "fill-mask": transformers.AutoModelForMaskedLM,
        "classify": transformers.AutoModelForSequenceClassification,
        "token-classify": transformers.AutoModelForTokenClassification,
        "hybrid": transformers.AutoModelForTokenClassification,
    }
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **_LOCALLY)
    made: Any = classes.get(spec.task, transformers.AutoModel)
    network: Any = made.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **_LOCALLY).eval()
    return _Network(network, tokenizer, frozenset(tokenizer.get_vocab().values()))


def open_hybrid(folder: Path, spec: ModelSpec) -> OpenLibrary:
    """Open a checkpoint in SentenceTransformer for the dense half, and in transformers for the weights of tokens."""
    dense, classifier = open_sentence_transformer(folder, spec), _open_network(folder, spec)

    def questions(model: Model, given: AskedTexts) -> Iterator[Question]:
        yield from dense.questions(model, given)
        yield classifier.weights(model, given)

    return dataclasses.replace(dense, title=f"{classifier.title} and {dense.title}", questions=questions)


_OPENERS: Mapping[str, Callable[[Path, ModelSpec], OpenLibrary]] = {
    "embed": open_sentence_transformer,
    "classify": open_cross_encoder,
    "sparse": open_sparse_encoder,
    "hybrid": open_hybrid,
    "multi-vector": open_multi_vector_encoder,
}


def _options() -> dict[str, Any]:
    import torch

    # The stored type may have 16 bits; the comparison is with the same weights computed in float32.
    return {"device": "cpu", "model_kwargs": {"dtype": torch.float32, "use_safetensors": True}, **_LOCALLY}


def _library(
    title: str,
    opened: Any,
    spec: ModelSpec,
    questions: Callable[[Model, AskedTexts], Iterator[Question]],
    similarity: str | None = None,
) -> OpenLibrary:
    # A Router holds the transformer one level deeper.
    config = next(part for part in opened.modules() if hasattr(part, "auto_model")).auto_model.config
    limit = min(opened.max_seq_length or spec.max_length, _places(config))
    return OpenLibrary(title, limit, lambda cut: setattr(opened, "max_seq_length", cut), questions, config, similarity)


def _places(config: Any) -> int:
    """The most tokens of a text: RoBERTa's first token has the place after that of padding."""
    unused = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return int(config.max_position_embeddings - unused)


@dataclass
class _Seen:
    """The largest logit of the last run."""

    logits: list[float] = field(default_factory=lambda: [0.0])

    def remember(self, module: Any, inputs: Any, output: Any) -> None:
        """Record the largest logit, as a forward hook of torch."""
        self.logits[0] = float(output["logits"].abs().max())

    def scale(self) -> float:
        """See `Question`."""
        return self.logits[0]


@dataclass(frozen=True)
class _Network:
    """A model of transformers, its tokenizer, and the ids that belong to a token."""

    network: Any
    tokenizer: Any
    known: frozenset[int]

    @property
    def title(self) -> str:
        """The name of the model's class."""
        return type(self.network).__name__

    def masks(self, model: Model, given: AskedTexts) -> Iterator[Question]:
        """Yield questions to the fill-mask pipeline, for texts with one mask and with two."""
        from transformers import pipeline

        mask = given.mask
        if mask is None:
            return
        pipe: Any = pipeline("fill-mask", model=self.network, tokenizer=self.tokenizer, device="cpu")
        seen = _Seen()
        self.network.register_forward_hook(seen.remember)
        cut = {"truncation": True, "max_length": given.cut}
        size = self.network.config.vocab_size
        # The pipeline's answers include rows of the vocabulary that belong to no token.
        ours, theirs = min(_TOP_K, len(self.known)), min(_LOOKED_AT + size - len(self.known), size)

        def ask(text: str) -> Question:
            return Question(
                "fill_mask",
                [text],
                lambda: model.fill_mask(text, top_k=ours, **given.length),
                lambda: self._known(pipe(text, top_k=theirs, tokenizer_kwargs=cut)),
                "masks",
                seen.scale,
            )

        yield from (ask(f"{text} {mask}.") for text in given.texts[::2])
        yield from (ask(f"{mask} {text} {mask}") for text in given.texts[1::2])
        yield ask(f"{given.texts[0]} {mask} {given.long}")

    def tensors(self, model: Model, given: AskedTexts) -> Iterator[Question]:
        """Yield questions for each text's logits, or hidden states if there is no head; also for tags."""
        name = HIDDEN if model.spec.task in ("embed", "sparse", "hybrid", "multi-vector") else "logits"

        def ask(text: str) -> Question:
            ours, theirs = (lambda: _tensor(model, text, name, given)), (lambda: self._tensor(text, name, given))
            return Question(name, [text], ours, theirs, "vectors" if name == HIDDEN else "scores")

        yield from map(ask, given.all)
        if model.spec.task == "hybrid":
            yield self.weights(model, given)
        if hasattr(model, "classify_tokens") and model.spec.task == "token-classify":
            yield from self._tags(model, given)

    def weights(self, model: Model, given: AskedTexts) -> Question:
        """Return the question for the weights of all tokens: one for all texts, of which some may weigh nearly 0."""

        def side(tensor: Callable[[str], Any]) -> Any:
            rows = [tensor(text)[0, :, 0].tolist() for text in given.all]
            return filled(rows, max(map(len, rows)), 0.0, np.float32)

        return Question(
            TOKEN_WEIGHTS,
            given.all,
            lambda: side(lambda text: _tensor(model, text, TOKEN_WEIGHTS, given)),
            lambda: side(lambda text: self._tensor(text, TOKEN_WEIGHTS, given)),
            "scores",
        )

    def _tags(self, model: Any, given: AskedTexts) -> Iterator[Question]:
        from transformers import pipeline

        pipe: Any = pipeline("token-classification", model=self.network, tokenizer=self.tokenizer, device="cpu")
        seen = _Seen()
        self.network.register_forward_hook(seen.remember)

        def ask(text: str, strategy: str) -> Question:
            return Question(
                f"classify_tokens, aggregation {strategy!r}",
                [text],
                lambda: model.classify_tokens(text, aggregation_strategy=strategy),
                lambda: pipe(text, aggregation_strategy=strategy),
                "tags",
                seen.scale,
            )

        yield from (ask(text, strategy) for strategy in ("none", "simple", "first") for text in given.few)

    def _tensor(self, text: str, name: str, given: AskedTexts) -> Any:
        import torch

        encoded = self.tokenizer(text, truncation=True, max_length=given.cut, return_tensors="pt")
        with torch.inference_mode():
            if name == HIDDEN:
                return self.network.base_model(**encoded).last_hidden_state.numpy()
            logits = self.network(**encoded).logits
            return (logits.relu() if name == TOKEN_WEIGHTS else logits).numpy()

    def _known(self, answers: list[Any]) -> list[Any]:
        """Drop answers with rows that only pad the vocabulary; this package never gives them."""
        if isinstance(answers[0], list):
            return [self._known(each) for each in answers]
        return [answer for answer in answers if answer["token"] in self.known]


def _tensor(model: Model, text: str, name: str, given: AskedTexts) -> Any:
    ids = model.tokenize([text], **given.length)["input_ids"]
    return model._backend.run(collate(ids.tolist(), pad_token_id=model.spec.pad_token_id), (name,))[name]
