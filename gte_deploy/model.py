"""The one object that users hold: texts in, answers out, the same on every backend.

Shapes: N inputs, S tokens, T tokens without special ones, H hidden size, V vocabulary, L labels, D embedding size.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy._version import __version__
from gte_deploy.backends.base import Backend, Batch
from gte_deploy.backends.checks import check_finite
from gte_deploy.backends.devices import parse_device
from gte_deploy.batching import BatchLimits, collate, token_batches
from gte_deploy.bundle import is_bundle
from gte_deploy.embedding import EmbeddingRequest, OutputValue
from gte_deploy.errors import BackendError, InputError
from gte_deploy.fill_mask import MaskAnswer, answers, check_mask, top_tokens
from gte_deploy.forking import follow, in_use
from gte_deploy.inputs import MAX_BATCH_SIZE, MAX_BATCH_TOKENS, as_pairs, as_texts, check_integer
from gte_deploy.pooling import EmbeddingPrecision
from gte_deploy.scores import ActivationFn, ScoreRequest, former_arguments, refuse_processes
from gte_deploy.sparse import (
    SparseEmbedding,
    SparseForm,
    as_embeddings,
    entry_names,
    sparsify,
    unweighted_ids,
    weights_of_query,
    weights_of_tokens,
)
from gte_deploy.spec import ModelSpec, Pooling, SparseRoute
from gte_deploy.text_interface import TextInterface, one_of, prompt_text, return_type, with_progress
from gte_deploy.token_classification import AggregationStrategy, TaggedTexts, TaggingRequest
from gte_deploy.tokenization import Piece, TextTokenizer, checked_max_length

# Vocabulary logits held at once: 256 MB. A text with more masks is run again for the rest of them.
_MAX_LOGITS = 1 << 26
_NO_LOGITS = np.empty((0, 0), dtype=np.float32)

Outputs = dict[str, NDArray[np.float32]]
Rows = list[list[int]]
Tokenize = Callable[[list[int]], Rows]
"""From indices of the inputs to their token ids."""


@dataclass(frozen=True)
class Origin:
    """How a model was made, for other processes.

    Args:
        again: with `arguments` makes the same model, in any process; both can be pickled.
        arguments: see `again`.
        reopen: opens the engine alone again, with a number of threads; None where that cannot be.
    """

    again: Callable[..., "Model"]
    arguments: tuple[Any, ...]
    reopen: Callable[[int], Backend] | None = None


class Model(TextInterface):
    """A loaded model. Methods may be called from several threads at once; results are in the order of the inputs.

    Make one with `gte_deploy.load`. As a context manager it closes on leaving.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: TextTokenizer,
        spec: ModelSpec,
        *,
        max_batch_tokens: int,
        path: Path,
        backend_reason: str,
        query_weights: NDArray[np.float32] | None = None,
        origin: Origin | None = None,
    ) -> None:
        """Join a backend and a tokenizer; `origin` tells other processes how.

        `query_weights` [V] are those of a sparse model's queries.

        `max_batch_tokens` bounds a batch, padding included; a longer text runs alone. No batch costs more attention
        (rows times length²) than one text of `spec.max_length`.
        """
        self.spec = spec
        self.path = path
        self._name = str(path)
        self._backend = backend
        self._backend_reason = backend_reason
        self._tokenizer = tokenizer
        self._query_weights = query_weights
        self._max_batch_tokens = check_integer("max_batch_tokens", max_batch_tokens, 1, MAX_BATCH_TOKENS)
        if spec.token_types:
            tokenizer.check_types(spec.type_vocab_size)
        self._origin = origin
        self._is_closed = False
        follow(self)
        self._answerable = np.flatnonzero(tokenizer.known_ids(spec.vocab_size))

    def close(self) -> None:
        """Free the engine. Idempotent; later calls that compute raise BackendError."""
        self._is_closed = True
        self._backend.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, or copied, a model is loaded again from its path: `load` is called where it arrives.

        Raises:
            BackendError: the model is closed, or was not made by `load`.
        """
        if self._is_closed:
            raise BackendError("this model is closed, so it cannot be pickled or copied; load it again")
        if self._origin is None:
            raise BackendError(
                "this model was not made by gte_deploy.load, so nothing tells how to open it elsewhere. Call "
                "gte_deploy.load in the process that needs it."
            )
        return self._origin.again, self._origin.arguments

    def after_fork(self, *, idle: bool) -> None:
        """See `forking.Follower`."""
        if not self._is_closed:
            from gte_deploy.backends.inherited import after_fork

            reopen = self._origin.reopen if self._origin is not None else None
            self._backend = after_fork(self._backend, reopen, idle=idle)

    @property
    def backend(self) -> str:
        """Name of what computes: "onnx", "openvino", "torch" or "tensorrt"."""
        return self._backend.name

    @property
    def device(self) -> str:
        """Where it computes, such as "cpu" or "cuda:0"."""
        return self._backend.device

    def info(self) -> dict[str, Any]:
        """What was loaded, as plain JSON data."""
        return {
            "gte_deploy": __version__,
            "path": str(self.path),
            "backend": self.backend,
            "backend_reason": self._backend_reason,
            "precision": self._backend.precision,
            "device": self.device,
            "num_threads": self._backend.num_threads,
            "max_batch_tokens": self._max_batch_tokens,
            "outputs": list(self._backend.outputs),
            **dataclasses.asdict(self.spec),
        }

    def tokenize(
        self, texts: str | Sequence[str], *, truncation: bool = False, max_length: int | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """`input_ids` and `attention_mask`, both [N, S] int64 and padded on the right.

        `token_type_ids`, of the same form, too where the model is fed them (`spec.token_types`).

        Raises:
            InputError: see `encode`.
        """
        texts = as_texts(texts, name="texts")[0]
        rows = self._tokenize_texts(texts, truncation, max_length)(list(range(len(texts))))
        batch = collate(rows, pad_token_id=self.spec.pad_token_id, token_types=self.spec.token_types)
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **types}

    def fill_mask(
        self,
        inputs: str | Sequence[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        batch_size: int = 32,
        max_batch_tokens: int | None = None,
    ) -> Any:
        """Candidates for every mask, in the forms of transformers' fill-mask pipeline.

        A text with one mask gives a list of {score, token, token_str, sequence}, best first; one with several gives
        such a list for each. A list of texts gives a list of those and, as in the pipeline, a list of one text gives
        what the text alone does. Scores are probabilities over the whole vocabulary; rows that only pad it have a
        share in them, as in the pipeline, but are never answered.

        Args:
            inputs: texts with at least one mask token each.
            top_k: answers for each mask, at most as many as there are targets.
            targets: words to choose from. One that is not in the vocabulary stands for its first piece, with a warning.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: tokens to allow, special tokens included; the model's own limit by default.
            batch_size: rows of a batch at most.
            max_batch_tokens: tokens of a batch at most, padding included; by default as the model was loaded.

        Raises:
            InputError: not a fill-mask model; no mask, or none left by truncation; `top_k` 0 or above the vocabulary;
                no usable target; see also `encode`.
            NonFiniteError, BackendError: the model failed.
        """
        self._require_masked_lm()
        top_k = check_integer("top_k", top_k, 1, len(self._answerable))
        candidates = self._candidates(targets)
        limits = self._limits(batch_size, max_batch_tokens)
        texts, single = as_texts(inputs)
        tokenize = self._tokenize_texts(texts, truncation, max_length)
        found: list[list[list[MaskAnswer]]] = [[] for _ in texts]
        for index, row, position, logits in self._mask_logits(texts, tokenize, limits):
            scores, tokens = top_tokens(logits, candidates, top_k)
            found[index].append(self._answers(row, position, scores, tokens))
        nested = [masks[0] if len(masks) == 1 else masks for masks in found]
        return nested[0] if single or len(nested) == 1 else nested

    def encode(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: OutputValue | None = "sentence_embedding",
        precision: EmbeddingPrecision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        *,
        pooling: Pooling | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        sentences: str | Sequence[str] | None = None,
    ) -> Any:
        """Embeddings, with the arguments of SentenceTransformer.encode.

        One text gives [D] float32, a list of texts [N, D]. Three things differ from SentenceTransformer: a text that is
        too long is an error unless `truncation` is on, an empty list is an error, and token embeddings are numpy
        arrays unless tensors are asked for.

        Args:
            inputs: a text or a list of texts.
            prompt_name: the prompt of this name is put before each text; by default the checkpoint's own.
            prompt: text to put before each text; overrides `prompt_name`.
            batch_size: rows of a batch at most.
            show_progress_bar: on stderr; by default where the package logs at INFO or DEBUG.
            output_value: "token_embeddings" gives [S, H] for each text, None a dict of all there is.
            precision: smaller types for sentence embeddings, see `pooling.quantize`.
            convert_to_numpy: False gives a list of torch tensors.
            convert_to_tensor: True gives one torch tensor.
            device: the device that the model was loaded on, or None.
            normalize_embeddings: scale to length 1, after `truncate_dim`.
            truncate_dim: keep this many leading dimensions (Matryoshka); by default as the checkpoint says.
            pooling: "mean" or "cls"; the checkpoint's own by default.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: tokens to allow, special tokens included; the model's own limit by default.
            max_batch_tokens: tokens of a batch at most, padding included; by default as the model was loaded.
            sentences: the former name of `inputs`.

        Raises:
            InputError: inputs that are not texts, too long, over `inputs.MAX_TEXT_BYTES` or with a lone surrogate (it
                names the index), or an argument out of its range.
            NonFiniteError: the model gave NaN or Inf for some inputs; it names their indices.
            BackendError: the model failed.
            MissingDependencyError: tensors are asked for and torch is not installed.
        """
        self._refuse_sparse()
        self._check_device(device)
        request = EmbeddingRequest(
            pooling=self.spec.pooling if pooling is None else pooling,
            output_value=output_value,
            precision=precision,
            return_type=return_type(convert_to_numpy, convert_to_tensor),
            normalize=normalize_embeddings,
            truncate_dim=self.spec.truncate_dim if truncate_dim is None else truncate_dim,
        )
        request.check(self.spec)
        limits = self._limits(batch_size, max_batch_tokens)
        texts, single = as_texts(one_of(inputs, sentences), prompt=prompt_text(self.spec, prompt, prompt_name))
        batches = token_batches(
            [len(text) for text in texts], self._tokenize_texts(texts, truncation, max_length), limits
        )
        outputs = request.graph_outputs(self.spec, self._backend.outputs)
        results: list[Any] = [None] * len(texts)
        for indices, batch, values in self._run_all(with_progress(batches, len(texts), show_progress_bar), outputs):
            for index, result in zip(indices, request.rows(self.spec, batch, values), strict=True):
                results[index] = result
        return request.assemble(results, single=single)

    def encode_sparse(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        convert_to_sparse_tensor: bool = True,
        save_to_cpu: bool = False,
        device: str | None = None,
        max_active_dims: int | None = None,
        *,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        route: SparseRoute | None = None,
        as_dict: bool | None = None,
        sentences: str | Sequence[str] | None = None,
    ) -> Any:
        """Sparse embeddings: a weight for some entries of the vocabulary, with the arguments of SparseEncoder.encode.

        One text gives a `SparseEmbedding` (`indices` int64 and `values` float32), a list of texts a list of those.
        Differences from SparseEncoder: tensors come only where they are asked for, and on the CPU; a text that is too
        long is an error unless `truncation` is on; an empty list is an error.

        Args:
            inputs: a text or a list of texts.
            prompt_name: the prompt of this name is put before each text; by default the checkpoint's own.
            prompt: text to put before each text; overrides `prompt_name`.
            batch_size: rows of a batch at most.
            show_progress_bar: as in `encode`.
            convert_to_tensor: True gives a torch tensor [V], of a list [N, V], float32.
            convert_to_sparse_tensor: with `convert_to_tensor`, whether it is a sparse COO tensor or a dense one.
            save_to_cpu: answers are on the CPU in either case.
            device: the device that the model was loaded on, or None.
            max_active_dims: keep this many entries, the heaviest; by default as the checkpoint says, else all.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: tokens to allow, special tokens included; the model's own limit by default.
            max_batch_tokens: tokens of a batch at most, padding included; by default as the model was loaded.
            route: "query" or "document" where the checkpoint encodes the two in different ways; its default otherwise.
                `encode_query` and `encode_document` say it for you.
            as_dict: True gives {token: weight} for each text, heaviest first, in place of vectors; not with tensors.
            sentences: the former name of `inputs`.

        Raises:
            InputError: not a sparse model; see also `encode`.
            NonFiniteError, BackendError: the model failed.
            MissingDependencyError: tensors are asked for and torch is not installed.
        """
        self._require_sparse()
        self._check_device(device)
        form = SparseForm(convert_to_tensor, convert_to_sparse_tensor, bool(as_dict))
        form.check()
        kept = self._max_active_dims(max_active_dims)
        chosen = self._route(route)
        limits = self._limits(batch_size, max_batch_tokens)
        texts, single = as_texts(one_of(inputs, sentences), prompt=prompt_text(self.spec, prompt, prompt_name))
        if chosen == "query" and self._query_weights is not None:
            found = self._query_embeddings(texts, self._query_weights, truncation, max_length, kept)
        else:
            tokenize = self._tokenize_texts(texts, truncation, max_length)
            batches = token_batches([len(text) for text in texts], tokenize, limits)
            found = self._sparse_embeddings(with_progress(batches, len(texts), show_progress_bar), len(texts), kept)
        return form.assemble(found, entry_names(self._tokenizer, self.spec), single=single)

    def decode(self, embeddings: Any, top_k: int | None = None) -> Any:
        """Sparse embeddings as (token, weight) pairs, heaviest first, as SparseEncoder.decode.

        Args:
            embeddings: what `encode_sparse` gives, or an array or tensor [V] or [N, V].
            top_k: pairs at most; None for all.

        Raises:
            InputError: another form, or an entry that the vocabulary does not have.
        """
        if top_k is not None:
            check_integer("top_k", top_k, 1, 1 << 31)
        vectors, single = as_embeddings(embeddings)
        name = entry_names(self._tokenizer, self.spec)
        for vector in vectors:
            if vector.size != self.spec.vocab_size:
                raise InputError(
                    f"the embedding has {vector.size:,} entries, and the vocabulary of {self._name} "
                    f"{self.spec.vocab_size:,}"
                )
        found = [[(name(index), weight) for index, weight in vector.ordered()[:top_k]] for vector in vectors]
        return found[0] if single else found

    def predict(
        self,
        inputs: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: ActivationFn | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        pool: None = None,
        chunk_size: None = None,
        *,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        num_workers: int | None = None,
        sentences: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        activation_fct: ActivationFn | None = None,
    ) -> Any:
        """Scores of a classifier, with the arguments of CrossEncoder.predict; the logits of a token classifier.

        A text, or a flat list of two texts (a pair), is one input; a list of lists is a batch. With one label a batch
        gives [N] float32, with several [N, L]; one input gives one element of that.

        A token classifier takes a text or a list of texts, and gives [T, L] float32 for each: the logits of the text's
        own tokens, special tokens left out, in the order of `classify_tokens`.

        Three things differ from CrossEncoder: an input that is too long is an error unless `truncation` is on, an
        empty list is an error, and an activation that gives NaN or another shape is refused.

        Args:
            inputs: texts or pairs. Where the model is fed token types (`spec.token_types`), a pair has those that the
                checkpoint's tokenizer gives, 1 for the second text as a rule; else the model tells none apart.
            prompt_name: the prompt of this name is put before the first text of each input; by default the
                checkpoint's own.
            prompt: text to put there; overrides `prompt_name`.
            batch_size: rows of a batch at most.
            show_progress_bar: as in `encode`.
            activation_fn: from logits [N, L] to scores of the same shape, in numpy or torch; a torch module, too. By
                default what the checkpoint says (`spec.activation`), and else the sigmoid for one label and nothing
                for several, or for tokens.
            apply_softmax: over the labels, where there are several; after `activation_fn`.
            convert_to_numpy: False gives a list of torch tensors.
            convert_to_tensor: True gives one torch tensor; of a token classifier one for each text.
            device: the device that the model was loaded on, or None.
            pool: None; CrossEncoder's processes have no counterpart here, and nor has `chunk_size`.
            chunk_size: None.
            truncation: cut the longer text of a pair first; without it a pair that is too long is an error.
            max_length: tokens to allow, special tokens included; the model's own limit by default.
            max_batch_tokens: tokens of a batch at most, padding included; by default as the model was loaded.
            num_workers: without effect, as in CrossEncoder.
            sentences: the former name of `inputs`.
            activation_fct: the former name of `activation_fn`.

        Raises:
            InputError: not a classifier, an activation that fails, or as `encode`.
            NonFiniteError, BackendError: the model failed.
            MissingDependencyError: tensors are asked for and torch is not installed.
        """
        self._require_task("classify", "token-classify")
        self._check_device(device)
        refuse_processes(pool, chunk_size)
        request = ScoreRequest(
            activation_fn=former_arguments(activation_fn, activation_fct, num_workers),
            apply_softmax=bool(apply_softmax),
            return_type=return_type(convert_to_numpy, convert_to_tensor),
        )
        request.check()
        limits = self._limits(batch_size, max_batch_tokens)
        given, before = one_of(inputs, sentences), prompt_text(self.spec, prompt, prompt_name)
        if self.spec.task == "token-classify":
            texts, single = as_texts(given, prompt=before)
            tokens = self._token_logits(texts, limits, show_progress_bar, truncation, max_length)
            return request.of_tokens(tokens, self.spec, single=single)
        pairs, single = as_pairs(given, prompt=before)
        logits = self._pair_logits(pairs, limits, show_progress_bar, truncation, max_length)
        return request.of_inputs(logits, self.spec, single=single)

    def classify_tokens(
        self,
        inputs: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        offset_mapping: Sequence[Any] | None = None,
        is_split_into_words: bool = False,
        delimiter: str = " ",
        stride: int | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        batch_size: int = 32,
        max_batch_tokens: int | None = None,
    ) -> Any:
        """Labels of the tokens of each text, in the forms of transformers' token-classification pipeline.

        A text gives a list of {entity, score, index, word, start, end}, one for each token; with an
        `aggregation_strategy` of {entity_group, score, word, start, end}, one for each group of neighbours with one
        label. A list of texts gives a list of those. Special tokens are left out. Two things differ from the pipeline:
        a text that is too long is an error unless `truncation` or `stride` says what to do, and scores are Python
        floats.

        Args:
            inputs: a text or a list of texts; with `is_split_into_words` the words of a text or a list of those, which
                is a batch in both cases, as in the pipeline.
            aggregation_strategy: "none"; "simple" joins neighbours whose labels agree but for "B-" and "I-", and a
                "B-" begins a new group; "first", "average" and "max" give all tokens of a word one label first: that
                of its first token, of the mean of its tokens' scores, or of its surest token.
            ignore_labels: labels not to answer, as they stand in `entity` or `entity_group`.
            offset_mapping: places (start, end) to answer with in place of the tokenizer's, for each token of a text,
                special tokens included; for several texts a list of those.
            is_split_into_words: whether the texts come as lists of words.
            delimiter: what stands between words where `start` and `end` are counted.
            stride: cut a text that is too long into windows that overlap by so many tokens, and join their answers.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: tokens of a text or a window, special tokens included; the model's own limit by default.
            batch_size: rows of a batch at most.
            max_batch_tokens: tokens of a batch at most, padding included; by default as the model was loaded.

        Raises:
            InputError: not a token classifier; an argument out of its range; see also `encode`.
            NonFiniteError, BackendError: the model failed.
        """
        self._require_task("token-classify")
        request = TaggingRequest.of(aggregation_strategy, ignore_labels, stride)
        limits = self._limits(batch_size, max_batch_tokens)
        given = TaggedTexts.of(
            inputs, is_split_into_words=is_split_into_words, delimiter=delimiter, offset_mapping=offset_mapping
        )
        limit = checked_max_length(max_length, low=self._tokenizer.min_length, limit=self.spec.max_length)
        pieces = self._tokenizer.encode_places(given.encoded, max_length=limit, truncation=truncation, stride=stride)
        answers = request.answers(given, pieces, self._piece_logits(pieces, limits), self._tokenizer, self.spec)
        return answers[0] if given.single else answers

    def _piece_logits(self, pieces: Sequence[Piece], limits: BatchLimits) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Number of the piece and logits [T, L] of its own tokens, for each in some order."""
        batches = token_batches(
            [len(piece.ids) for piece in pieces], lambda numbers: [pieces[i].ids for i in numbers], limits
        )
        for numbers, rows in batches:
            batch = collate(rows, pad_token_id=self.spec.pad_token_id)
            logits = self._run(batch, ("logits",), [pieces[number].index for number in numbers])["logits"]
            for number, values in zip(numbers, logits, strict=True):
                piece = pieces[number]
                yield number, values[piece.first : piece.first + len(piece.offsets)]

    def _token_logits(
        self,
        texts: Sequence[str],
        limits: BatchLimits,
        show_progress_bar: bool | None,
        truncation: bool,
        max_length: int | None,
    ) -> list[NDArray[np.float32]]:
        """Logits [T, L] of the own tokens of each text."""
        template = self._tokenizer.template
        tokenize = self._tokenize_texts(texts, truncation, max_length)
        batches = token_batches([len(text) for text in texts], tokenize, limits)
        found: list[NDArray[np.float32]] = [_NO_LOGITS] * len(texts)
        for indices, batch, values in self._run_all(with_progress(batches, len(texts), show_progress_bar), ("logits",)):
            ends = batch.attention_mask.sum(axis=1) - len(template.suffix)
            for index, logits, end in zip(indices, values["logits"], ends.tolist(), strict=True):
                found[index] = logits[len(template.prefix) : end]
        return found

    def _pair_logits(
        self,
        pairs: Sequence[tuple[str, ...]],
        limits: BatchLimits,
        show_progress_bar: bool | None,
        truncation: bool,
        max_length: int | None,
    ) -> NDArray[np.float32]:
        """Logits [N, L]."""
        low = self._tokenizer.min_pair_length
        limit = checked_max_length(max_length, low=low, limit=self.spec.max_length)

        def tokenize(indices: list[int]) -> Rows:
            chosen = [pairs[i] for i in indices]
            return self._tokenizer.encode_pairs(chosen, indices, max_length=limit, truncation=truncation)

        batches = token_batches([sum(map(len, pair)) for pair in pairs], tokenize, limits)
        logits = np.empty((len(pairs), self.spec.num_labels), dtype=np.float32)
        for indices, _, values in self._run_all(with_progress(batches, len(pairs), show_progress_bar), ("logits",)):
            logits[indices] = values["logits"]
        return logits

    def _sparse_embeddings(
        self, batches: Iterable[tuple[list[int], Rows]], count: int, max_active_dims: int | None
    ) -> list[SparseEmbedding]:
        """By the model, in the order of the texts."""
        by_token = self.spec.task == "token-classify"
        found: list[Any] = [None] * count
        for indices, batch, values in self._run_all(batches, ("logits" if by_token else "sparse_embedding",)):
            rows = self._token_weights(batch, values["logits"]) if by_token else values["sparse_embedding"]
            for index, row in zip(indices, rows, strict=True):
                found[index] = sparsify(row, max_active_dims)
        return found

    def _token_weights(self, batch: Batch, logits: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """[V] of each row, of a token classifier's logits [B, S, 1]."""
        unweighted = unweighted_ids(self._tokenizer, self.spec.pad_token_id)
        for ids, mask, values in zip(batch.input_ids, batch.attention_mask == 1, logits[:, :, 0], strict=True):
            yield weights_of_tokens(ids[mask], values[mask], self.spec.vocab_size, unweighted)

    def _query_embeddings(
        self,
        texts: Sequence[str],
        weights: NDArray[np.float32],
        truncation: bool,
        max_length: int | None,
        max_active_dims: int | None,
    ) -> list[SparseEmbedding]:
        """By the stored weights of the tokens, special ones around the text left out."""
        rows = self._tokenize_texts(texts, truncation, max_length)(list(range(len(texts))))
        first, last = len(self._tokenizer.template.prefix), len(self._tokenizer.template.suffix)
        return [sparsify(weights_of_query(row[first : len(row) - last], weights), max_active_dims) for row in rows]

    def _why_not_sparse(self) -> str:
        if is_bundle(self.path):
            return ""
        from gte_deploy.models.sparse_modules import read_sparse_modules

        found = read_sparse_modules(self.path)
        return f" But of this one {found.reason}" if found is not None and found.reason else ""

    def _require_masked_lm(self) -> None:
        # A splade checkpoint has the logits of masks as well; its bundle has their pooled form alone.
        if self.spec.task != "sparse" or "logits" not in self._backend.outputs:
            self._require_task("fill-mask")

    def _run_all(
        self, batches: Iterable[tuple[list[int], Rows]], outputs: Sequence[str]
    ) -> Iterator[tuple[list[int], Batch, Outputs]]:
        """The inputs' indices, the batch and its outputs, for each batch of token ids."""
        for indices, rows in batches:
            batch = collate(rows, pad_token_id=self.spec.pad_token_id, token_types=self.spec.token_types)
            yield indices, batch, self._run(batch, outputs, indices)

    def _mask_logits(
        self, texts: Sequence[str], tokenize: Tokenize, limits: BatchLimits
    ) -> Iterator[tuple[int, list[int], int, NDArray[np.float32]]]:
        """Index and token ids of the text, token and logits [V] of every mask; the masks of one text come in order."""
        at_once = max(1, _MAX_LOGITS // self.spec.vocab_size)
        for indices, rows in self._masked_batches(texts, tokenize, limits):
            batch = collate(
                rows,
                pad_token_id=self.spec.pad_token_id,
                mask_token_id=self._tokenizer.mask_token_id,
                token_types=self.spec.token_types,
            )
            assert batch.mask_positions is not None  # collate found the masks
            for start in range(0, len(batch.mask_positions), at_once):
                positions = batch.mask_positions[start : start + at_once]
                part = dataclasses.replace(batch, mask_positions=positions)
                logits = self._run(part, ("logits",), indices)["logits"]
                if self.spec.logits == "all":
                    logits = logits[positions[:, 0], positions[:, 1]]
                for (row, token), values in zip(positions.tolist(), logits, strict=True):
                    yield indices[row], rows[row], token, values

    def _masked_batches(
        self, texts: Sequence[str], tokenize: Tokenize, limits: BatchLimits
    ) -> Iterator[tuple[list[int], Rows]]:
        """Batches of token ids that all hold a mask; texts that may hold none are looked at first."""
        mask = self._tokenizer.mask_token

        def checked(indices: list[int]) -> Rows:
            rows = tokenize(indices)
            for index, row in zip(indices, rows, strict=True):
                check_mask(index, texts[index], row, self._tokenizer)
            return rows

        sizes = [len(text) if mask is not None and mask in text else math.inf for text in texts]
        return token_batches(sizes, checked, limits)

    def _run(self, batch: Batch, outputs: Sequence[str], indices: Sequence[int]) -> Outputs:
        with in_use():
            values = self._backend.run(batch, outputs)
        check_finite(values, batch, indices)
        return values

    def _answers(
        self, row: Sequence[int], position: int, scores: NDArray[np.float32], tokens: NDArray[np.int64]
    ) -> list[MaskAnswer]:
        return answers(row, position, scores, tokens, self._tokenizer, pad_token_id=self.spec.pad_token_id)

    def _tokenize_texts(self, texts: Sequence[str], truncation: bool, max_length: int | None) -> Tokenize:
        limit = checked_max_length(max_length, low=self._tokenizer.min_length, limit=self.spec.max_length)

        def tokenize(indices: list[int]) -> Rows:
            chosen = [texts[i] for i in indices]
            return self._tokenizer.encode_texts(chosen, indices, max_length=limit, truncation=truncation)

        return tokenize

    def _limits(self, batch_size: int, max_batch_tokens: int | None) -> BatchLimits:
        tokens = self._max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        return BatchLimits(
            max_rows=check_integer("batch_size", batch_size, 1, MAX_BATCH_SIZE),
            max_tokens=check_integer("max_batch_tokens", tokens, 1, MAX_BATCH_TOKENS),
            max_square=self.spec.max_length**2,
        )

    def _candidates(self, targets: str | Sequence[str] | None) -> NDArray[np.int64]:
        if targets is None:
            return self._answerable
        return np.array(self._tokenizer.target_ids(as_texts(targets, name="targets")[0]))

    def _check_device(self, device: str | None) -> None:
        if device is not None and parse_device(str(device)) != parse_device(self.device):
            raise InputError(
                f"this model is on {self.device!r}, not {str(device)!r}; load it with gte_deploy.load(…, device=…)"
            )
