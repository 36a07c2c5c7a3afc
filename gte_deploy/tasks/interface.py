"""The interface of `Model` and `triton.Client`: the public methods, and the checks of their arguments.

A subclass answers batches of texts; see the abstract methods.

Shapes: N inputs, S tokens, T tokens without special ones, H hidden size, V vocabulary, L labels, D embedding size.
"""

import contextlib
import copy
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, overload

from gte_deploy.core.errors import InputError, TooLongError
from gte_deploy.core.options import check_choice, check_flags
from gte_deploy.core.spec import (
    SPARSE_ROUTES,
    AggregationStrategy,
    EmbeddingPrecision,
    ModelSpec,
    Pooling,
    SparseRoute,
    TaskName,
)
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import ReturnType
from gte_deploy.tasks.chunks import ChunkedTexts, ChunkEmbeddings, ChunkRequest, ChunkSpec
from gte_deploy.tasks.classify import ActivationFn, ScoreRequest, former_arguments, refuse_processes
from gte_deploy.tasks.drop_in import DropIn
from gte_deploy.tasks.embed import EmbeddingRequest, OutputValue
from gte_deploy.tasks.hybrid import HybridEmbedding, HybridRequest
from gte_deploy.tasks.multi_vector import MultiVectorRequest, TokenVectors
from gte_deploy.tasks.sparse import Names, SparseForm, SparseRequest
from gte_deploy.tasks.token_classify import TaggedTexts, TaggingRequest, TokenScoreRequest
from gte_deploy.text.batching import BatchLimits
from gte_deploy.text.inputs import MAX_BATCH_SIZE, MAX_BATCH_TOKENS, as_pairs, as_texts, check_integer, distinct

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack  # of typing since Python 3.11

logger = logging.getLogger(__name__)

# sentence-transformers knows these two of every model.
_EMPTY_PROMPTS = ("query", "document")
_NO_EFFECT_IN_RANK = ("apply_softmax", "convert_to_numpy", "convert_to_tensor")
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_MULTI_VECTOR_OPTIONS = frozenset(("batch_size", "show_progress_bar", "truncation", "max_length", "max_batch_tokens"))
_MAX_INT32 = (1 << 31) - 1

Batches = Iterator[tuple[list[int], Sequence[Any]]]
"""For each batch: the numbers of its inputs, and their answers. Every input comes once."""

Texts = Mapping[int, str]
"""The texts to answer by their numbers in the caller's list. Of equal texts only the first is there."""

Pairs = Mapping[int, tuple[str, ...]]
"""The pairs, or single texts, to answer; as `Texts`."""


@dataclass(frozen=True)
class BatchOptions:
    """Options for cutting and batching the inputs of one call.

    Args:
        limits: bounds on each batch.
        truncation: whether an input that is too long loses its last tokens; without it that is an error.
        max_length: tokens to allow, special tokens included; None for the model's own limit.
    """

    limits: BatchLimits
    truncation: bool
    max_length: int | None


class ChunkOptions(TypedDict, total=False):
    """The options of `TextInterface.encode` that `chunks` may have beside it."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int
    show_progress_bar: bool | None
    precision: EmbeddingPrecision | None
    convert_to_numpy: bool
    convert_to_tensor: bool | None
    device: str | None
    normalize_embeddings: bool
    truncate_dim: int | None
    truncation: bool
    max_length: int | None
    max_batch_tokens: int | None
    window_overlap: int | None


class TextInterface(DropIn, ABC):
    """Takes texts and gives answers, computed here or on a server."""

    spec: ModelSpec
    _name: str
    """Name of the model in messages."""

    _max_batch_tokens: int
    """Largest number of tokens in a batch, padding included, if a call gives none."""
    _max_rows: int = MAX_BATCH_SIZE
    """Largest number of rows in a batch that a call may ask for."""
    _takes_whole_texts_only: bool = False
    """Whether `classify_tokens` refuses windows, lists of words and offsets."""
    _gives_dictionaries: bool = False
    """Whether `encode_sparse` gives {token: weight} if a call asks for no form."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine or the connections. Idempotent."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @overload
    def encode(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: OutputValue | None = "sentence_embedding",
        precision: EmbeddingPrecision | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool | None = None,
        device: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: None = None,
        chunk_size: None = None,
        *,
        pooling: Pooling | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        sentences: str | Sequence[str] | None = None,
        convert_to_sparse_tensor: bool | None = None,
        save_to_cpu: bool = False,
        max_active_dims: int | None = None,
        chunks: None = None,
        window_overlap: None = None,
    ) -> Any: ...

    @overload
    def encode(  # type: ignore[overload-overlap]  # a text counts as a sequence of texts, too
        self, inputs: str, *, chunks: ChunkSpec, **options: "Unpack[ChunkOptions]"
    ) -> ChunkEmbeddings: ...

    @overload
    def encode(
        self, inputs: Sequence[str], *, chunks: ChunkSpec, **options: "Unpack[ChunkOptions]"
    ) -> list[ChunkEmbeddings]: ...

    def encode(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: OutputValue | None = "sentence_embedding",
        precision: EmbeddingPrecision | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool | None = None,
        device: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: None = None,
        chunk_size: None = None,
        *,
        pooling: Pooling | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        sentences: str | Sequence[str] | None = None,
        convert_to_sparse_tensor: bool | None = None,
        save_to_cpu: bool = False,
        max_active_dims: int | None = None,
        chunks: ChunkSpec | None = None,
        window_overlap: int | None = None,
    ) -> Any:
        """Return embeddings. The arguments are those of SentenceTransformer.encode.

        One text gives [D] float32, a list of texts [N, D]. Two things differ from SentenceTransformer: a text that is
        too long is an error unless `truncation` is on, and token embeddings are numpy arrays unless tensors are
        requested. A sparse model gives the answers of `encode_sparse`. A multi-vector model
        refuses the call: it embeds queries and documents in different ways.

        Args:
            inputs: a text or a list of texts.
            prompt_name: name of the prompt to put before each text; by default the checkpoint's default prompt.
            prompt: text to put before each text; overrides `prompt_name`.
            batch_size: largest number of rows in a batch.
            show_progress_bar: whether stderr shows progress; by default if the package logs at INFO or DEBUG.
            output_value: "token_embeddings" gives [S, H] for each text, None a dict of every output.
            precision: smaller types for sentence embeddings, see `pooling.quantize`; None for "float32".
            convert_to_numpy: False gives a list of torch tensors.
            convert_to_tensor: True gives one torch tensor.
            device: None, or the device that the model was loaded on; always None for a model on a server.
            normalize_embeddings: scale to length 1, after `truncate_dim`.
            truncate_dim: keep this many leading dimensions (Matryoshka); by default as the checkpoint says.
            pool: must be None; pools of processes are not supported.
            chunk_size: must be None, as `pool`.
            pooling: "mean" or "cls"; the checkpoint's own by default.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: largest number of tokens in a text, special tokens included; by default the model's own limit.
            max_batch_tokens: largest number of tokens in a batch, padding included; by default as the model was loaded.
            sentences: the former name of `inputs`.
            convert_to_sparse_tensor: for a sparse model, see `encode_sparse`.
            save_to_cpu: for a sparse model, without effect.
            max_active_dims: for a sparse model, see `encode_sparse`.
            chunks: embed the chunks of each text (late chunking): one text gives a `ChunkEmbeddings`, a list of texts a
                list of them. `TokenChunks(256, overlap=0)` and `SentenceChunks(256)` are rules; or give (start, end) of
                each chunk of the text, for a list of texts a list of such lists. A chunk's embedding is the mean of its
                tokens' states, special tokens and the prompt left out; the whole text takes part in the attention.
                A text above `max_length` is no error: it is computed in windows, unless `truncation` is on.
            window_overlap: with `chunks`, tokens that neighbouring windows of a long text share, at most half a window;
                by default a tenth.

        Raises:
            InputError: an input is not a text, is too long, has more than `inputs.MAX_TEXT_BYTES` or has a lone
                surrogate (the message names its index); or an argument is out of range.
            NonFiniteError: the model gave NaN or Inf for some inputs; the message names their indices.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            BackendError: the model or the server failed.
            MissingDependencyError: tensors are requested and torch is not installed.
        """
        self._check_device(device)
        check_flags(normalize_embeddings=normalize_embeddings, convert_to_sparse_tensor=convert_to_sparse_tensor)
        refuse_processes(pool, chunk_size)
        default_pooling = self.spec.pooling if chunks is None else "mean"
        request = EmbeddingRequest(
            self.spec,
            pooling=default_pooling if pooling is None else pooling,
            output_value=output_value,
            precision=precision or "float32",
            return_type=return_type(convert_to_numpy, convert_to_tensor),
            normalize=normalize_embeddings,
            truncate_dim=self.spec.truncate_dim if truncate_dim is None else truncate_dim,
        )
        if self.spec.task == "multi-vector":
            raise InputError(
                f"{self._name} embeds queries and documents in different ways: use encode_query, encode_document, or "
                "encode_multi_vector with is_query"
            )
        if window_overlap is not None and chunks is None:
            raise InputError("window_overlap is for chunks; pass chunks, too, or leave it out")
        if self.spec.task == "sparse":
            if chunks is not None:
                raise InputError(f"{self._name} is made for sparse embeddings, which have no chunks; leave chunks out")
            self._refuse_dense_options(request)
            return self.encode_sparse(
                one_of(inputs, sentences),
                prompt_name,
                prompt,
                batch_size,
                show_progress_bar,
                convert_to_tensor,
                convert_to_sparse_tensor,
                max_active_dims=max_active_dims,
                truncation=truncation,
                max_length=max_length,
                max_batch_tokens=max_batch_tokens,
            )
        if convert_to_sparse_tensor is not None or max_active_dims is not None:
            raise InputError(
                f"convert_to_sparse_tensor and max_active_dims are for sparse models, and {self._made_for}"
            )
        of_chunks = None if chunks is None else ChunkRequest(request, chunks, window_overlap)
        (of_chunks or request).check()
        options = self._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        before = prompt_text(self.spec, prompt, prompt_name)
        if of_chunks is not None:
            given = ChunkedTexts.of(one_of(inputs, sentences), before, of_chunks.chunks)
            found = in_order(self._chunk_batches(of_chunks, given, options), given.keys, show_progress_bar)
            return of_chunks.assemble(found, given)
        given_texts = one_of(inputs, sentences)
        if isinstance(given_texts, list | tuple) and not given_texts:
            return request.nothing()
        texts, single = as_texts(given_texts, prompt=before)
        answers = self._embed_batches(request, distinct(texts), options)
        return request.assemble(in_order(answers, texts, show_progress_bar), single=single)

    def encode_sparse(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool | None = None,
        convert_to_sparse_tensor: bool | None = None,
        save_to_cpu: bool = False,
        device: str | None = None,
        max_active_dims: int | None = None,
        pool: None = None,
        chunk_size: None = None,
        *,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        route: SparseRoute | None = None,
        as_dict: bool | None = None,
        sentences: str | Sequence[str] | None = None,
    ) -> Any:
        """Return sparse embeddings: weights for some entries of the vocabulary, with SparseEncoder.encode's arguments.

        One text gives a `SparseEmbedding` (`indices` int64 and `values` float32), a list of texts a list of them.
        Three things differ from SparseEncoder: tensors are on the CPU and given only on request, a text that is too
        long is an error unless `truncation` is on, and an empty list is an error.

        Args:
            inputs: a text or a list of texts.
            prompt_name: name of the prompt to put before each text; by default the checkpoint's default prompt.
            prompt: text to put before each text; overrides `prompt_name`.
            batch_size: largest number of rows in a batch.
            show_progress_bar: as in `encode`.
            convert_to_tensor: True gives one float32 torch tensor: [V] for a text, [N, V] for a list. False gives a
                list of tensors if `convert_to_sparse_tensor` is given. None, the default, is True in that case.
            convert_to_sparse_tensor: True gives sparse COO tensors, False dense ones; None gives sparse ones if
                `convert_to_tensor` is True, else no tensors.
            save_to_cpu: without effect; results are always on the CPU.
            device: None, or the device that the model was loaded on; always None for a model on a server.
            max_active_dims: number of entries to keep, the heaviest; by default as the checkpoint says, else all.
            pool: must be None; pools of processes are not supported.
            chunk_size: must be None, as `pool`.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: largest number of tokens in a text, special tokens included; by default the model's own limit.
            max_batch_tokens: largest number of tokens in a batch, padding included; by default as the model was loaded.
            route: "query" or "document", if the checkpoint encodes the two in different ways; by default its default
                route. `encode_query` and `encode_document` set the route.
            as_dict: True gives {token: weight} for each text, heaviest first, in place of vectors; not with tensors. By
                default a model on a server gives dictionaries, and a model that is loaded here gives vectors.
            sentences: the former name of `inputs`.

        Raises:
            InputError: the model is not a sparse model; see also `encode`.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
            MissingDependencyError: tensors are requested and torch is not installed.
        """
        self._require_sparse()
        self._check_device(device)
        refuse_processes(pool, chunk_size)
        form = SparseForm.of(convert_to_tensor, convert_to_sparse_tensor, as_dict, by_default=self._gives_dictionaries)
        form.check()
        request = self._sparse_request(max_active_dims, route)
        options = self._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        texts, single = as_texts(one_of(inputs, sentences), prompt=prompt_text(self.spec, prompt, prompt_name))
        answers, names = self._sparse_batches(request, distinct(texts), options)
        return form.assemble(in_order(answers, texts, show_progress_bar), names, single=single)

    def encode_hybrid(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        *,
        precision: EmbeddingPrecision = "float32",
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        max_active_dims: int | None = None,
        as_dict: bool | None = None,
        convert_to_tensor: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
    ) -> HybridEmbedding:
        """Return the dense and the sparse embeddings of texts from one pass of a model for the task hybrid.

        The result has two fields: `dense` is what `encode` gives for the same texts, and `sparse` is what
        `encode_sparse` gives.

        Args:
            inputs: a text or a list of texts.
            prompt_name: name of the prompt to put before each text; by default the checkpoint's default prompt.
            prompt: text to put before each text; overrides `prompt_name`.
            batch_size: largest number of rows in a batch.
            show_progress_bar: as in `encode`.
            precision: type of the dense embeddings, as in `encode`.
            normalize_embeddings: scale the dense embeddings to length 1, after `truncate_dim`.
            truncate_dim: leading dimensions of the dense embeddings to keep; by default as the checkpoint says.
            max_active_dims: entries of the sparse embeddings to keep, as in `encode_sparse`.
            as_dict: form of the sparse embeddings, as in `encode_sparse`.
            convert_to_tensor: True gives one torch tensor for each half: dense [N, D], and sparse COO [N, V].
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: largest number of tokens in a text, special tokens included; by default the model's own limit.
            max_batch_tokens: largest number of tokens in a batch, padding included; by default as the model was loaded.

        Raises:
            InputError: the model is not made for the task hybrid; see also `encode`.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
            MissingDependencyError: tensors are requested and torch is not installed.
        """
        self._require_hybrid()
        check_flags(normalize_embeddings=normalize_embeddings)
        form = SparseForm.of(convert_to_tensor, None, as_dict, by_default=self._gives_dictionaries)
        form.check()
        dense = EmbeddingRequest(
            self.spec,
            pooling=self.spec.pooling,
            precision=precision,
            return_type=return_type(True, convert_to_tensor),
            normalize=normalize_embeddings,
            truncate_dim=self.spec.truncate_dim if truncate_dim is None else truncate_dim,
        )
        dense.check()
        request = HybridRequest(dense, self._sparse_request(max_active_dims, None))
        options = self._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        texts, single = as_texts(inputs, prompt=prompt_text(self.spec, prompt, prompt_name))
        answers, names = self._hybrid_batches(request, distinct(texts), options)
        return request.assemble(in_order(answers, texts, show_progress_bar), form, names, single=single)

    def encode_multi_vector(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        is_query: bool | None = None,
        projection: Any = None,
        skip_words: Sequence[str] | None = None,
        normalize_embeddings: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return an embedding for each token of a text, for late interaction; `multi_vector.maxsim` scores them.

        One text gives [T, D] float32, a list of texts a list of such arrays. All tokens count, special tokens, the
        prompt and the tokens that lengthen a query included, except those of `skip_words`.

        A multi-vector model (ColBERT) has settings of its own for queries and for documents: their lengths, a token
        before each text, the tokens that lengthen queries, the projection. `encode_query` and `encode_document` call
        this with `is_query` and with the prompt of that name. Other models give their hidden states, for any task that
        has some, except sparse.

        Args:
            inputs: a text or a list of texts.
            prompt_name: name of the prompt to put before each text, such as "query" or "document"; by default the
                checkpoint's default prompt. It follows the token that the checkpoint puts before each text.
            prompt: text to put before each text; overrides `prompt_name`.
            is_query: whether the texts are queries, or documents; for multi-vector models, which need it.
            projection: for other models, a [D, H] array or tensor: the weight of a linear layer without bias. None
                keeps the hidden states, D = H.
            skip_words: tokens that get no embedding, such as `string.punctuation` for documents. A word that is no
                token of the vocabulary is ignored. By default as the checkpoint says, else no token.
            normalize_embeddings: scale each embedding to length 1, after the projection. By default as the checkpoint
                says; embeddings of other models are scaled.
            **options: `batch_size`, `show_progress_bar`, `truncation`, `max_length` and `max_batch_tokens` of `encode`.
                `max_length` replaces the checkpoint's limit for queries or documents; queries that are lengthened to a
                fixed number of tokens are lengthened to that one.

        Raises:
            InputError: an option is not one of these, or does not belong to this model; the projection has another
                form; a client without a tokenizer gets `skip_words` for such another model; see also `encode`.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
        """
        if unknown := sorted(set(options) - _MULTI_VECTOR_OPTIONS):
            known = ", ".join(sorted(_MULTI_VECTOR_OPTIONS))
            raise InputError(f"encode_multi_vector has no option {', '.join(unknown)}; it has {known}")
        check_flags(is_query=is_query, normalize_embeddings=normalize_embeddings)
        if self.spec.multi_vector is not None:
            if is_query is None or projection is not None:
                raise InputError(
                    f"{self._name} has a projection of its own, and embeds queries and documents in different ways: "
                    "pass is_query=True or is_query=False, and no projection"
                )
            request = MultiVectorRequest(
                self.spec,
                bool(is_query),
                None if skip_words is None else _words(skip_words),
                self.spec.normalize if normalize_embeddings is None else normalize_embeddings,
                self._cut_to,
            )
            return self._multi_vectors(request, inputs, prompt_text(self.spec, prompt, prompt_name), **options)
        if is_query is not None:
            raise InputError(
                f"is_query is for multi-vector models, and {self._name} is made for {self.spec.task}, which has no "
                "settings of queries: leave it out, and name a prompt if there is one"
            )
        skipped = self._skipped_ids(_words(skip_words or ()))
        normalize = normalize_embeddings is None or normalize_embeddings
        vectors = TokenVectors.of(projection, skipped, normalize=normalize, width=self.spec.hidden_size)
        found = self.encode(inputs, prompt_name, prompt, output_value=None, **options)
        return vectors.of_text(found) if isinstance(found, dict) else [vectors.of_text(each) for each in found]

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
        """Return scores of a classifier, or logits of a token classifier. Arguments are those of CrossEncoder.predict.

        A text, or a flat list of two texts (a pair), is one input; a list of lists is a batch. With one label a batch
        gives [N] float32, with several [N, L]; one input gives one element of that array.

        A token classifier takes a text or a list of texts, and gives [T, L] float32 for each: the logits of the text's
        own tokens, special tokens left out, in the order of `classify_tokens`.

        Three things differ from CrossEncoder: an input that is too long is an error unless `truncation` is on, an
        empty list is an error, and an activation that gives NaN or another shape is refused.

        Args:
            inputs: texts or pairs. For a model that takes token types (`spec.token_types`), the checkpoint's tokenizer
                gives the types of a pair, usually 1 for the second text. Other models see no types.
            prompt_name: name of the prompt to put before the first text of each input; by default the checkpoint's
                default prompt.
            prompt: text to put before the first text of each input; overrides `prompt_name`.
            batch_size: largest number of rows in a batch.
            show_progress_bar: as in `encode`.
            activation_fn: function or torch module from logits [N, L] to scores of the same shape, in numpy or torch.
                The default is the checkpoint's (`spec.activation`), else the sigmoid for one label, and no activation
                for several labels or for tokens.
            apply_softmax: whether a softmax over several labels follows `activation_fn`.
            convert_to_numpy: False gives a list of torch tensors.
            convert_to_tensor: True gives one torch tensor; for a token classifier one for each text.
            device: None, or the device that the model was loaded on; always None for a model on a server.
            pool: must be None; CrossEncoder's pools of processes are not supported.
            chunk_size: must be None, as `pool`.
            truncation: cut the longer text of a pair first; without it a pair that is too long is an error.
            max_length: largest number of tokens in an input, special tokens included; by default the model's own limit.
            max_batch_tokens: largest number of tokens in a batch, padding included; by default as the model was loaded.
            num_workers: without effect, as in CrossEncoder.
            sentences: the former name of `inputs`.
            activation_fct: the former name of `activation_fn`.

        Raises:
            InputError: the model is not a classifier, or the activation fails; see also `encode`.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
            MissingDependencyError: tensors are requested and torch is not installed.
        """
        self._require_task("classify", "token-classify")
        self._check_device(device)
        check_flags(apply_softmax=apply_softmax)
        refuse_processes(pool, chunk_size)
        by_token = self.spec.task == "token-classify"
        request = (TokenScoreRequest if by_token else ScoreRequest)(
            self.spec,
            activation_fn=former_arguments(activation_fn, activation_fct, num_workers),
            apply_softmax=bool(apply_softmax),
            return_type=return_type(convert_to_numpy, convert_to_tensor),
        )
        request.check()
        options = self._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        given, before = one_of(inputs, sentences), prompt_text(self.spec, prompt, prompt_name)
        if by_token:
            texts, single = as_texts(given, prompt=before)
            answers = self._token_batches(distinct(texts), options)
            return request.assemble(in_order(answers, texts, show_progress_bar), single=single)
        pairs, single = as_pairs(given, prompt=before)
        answers = self._pair_batches(request, distinct(pairs), options)
        return request.assemble(in_order(answers, pairs, show_progress_bar), single=single)

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
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Label the tokens of each text, with results as from transformers' token-classification pipeline.

        A text gives a list of {entity, score, index, word, start, end}, one for each token. With an
        `aggregation_strategy` it gives {entity_group, score, word, start, end}, one for each group of neighbours with
        one label. A list of texts gives a list of such lists. Special tokens are left out. Two things differ from the
        pipeline: a text that is too long is an error unless `truncation` or `stride` is given, and scores are Python
        floats. A model on a server takes whole texts: it refuses `stride`, `is_split_into_words` and `offset_mapping`.

        Args:
            inputs: a text or a list of texts. With `is_split_into_words`, the words of a text or a list of such lists;
                both are a batch, as in the pipeline.
            aggregation_strategy: "none" joins nothing; "simple" joins neighbours whose labels agree except for "B-" and
                "I-", and a "B-" begins a new group. "first", "average" and "max" first give all tokens of a word one
                label: the label of its first token, of the mean of its tokens' scores, or of its token with the highest
                score.
            ignore_labels: labels to leave out, spelled as in `entity` or `entity_group`.
            offset_mapping: (start, end) for each token of a text, special tokens included, to return instead of the
                tokenizer's offsets; for several texts a list of such lists.
            is_split_into_words: whether the texts come as lists of words.
            delimiter: the string between two words, which `start` and `end` count.
            stride: cut a text that is too long into windows that overlap by this many tokens, and join their answers.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: largest number of tokens in a text or window, special tokens included; by default the model's
                limit.
            batch_size: largest number of rows in a batch.
            max_batch_tokens: largest number of tokens in a batch, padding included; by default as the model was loaded.
            show_progress_bar: as in `encode`.

        Raises:
            InputError: the model is not a token classifier, or an argument is out of range; see also `encode`.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
        """
        self._require_task("token-classify")
        check_flags(is_split_into_words=is_split_into_words)
        if self._takes_whole_texts_only:
            _refuse_parts(
                self._name, stride=stride, is_split_into_words=is_split_into_words, offset_mapping=offset_mapping
            )
        request = TaggingRequest.of(aggregation_strategy, ignore_labels, stride)
        options = self._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        given = TaggedTexts.of(
            inputs, is_split_into_words=is_split_into_words, delimiter=delimiter, offset_mapping=offset_mapping
        )
        answers = in_order(self._entity_batches(request, given, options), given.keys, show_progress_bar)
        return answers[0] if given.single else answers

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
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Predict candidates for every mask, with results as from transformers' fill-mask pipeline.

        A text with one mask gives a list of {score, token, token_str, sequence}, best first; a text with several masks
        gives such a list for each. A list of texts gives a list of these results. As in the pipeline, a list of one
        text gives the same as the text alone. Scores are probabilities over the whole vocabulary. As in the pipeline,
        rows that only pad the vocabulary take part in them, but are never returned.

        Args:
            inputs: texts with at least one mask token each.
            top_k: number of candidates for each mask, at most the number of targets.
            targets: words to choose from. A word outside the vocabulary is replaced by its first piece, with a warning.
            truncation: keep the first tokens of a text that is too long; without it that is an error.
            max_length: largest number of tokens in a text, special tokens included; by default the model's own limit.
            batch_size: largest number of rows in a batch.
            max_batch_tokens: largest number of tokens in a batch, padding included; by default as the model was loaded.
            show_progress_bar: as in `encode`.

        Raises:
            InputError: the model is not a fill-mask model; a text has no mask, or lost it by truncation; `top_k` is 0
                or above the size of the vocabulary; no target is usable; a text has more than 262,144 answers (its
                masks times `top_k`), or they have more than 16,777,216 tokens together (each answer repeats the
                text); see also `encode`.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
        """
        self._require_masked_lm()
        top_k = check_integer("top_k", top_k, 1, self._most_answers)
        words = None if targets is None else as_texts(targets, name="targets")[0]
        options = self._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        texts, single = as_texts(inputs)
        found = in_order(self._mask_batches(top_k, words, distinct(texts), options), texts, show_progress_bar)
        nested = [masks[0] if len(masks) == 1 else masks for masks in found]
        return nested[0] if single or len(nested) == 1 else nested

    def encode_query(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call `encode` with the prompt "query", or without a prompt if the checkpoint has none of that name.

        For a sparse model, call `encode_sparse` with the route of queries, if the model has one. For a multi-vector
        model, call `encode_multi_vector` with `is_query=True`.
        """
        if prompt_name is None and prompt is None:
            prompt = query_prompt(self.spec)
        if self.spec.task == "multi-vector":
            given = one_of(inputs, kwargs.pop("sentences", None))
            return self.encode_multi_vector(given, prompt_name, prompt, is_query=True, **_named(args), **kwargs)
        if self.spec.task == "sparse":
            return self.encode_sparse(inputs, prompt_name, prompt, *args, route="query", **kwargs)
        return self.encode(inputs, prompt_name, prompt, *args, **kwargs)

    def encode_document(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call `encode` with the first prompt of "document", "passage" and "corpus" that the checkpoint has, if any.

        For a sparse model, call `encode_sparse` with the route of documents, if the model has one. For a multi-vector
        model, call `encode_multi_vector` with `is_query=False`.
        """
        if prompt_name is None and prompt is None:
            prompt = document_prompt(self.spec)
        if self.spec.task == "multi-vector":
            given = one_of(inputs, kwargs.pop("sentences", None))
            return self.encode_multi_vector(given, prompt_name, prompt, is_query=False, **_named(args), **kwargs)
        if self.spec.task == "sparse":
            return self.encode_sparse(inputs, prompt_name, prompt, *args, route="document", **kwargs)
        return self.encode(inputs, prompt_name, prompt, *args, **kwargs)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: ActivationFn | None = None,
        device: str | None = None,
        pool: None = None,
        chunk_size: None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Rank documents by their score with the query: {corpus_id, score} and, on request, text, best first.

        The arguments and their order are those of CrossEncoder.rank; `predict` explains them. `kwargs` are the
        keyword-only arguments of `predict`. `apply_softmax`, `convert_to_numpy` and `convert_to_tensor` have no effect,
        as in CrossEncoder.

        A multi-vector model ranks by `similarity` of `encode_query` and `encode_document`. The prompt is that of the
        query, `kwargs` are `truncation`, `max_length` (of documents) and `max_batch_tokens`; there is no activation.

        Raises:
            InputError: the model has more than one label; `top_k` is not positive; see `predict`.
        """
        self._require_task("classify", "multi-vector")
        if self.spec.task == "classify" and self.spec.num_labels != 1:
            raise InputError(f"rank needs a model with one label, and this has {self.spec.num_labels}; use predict")
        check_flags(return_documents=return_documents)
        texts, single = as_texts(documents, name="documents")
        if single:
            raise InputError("documents must be a list of texts, not one text")
        if top_k is not None:
            check_integer("top_k", top_k, 1, 1 << 31)
        as_texts([query], name="query")
        if self.spec.task == "multi-vector":
            self._check_device(device)
            refuse_processes(pool, chunk_size)
            if activation_fn is not None:
                raise InputError("activation_fn is for rerankers; the scores of a multi-vector model have none")
            kwargs |= {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
            of_query = {name: kwargs[name] for name in ("truncation",) if name in kwargs}
            with _too_long_as(lambda error: "the query"):
                asked = self.encode_query(query, prompt_name, prompt, **of_query)
            with _too_long_as(lambda error: f"document {error.index}"):
                vectors = self.encode_document(texts, **kwargs)
            scores = self.similarity([asked], vectors)[0].tolist()
        else:
            with _too_long_as(_of_query_or_document):
                scores = self.predict(
                    [(query, text) for text in texts],
                    prompt_name,
                    prompt,
                    batch_size,
                    show_progress_bar,
                    activation_fn,
                    device=device,
                    pool=pool,
                    chunk_size=chunk_size,
                    **_without_effect(kwargs),
                ).tolist()
        order = sorted(range(len(texts)), key=lambda i: -scores[i])[:top_k]
        shown = [{"text": text} if return_documents else {} for text in texts]
        return [{"corpus_id": i, "score": scores[i], **shown[i]} for i in order]

    @abstractmethod
    def _check_device(self, device: str | None) -> None:
        """Refuse a device on which the model does not compute.

        Raises:
            InputError: the message names the device.
        """

    @abstractmethod
    def _embed_batches(self, request: EmbeddingRequest, texts: Texts, options: BatchOptions) -> Batches:
        """The answers of `EmbeddingRequest.answer`."""

    @abstractmethod
    def _chunk_batches(self, request: ChunkRequest, given: ChunkedTexts, options: BatchOptions) -> Batches:
        """The answers of `ChunkRequest.answers` for the distinct texts."""

    @abstractmethod
    def _sparse_batches(self, request: SparseRequest, texts: Texts, options: BatchOptions) -> tuple[Batches, Names]:
        """Return the `SparseEmbedding` of each text, and the names of entries, complete after the last batch."""

    @abstractmethod
    def _hybrid_batches(self, request: HybridRequest, texts: Texts, options: BatchOptions) -> tuple[Batches, Names]:
        """Return the answers of `HybridRequest.answer`, and names as `_sparse_batches` does."""

    @abstractmethod
    def _multi_vector_batches(self, request: MultiVectorRequest, texts: Texts, options: BatchOptions) -> Batches:
        """The answers of `MultiVectorRequest.answer`; `options.max_length` is the caller's, or None."""

    @abstractmethod
    def _pair_batches(self, request: ScoreRequest, pairs: Pairs, options: BatchOptions) -> Batches:
        """Logits [L] of each pair, or single text."""

    @abstractmethod
    def _token_batches(self, texts: Texts, options: BatchOptions) -> Batches:
        """Logits [T, L] of the tokens of each text, special tokens left out."""

    @abstractmethod
    def _entity_batches(self, request: TaggingRequest, given: TaggedTexts, options: BatchOptions) -> Batches:
        """The entities of each of the distinct texts."""

    @abstractmethod
    def _mask_batches(self, top_k: int, targets: list[str] | None, texts: Texts, options: BatchOptions) -> Batches:
        """The answers for each mask of each text."""

    @property
    @abstractmethod
    def _most_answers(self) -> int:
        """The largest `top_k`."""

    def _require_masked_lm(self) -> None:
        self._require_task("fill-mask")

    def _batch_options(
        self, batch_size: int, max_batch_tokens: int | None, truncation: bool, max_length: int | None
    ) -> BatchOptions:
        check_flags(truncation=truncation)
        tokens = self._max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        if max_length is None and self._cut_to is not None:
            truncation, max_length = True, self._cut_to
        limits = BatchLimits(
            max_rows=min(check_integer("batch_size", batch_size, 1, MAX_BATCH_SIZE), self._max_rows),
            max_tokens=check_integer("max_batch_tokens", tokens, 1, MAX_BATCH_TOKENS),
            max_square=self.spec.max_length**2,
        )
        return BatchOptions(limits, truncation, max_length)

    def _multi_vectors(
        self,
        request: MultiVectorRequest,
        inputs: Any,
        prompt: str,
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
    ) -> Any:
        """Return the embeddings [T, D] of a text, or a list of those of several texts."""
        options = self._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        # The limit that the user has set for all texts does not replace that of queries: see `MultiVectorRequest`.
        options = dataclasses.replace(options, max_length=max_length)
        texts, single = as_texts(inputs, prompt=prompt)
        answers = self._multi_vector_batches(request, distinct(texts), options)
        found = in_order(answers, texts, show_progress_bar)
        return found[0] if single else found

    @property
    def _made_for(self) -> str:
        """What errors say about the model: its task, the method for it, and what else to do."""
        return f"{self._name} is made for {self.spec.task}: use {TASKS[self.spec.task].method}, or load another model"

    def _require_task(self, *tasks: TaskName) -> None:
        if not any(TASKS[task].can_run_on(self.spec) for task in tasks):
            raise InputError(f"this needs a {' or '.join(tasks)} model, and {self._made_for}")

    def _refuse_dense_options(self, request: EmbeddingRequest) -> None:
        plain = EmbeddingRequest(
            self.spec, self.spec.pooling, return_type=request.return_type, truncate_dim=self.spec.truncate_dim
        )
        if request != plain:
            raise InputError(
                f"{self._name} is made for sparse embeddings, which have no output_value, precision, normalization, "
                "truncate_dim or pooling of their own; leave these arguments out"
            )

    def _require_sparse(self) -> None:
        if not TASKS["sparse"].can_run_on(self.spec):
            raise InputError(
                f"this needs a sparse model, and {self._made_for}. A checkpoint with a "
                "masked-LM head or with a token classifier of one label is loaded (task='sparse') or exported "
                f"(--task sparse) as one.{self._why_not_sparse()}"
            )

    def _skipped_ids(self, words: Sequence[str]) -> list[int]:
        if not words:
            return []
        if self.tokenizer is None:
            raise InputError(f"skip_words need the tokenizer: give the folder of {self._name} to the client")
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[word] for word in words if word in vocabulary]

    def _require_hybrid(self) -> None:
        if not TASKS["hybrid"].can_run_on(self.spec):
            raise InputError(
                f"this needs a hybrid model, and {self._made_for}. A checkpoint with a token "
                "classifier of one label, such as gte-multilingual-base, is loaded (task='hybrid') or exported "
                "(--task hybrid) as one."
            )

    def _sparse_request(self, max_active_dims: int | None, route: SparseRoute | None) -> SparseRequest:
        if max_active_dims is not None:
            max_active_dims = check_integer("max_active_dims", max_active_dims, 1, _MAX_INT32)
        return SparseRequest(self.spec, max_active_dims, self._route(route))

    def _why_not_sparse(self) -> str:
        """Return the end of an error message: why the checkpoint's own files do not describe a sparse model."""
        return ""

    def _route(self, route: str | None) -> SparseRoute:
        """The route of the texts of a call; see `SparseSpec.default_route`."""
        sparse = self.spec.sparse
        if route is None and sparse is not None and sparse.query_weights is not None:
            route = sparse.default_route
            if route is None:
                raise InputError(
                    f"{self._name} encodes queries and documents in different ways: use encode_query or encode_document"
                )
        check_choice("route", route, (None, *SPARSE_ROUTES))
        return "query" if route == "query" else "document"


@contextlib.contextmanager
def _too_long_as(name: Callable[[TooLongError], str]) -> Iterator[None]:
    """Let the error of an input that is too long name it as the caller of `rank` does."""
    try:
        yield
    except TooLongError as error:
        raise error.of(name(error)) from None


def _of_query_or_document(error: TooLongError) -> str:
    if error.first_fits:
        return f"document {error.index}, with the query,"
    return f"the query is too long: with document {error.index} it"


def _refuse_parts(model: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise InputError(f"{name} is not served: {model} takes whole texts. Load the model for it.")


def _words(skip_words: Sequence[str]) -> tuple[str, ...]:
    words = list(skip_words)
    return tuple(as_texts(words, name="skip_words")[0]) if words else ()


def _named(args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the arguments of MultiVectorEncoder.encode_query that may follow the prompt by their place."""
    names = ("batch_size", "show_progress_bar")
    if len(args) > len(names):
        raise InputError(f"after the prompt come {' and '.join(names)}; pass other options by their names")
    return dict(zip(names, args, strict=False))


def _without_effect(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `rank` that `predict` takes: all except those that CrossEncoder.rank ignores."""
    for name in _NO_EFFECT_IN_RANK:
        if name in options:
            logger.warning("%s has no effect in rank, which returns Python floats", name)
    return {name: value for name, value in options.items() if name not in _NO_EFFECT_IN_RANK}


def prompt_text(spec: ModelSpec, prompt: str | None, name: str | None) -> str:
    """Return the text before each input: `prompt`, or the prompt named `name`, or the checkpoint's default, or "".

    Raises:
        InputError: the prompt is not a text, or the checkpoint has no prompt of that name.
    """
    if prompt is not None:
        if not isinstance(prompt, str):
            raise InputError(f"prompt must be a text, not {type(prompt).__name__}")
        if name is not None:
            logger.warning("both prompt and prompt_name are given; prompt_name %r is ignored", name)
        return prompt
    name = spec.default_prompt_name if name is None else name
    if name is None:
        return ""
    if name not in spec.prompts and name in _EMPTY_PROMPTS:
        return ""
    if name not in spec.prompts:
        known = ", ".join(spec.prompts) or "none"
        raise InputError(f"prompt_name {name!r} is none of this model's prompts: {known}")
    return spec.prompts[name]


def query_prompt(spec: ModelSpec) -> str:
    """Return the text before each query: the checkpoint's prompt "query", or ""."""
    return spec.prompts.get("query", "")


def document_prompt(spec: ModelSpec) -> str:
    """Return the text before each document: the first prompt of "document", "passage" and "corpus", or ""."""
    return next((spec.prompts[name] for name in _DOCUMENT_PROMPTS if name in spec.prompts), "")


def one_of(inputs: Any, sentences: Any) -> Any:
    """The inputs of a call, by the name `inputs` or by the former name `sentences`.

    Raises:
        InputError: both or neither are given.
    """
    if (inputs is None) == (sentences is None):
        raise InputError("give the texts as `inputs` (or, as before, as `sentences`), once")
    return sentences if inputs is None else inputs


def return_type(convert_to_numpy: bool, convert_to_tensor: bool | None) -> ReturnType:
    """The type that `encode` returns, as SentenceTransformer.encode reads the two arguments.

    Raises:
        InputError: one of them is no flag.
    """
    check_flags(convert_to_numpy=convert_to_numpy, convert_to_tensor=convert_to_tensor)
    if convert_to_tensor:
        return "tensor"
    return "numpy" if convert_to_numpy else "list of tensors"


def in_order(batches: Batches, inputs: Sequence[Hashable], show_progress_bar: bool | None = False) -> list[Any]:
    """The answers to all inputs in their order, with a progress bar on stderr.

    Args:
        batches: the answers to `distinct(inputs)`. An input that equals an earlier one gets a copy of its answer.
        inputs: all inputs of the call.
        show_progress_bar: None shows it if the package logs at INFO or DEBUG.
    """
    check_flags(show_progress_bar=show_progress_bar)
    answers: dict[int, Any] = {}
    for numbers, found in _with_progress(batches, inputs, show_progress_bar):
        answers.update(zip(numbers, found, strict=True))
    if len(answers) < len(inputs):
        firsts: dict[Hashable, int] = {}
        for number, item in enumerate(inputs):
            first = firsts.setdefault(item, number)
            if first != number:
                answers[number] = copy.deepcopy(answers[first])
    return [answers[number] for number in range(len(inputs))]


def _with_progress(batches: Batches, inputs: Sequence[Hashable], wanted: bool | None) -> Batches:
    if wanted is None:
        wanted = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    if not wanted:
        yield from batches
        return
    from tqdm.auto import tqdm

    equal = Counter(inputs)
    with tqdm(total=len(inputs), desc="Inputs") as bar:
        for numbers, found in batches:
            yield numbers, found
            bar.update(sum(equal[inputs[number]] for number in numbers))
