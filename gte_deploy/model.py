"""`Model`: takes texts and gives answers, the same on every backend.

Shapes: N inputs, S tokens, T tokens without special ones, H hidden size, V vocabulary, L labels, D embedding size.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy._version import __version__
from gte_deploy.backends.advice import faster_here
from gte_deploy.backends.base import WARM_SHAPES, Backend, Batch, LanedBackend
from gte_deploy.backends.checks import check_finite
from gte_deploy.backends.choice import precision_of
from gte_deploy.backends.devices import parse_device
from gte_deploy.backends.joining import JoiningBackend
from gte_deploy.backends.stream_plan import StreamPlan
from gte_deploy.backends.streams import StreamedBackend
from gte_deploy.bundle.manifest import is_bundle, read_manifest
from gte_deploy.core.calls import Call, Usage, current_call
from gte_deploy.core.errors import BackendError, BundleError, InputError
from gte_deploy.core.forking import follow, in_use
from gte_deploy.core.lanes import Result, in_lanes
from gte_deploy.core.options import check_flags
from gte_deploy.core.spec import ModelSpec
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import HIDDEN, Outputs, Request
from gte_deploy.tasks.chunks import ChunkedTexts, ChunkRequest, ChunkSums, Window, windows_of
from gte_deploy.tasks.classify import ScoreRequest
from gte_deploy.tasks.embed import EmbeddingRequest
from gte_deploy.tasks.fill_mask import MaskAnswer, MaskRequest, check_mask, check_size, split_by_masks
from gte_deploy.tasks.hybrid import HybridRequest
from gte_deploy.tasks.interface import Batches, BatchOptions, Pairs, TextInterface, Texts
from gte_deploy.tasks.multi_vector import MultiVectorRequest
from gte_deploy.tasks.sparse import (
    Names,
    SparseRequest,
    as_embeddings,
    entry_names,
    unweighted_ids,
    weights_of_query,
)
from gte_deploy.tasks.token_classify import OwnLogits, TaggedTexts, TaggingRequest
from gte_deploy.text.batching import BatchLimits, collate, token_batches
from gte_deploy.text.inputs import MAX_BATCH_SIZE, MAX_BATCH_TOKENS, as_texts, check_integer, distinct
from gte_deploy.text.model_tokenizer import ModelTokenizer
from gte_deploy.text.tokenization import Piece, TextTokenizer, checked_max_length

Rows = list[list[int]]
Tokenize = Callable[[list[int]], Rows]
"""A function from the indices of inputs to their token ids."""
TokenBatch = tuple[list[int], Rows]
"""A batch: the indices of its inputs, and their token ids."""
TokenIds = Iterator[TokenBatch]


@dataclass(frozen=True)
class Origin:
    """The recipe of a model: another process builds the same model from it.

    Args:
        again: function that builds the model from `arguments`, in any process. Function and arguments can be pickled.
        arguments: arguments of `again`.
        reopen: function that opens the engine alone again, with a given number of threads; None if that is impossible.
        checksum: checksum of the bundle that was loaded; None for a checkpoint.
    """

    again: Callable[..., "Model"]
    arguments: tuple[Any, ...]
    reopen: Callable[[int], Backend] | None = None
    checksum: str | None = None


@dataclass(frozen=True)
class WarmUp:
    """The result of `Model.warm_up`.

    Args:
        shapes: (rows, tokens of a row) of each batch that was run.
        seconds: duration of all runs.
    """

    shapes: tuple[tuple[int, int], ...]
    seconds: float


class Model(TextInterface):
    """A loaded model. Methods may be called from several threads at once; results are in the order of the inputs.

    Equal inputs of one call are computed once, and each gets a result of its own; an error names the first of them.
    Create a model with `gte_deploy.load`. As a context manager, the model closes at the end of the block.
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
        """Join a backend and a tokenizer. `origin` lets other processes build the same model.

        `query_weights` [V] are the stored weights for the queries of a sparse model.

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

    @property
    def checksum(self) -> str | None:
        """The checksum of the bundle that was loaded, as `gte-deploy verify` prints it; None for a checkpoint."""
        return None if self._origin is None else self._origin.checksum

    def close(self) -> None:
        """Free the engine. Idempotent; later calls that compute raise BackendError."""
        self._is_closed = True
        self._backend.close()
        if self._origin is not None:  # it keeps the files open, to open the engine again
            self._origin = dataclasses.replace(self._origin, reopen=None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle or copy the model as its path and options; the receiving process calls `load` again.

        Raises:
            BackendError: the model is closed, or was not created by `load`.
        """
        if self._is_closed:
            raise BackendError("this model is closed, so it cannot be pickled or copied; load it again")
        if self._origin is None:
            raise BackendError(
                "this model was not created by gte_deploy.load, so no other process can open it. Call "
                "gte_deploy.load in the process that needs it."
            )
        return self._origin.again, self._origin.arguments, self._settings()

    def after_fork(self, *, idle: bool) -> None:
        """See `forking.Follower`."""
        if not self._is_closed:
            from gte_deploy.backends.inherited import after_fork

            reopen = self._origin.reopen if self._origin is not None else None
            self._backend = after_fork(self._backend, reopen, idle=idle)

    @property
    def backend(self) -> str:
        """Name of the backend: "onnx", "openvino", "torch", "tensorrt" or "executorch"."""
        return self._backend.name

    @property
    def joining(self) -> JoiningBackend | None:
        """The queue of a model that was loaded with `join_calls`: what waits now, and observers; None without one."""
        return self._backend if isinstance(self._backend, JoiningBackend) else None

    @property
    def device(self) -> str:
        """Device of the backend, such as "cpu" or "cuda:0"."""
        return self._backend.device

    @property
    def tokenizer(self) -> ModelTokenizer:
        """The model's tokenizer: `model.tokenizer(texts)`, `.encode`, `.decode`, `.tokenize`; see `ModelTokenizer`."""
        return ModelTokenizer(self._tokenizer, self.spec)

    def __repr__(self) -> str:
        """What `print` shows: the folder, the task, and what the model runs on; see `info` for more."""
        if self._is_closed:
            return f"<Model {str(self.path)!r}: closed>"
        return (
            f"<Model {str(self.path)!r}: {self.spec.task}, {self.spec.embedding_width} dimensions, texts up to "
            f"{self.spec.max_length:,} tokens, {self._precision()} on {self.backend}, {self.device}>"
        )

    def info(self) -> dict[str, Any]:
        """Return facts about the loaded model, as plain JSON data.

        `precision` is what it computes in, such as "fp32", or "int8+bf16" for INT8 products with the rest in bfloat16.
        `faster_here` of a bundle has a sentence for each thing that would be faster on this machine. `gte-deploy info`
        says more, because it measures.
        """
        return {
            "gte_deploy": __version__,
            "path": str(self.path),
            "backend": self.backend,
            "backend_reason": self._backend_reason,
            "precision": self._precision(),
            "device": self.device,
            "num_threads": self._backend.num_threads,
            "max_batch_tokens": self._max_batch_tokens,
            "lists": self._streams(),
            "outputs": list(self._backend.outputs),
            "faster_here": self._faster_here(),
            **dataclasses.asdict(self.spec),
        }

    def _streams(self) -> dict[str, Any]:
        """Return the number of batches of a list that are computed at once, and the CPU threads of each."""
        engine = self._backend.inner if isinstance(self._backend, JoiningBackend) else self._backend
        if isinstance(engine, StreamedBackend):
            return dataclasses.asdict(engine.plan)
        return {"streams": getattr(engine, "lanes", 1), "threads": engine.num_threads}

    def warm_up(self, lengths: Sequence[int] | None = None, rows: Sequence[int] | None = None) -> "WarmUp":
        """Run typical batches, so that later calls find kernels compiled, memory reserved and CUDA graphs captured.

        The engine runs every length with every number of rows. A batch has no more rows than one of `encode`: see
        `load` about `max_batch_tokens`. Without arguments a TensorRT engine runs the smallest, the tuned and the
        largest shape of each of its profiles, in all execution slots; other engines run 1 and 32 rows of 16, 128 and
        512 tokens. Calls from other threads wait while a TensorRT engine warms up.

        Args:
            lengths: tokens of a row, special tokens included; longer ones than the model takes are an error.
            rows: numbers of rows of a batch.

        Raises:
            InputError: a length or a number of rows is out of range.
            BackendError: the engine failed, or the model is closed.
        """
        backend = self._backend
        shapes = self._shapes_to_warm_up(lengths, rows)
        outputs = [name for name in TASKS[self.spec.task].answers if name in backend.outputs] or [HIDDEN]
        batches = [self._sample_batch(*shape) for shape in shapes]
        started = time.perf_counter()
        with in_use():
            if isinstance(backend, LanedBackend):
                backend.warm_up(batches, outputs)
            else:
                for batch in batches:
                    backend.run(batch, outputs)
        return WarmUp(tuple(shapes), time.perf_counter() - started)

    def tokenize(
        self, texts: str | Sequence[str], *, truncation: bool = False, max_length: int | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """Return `input_ids` and `attention_mask`, both [N, S] int64 and padded on the right.

        For a model that takes token types (`spec.token_types`), return `token_type_ids` of the same form, too.

        Raises:
            InputError: see `encode`.
        """
        check_flags(truncation=truncation)
        texts = as_texts(texts, name="texts")[0]
        rows = self._tokenize_texts(dict(enumerate(texts)), truncation, max_length)(list(range(len(texts))))
        batch = collate(rows, pad_token_id=self.spec.pad_token_id, token_types=self.spec.token_types)
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **types}

    def decode(self, embeddings: Any, top_k: int | None = None) -> Any:
        """Return sparse embeddings as (token, weight) pairs, heaviest first, as SparseEncoder.decode does.

        Args:
            embeddings: a result of `encode_sparse`, or an array or tensor [V] or [N, V].
            top_k: largest number of pairs for each text; None for all.

        Raises:
            InputError: the embeddings have another form, or an entry outside the vocabulary.
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

    def _shapes_to_warm_up(self, lengths: Sequence[int] | None, rows: Sequence[int] | None) -> list[tuple[int, int]]:
        """Return (rows, tokens of a row) of batches within the limits of `encode`, the largest first."""
        longest = self.spec.max_length
        if lengths is None and rows is None and isinstance(self._backend, LanedBackend):
            wanted = self._backend.shapes_to_warm_up()
        else:
            for name, values, most in (("lengths", lengths, longest), ("rows", rows, MAX_BATCH_SIZE)):
                for value in values or ():
                    check_integer(f"each of {name}", value, 1, most)
            usual_rows, usual_lengths = (sorted(set(values)) for values in zip(*WARM_SHAPES, strict=True))
            tokens = [min(length, longest) for length in usual_lengths] if lengths is None else lengths
            wanted = list(itertools.product(usual_rows if rows is None else rows, tokens))
        limits = self._batch_options(MAX_BATCH_SIZE, None, False, None).limits
        shapes = {
            (max(1, min(number, limits.max_tokens // length, limits.max_square // length**2)), length)
            for number, length in ((int(number), min(int(length), longest)) for number, length in wanted)
        }
        return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]), reverse=True)

    def _sample_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of [rows, length] tokens, of any words, with a mask in each row if the model fills masks."""
        ids = np.resize(self._answerable, (rows, length)).astype(np.int64)
        masks = None
        if self.spec.task == "fill-mask":
            masks = np.stack([np.arange(rows), np.zeros(rows, np.int64)], axis=1)
        return Batch(ids, np.ones_like(ids), masks)

    def _embed_batches(self, request: EmbeddingRequest, texts: Texts, options: BatchOptions) -> Batches:
        return self._answers(request, self._token_ids(texts, options))

    def _chunk_batches(self, request: ChunkRequest, given: ChunkedTexts, options: BatchOptions) -> Batches:
        limit = self._limit(options.max_length, self._tokenizer.min_length)
        project = None if self.spec.embedding_size is None else self._dense
        for group in given.groups(list(distinct(given.keys))):
            documents = request.documents(given, group, self._tokenizer, limit=limit, truncation=options.truncation)
            sums = self._window_sums(windows_of(documents), options.limits)
            yield from request.answers(documents, sums, project)

    def _dense(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the Dense modules, which graphs apply to the pooling of whole texts only, to states [N, H]."""
        for layer in self._dense_layers:
            states = layer(states)
        return states

    @cached_property
    def _dense_layers(self) -> Sequence[Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
        from gte_deploy.models.dense_layers import read_dense_layers

        return read_dense_layers(self.path, self.spec.hidden_size, self.spec.embedding_width)

    def _window_sums(self, windows: Mapping[int, Window], limits: BatchLimits) -> Iterator[tuple[Window, ChunkSums]]:
        """Yield each window with its `sums`, in any order."""
        if not windows:
            return
        sizes = {number: window.end - window.first for number, window in windows.items()}
        batches = token_batches(sizes, lambda numbers: [windows[i].row for i in numbers], limits)

        def compute(item: TokenBatch) -> list[tuple[Window, ChunkSums]]:
            numbers, rows = item
            batch = collate(rows, pad_token_id=self.spec.pad_token_id, token_types=self.spec.token_types)
            chosen = [windows[number] for number in numbers]
            states = self._run(batch, (HIDDEN,), [window.document.index for window in chosen])[HIDDEN]
            return [(window, window.sums(row)) for window, row in zip(chosen, states, strict=True)]

        for found in self._in_lanes(compute, batches):
            yield from found

    def _sparse_batches(self, request: SparseRequest, texts: Texts, options: BatchOptions) -> tuple[Batches, Names]:
        names = entry_names(self._tokenizer, self.spec)
        if request.route == "query" and self._query_weights is not None:
            return self._query_batches(request, self._query_weights, texts, options), names
        if self.spec.task == "token-classify":
            unweighted = unweighted_ids(self._tokenizer, self.spec.pad_token_id)
            request = dataclasses.replace(request, unweighted=unweighted)
        return self._answers(request, self._token_ids(texts, options)), names

    def _hybrid_batches(self, request: HybridRequest, texts: Texts, options: BatchOptions) -> tuple[Batches, Names]:
        return self._answers(request, self._token_ids(texts, options)), entry_names(self._tokenizer, self.spec)

    def _multi_vector_batches(self, request: MultiVectorRequest, texts: Texts, options: BatchOptions) -> Batches:
        request = request.of_tokenizer(self._tokenizer)
        tokenizer = self._tokenizer.with_prefix(request.prefix)
        limit = request.limit(options.max_length, tokenizer.min_length)
        outputs = request.graph_outputs(self._backend.outputs)

        def tokenize(indices: list[int]) -> Rows:
            return request.rows(tokenizer, [texts[i] for i in indices], indices, limit=limit, cut=options.truncation)

        def answer(item: TokenBatch) -> tuple[list[int], Sequence[Any]]:
            indices, rows = item
            batch = collate(rows, pad_token_id=self.spec.pad_token_id, token_types=self.spec.token_types)
            return indices, request.answer(batch, self._run(batch, outputs, indices, request.scored(batch)))

        sizes = {number: len(text) for number, text in texts.items()}
        return self._in_lanes(answer, token_batches(sizes, tokenize, options.limits))

    def _query_batches(
        self, request: SparseRequest, weights: NDArray[np.float32], texts: Texts, options: BatchOptions
    ) -> Batches:
        """Answer queries with the stored weights of their tokens; the special tokens around a text are left out."""
        numbers = list(texts)
        rows = self._tokenize_texts(texts, options.truncation, options.max_length)(numbers)
        first, last = len(self._tokenizer.template.prefix), len(self._tokenizer.template.suffix)
        yield numbers, request.vectors(weights_of_query(row[first : len(row) - last], weights) for row in rows)

    def _pair_batches(self, request: ScoreRequest, pairs: Pairs, options: BatchOptions) -> Batches:
        limit = self._limit(options.max_length, self._tokenizer.min_pair_length)

        def tokenize(indices: list[int]) -> Rows:
            chosen = [pairs[i] for i in indices]
            return self._tokenizer.encode_pairs(chosen, indices, max_length=limit, truncation=options.truncation)

        sizes = {number: sum(map(len, pair)) for number, pair in pairs.items()}
        return self._answers(request, token_batches(sizes, tokenize, options.limits))

    def _token_batches(self, texts: Texts, options: BatchOptions) -> Batches:
        template = self._tokenizer.template
        request = OwnLogits(first=len(template.prefix), last=len(template.suffix))
        return self._answers(request, self._token_ids(texts, options))

    def _entity_batches(self, request: TaggingRequest, given: TaggedTexts, options: BatchOptions) -> Batches:
        limit = self._limit(options.max_length, self._tokenizer.min_length)
        numbers = list(distinct(given.keys))
        chosen: Any = [given.encoded[number] for number in numbers]
        pieces = self._tokenizer.encode_places(
            chosen, numbers, max_length=limit, truncation=options.truncation, stride=request.stride
        )
        logits = self._piece_logits(pieces, options.limits)
        found = request.answers(given, pieces, logits, self._tokenizer, self.spec)
        yield numbers, [found[number] for number in numbers]

    def _piece_logits(self, pieces: Sequence[Piece], limits: BatchLimits) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the number of each piece and the logits [T, L] of its own tokens, in any order."""
        sizes = {number: len(piece.ids) for number, piece in enumerate(pieces)}
        batches = token_batches(sizes, lambda numbers: [pieces[i].ids for i in numbers], limits)

        def compute(item: TokenBatch) -> tuple[list[int], NDArray[np.float32]]:
            numbers, rows = item
            batch = collate(rows, pad_token_id=self.spec.pad_token_id)
            return numbers, self._run(batch, ("logits",), [pieces[number].index for number in numbers])["logits"]

        for numbers, logits in self._in_lanes(compute, batches):
            for number, values in zip(numbers, logits, strict=True):
                piece = pieces[number]
                yield number, values[piece.first : piece.first + len(piece.offsets)]

    @property
    def _most_answers(self) -> int:
        return len(self._answerable)

    def _mask_batches(self, top_k: int, targets: list[str] | None, texts: Texts, options: BatchOptions) -> Batches:
        candidates = self._answerable if targets is None else np.array(self._tokenizer.target_ids(targets))
        request = MaskRequest(self.spec, self._tokenizer, candidates, top_k)
        outputs = request.graph_outputs(self._backend.outputs)

        def answer(item: TokenBatch) -> tuple[list[int], list[list[list[MaskAnswer]]]]:
            indices, rows = item
            batch = collate(
                rows,
                pad_token_id=self.spec.pad_token_id,
                mask_token_id=self._tokenizer.mask_token_id,
                token_types=self.spec.token_types,
            )
            found: list[list[list[MaskAnswer]]] = [[] for _ in rows]
            for part in split_by_masks(batch, self.spec.vocab_size):
                for masks, more in zip(found, request.answer(part, self._run(part, outputs, indices)), strict=True):
                    masks.extend(more)
            return indices, found

        return self._in_lanes(answer, self._masked_token_ids(texts, options, min(top_k, len(candidates))))

    def _masked_token_ids(self, texts: Texts, options: BatchOptions, top_k: int) -> TokenIds:
        """Return token ids of texts that must all have a mask. Texts that may have none come first, to fail early.

        Raises:
            InputError: a text has no mask, or more answers than `check_size` allows.
        """
        mask, tokenize = self._tokenizer.mask_token, self._tokenize_texts(texts, options.truncation, options.max_length)
        mask_token_id = self._tokenizer.mask_token_id

        def checked(indices: list[int]) -> Rows:
            rows = tokenize(indices)
            for index, row in zip(indices, rows, strict=True):
                check_mask(index, texts[index], row, self._tokenizer)
                assert mask_token_id is not None  # the row has it
                check_size(f"input {index}", [row.count(mask_token_id)], [len(row)], top_k)
            return rows

        sizes = {i: len(text) if mask is not None and mask in text else math.inf for i, text in texts.items()}
        return token_batches(sizes, checked, options.limits)

    def _answers(self, request: Request, batches: TokenIds) -> Batches:
        """Yield the answers to a request for each batch of token ids."""
        outputs = request.graph_outputs(self._backend.outputs)

        def answer(item: TokenBatch) -> tuple[list[int], Sequence[Any]]:
            indices, rows = item
            batch = collate(rows, pad_token_id=self.spec.pad_token_id, token_types=self.spec.token_types)
            return indices, request.answer(batch, self._run(batch, outputs, indices))

        return self._in_lanes(answer, batches)

    def _batch_options(
        self, batch_size: int, max_batch_tokens: int | None, truncation: bool, max_length: int | None
    ) -> BatchOptions:
        options = super()._batch_options(batch_size, max_batch_tokens, truncation, max_length)
        plan = self._plan
        if plan is None:
            return options
        limits = dataclasses.replace(
            options.limits,
            streams=plan.streams,
            least_tokens=plan.least_tokens,
            fewest_batches=plan.fewest_batches,
        )
        return dataclasses.replace(options, limits=limits)

    def _in_lanes(self, work: Callable[[TokenBatch], Result], batches: TokenIds) -> Iterator[Result]:
        """Yield `work(batch)` for each batch of a call, in their order; several are worked on at once."""
        if self.joining is not None and current_call() is None:
            # A bounded queue takes all batches of a method or none of them.
            work = partial(_in_call, Call(), work)
        plan, most = self._plan, self._max_batch_tokens
        if plan is None:
            return in_lanes(work, batches, self._lanes)
        return in_lanes(
            work,
            batches,
            self._lanes,
            fewest=plan.fewest_batches,
            # One thread would take longer for a long text than all threads for the rest of the list.
            alone=lambda batch: len(batch[1][0]) > most,
        )

    @property
    def _plan(self) -> StreamPlan | None:
        """How the batches of a list are computed at once on streams, if the engine has some."""
        return getattr(self._backend, "plan", None)

    @property
    def _lanes(self) -> int:
        """The number of batches of a call that are worked on at once."""
        return int(getattr(self._backend, "lanes", 1))  # isinstance of a protocol would cost 50 µs in every call

    def _run(
        self,
        batch: Batch,
        outputs: Sequence[str],
        indices: Sequence[int],
        counted: NDArray[np.bool_] | None = None,
    ) -> Outputs:
        call = current_call()
        values: Outputs
        with in_use():
            if call is None or self.joining is not None:
                values = self._backend.run(batch, outputs)
            else:
                values = _run_for(call, self._backend, batch, outputs)
        check_finite(values, batch, indices, counted)
        return values

    def _token_ids(self, texts: Texts, options: BatchOptions) -> TokenIds:
        tokenize = self._tokenize_texts(texts, options.truncation, options.max_length)
        return token_batches({number: len(text) for number, text in texts.items()}, tokenize, options.limits)

    def _tokenize_texts(self, texts: Texts, truncation: bool, max_length: int | None) -> Tokenize:
        limit = self._limit(max_length, self._tokenizer.min_length)

        def tokenize(indices: list[int]) -> Rows:
            chosen = [texts[i] for i in indices]
            return self._tokenizer.encode_texts(chosen, indices, max_length=limit, truncation=truncation)

        return tokenize

    def _limit(self, max_length: int | None, low: int) -> int:
        """Check the limit of tokens, special tokens included; a limit below `low` is an error."""
        return checked_max_length(max_length, low=low, limit=self.spec.max_length)

    def _precision(self) -> str:
        computes = self._backend.precision
        try:
            return precision_of(read_manifest(self.path), computes) if is_bundle(self.path) else computes
        except BundleError:  # the folder has changed since it was loaded
            return computes

    def _faster_here(self) -> list[str]:
        try:
            return faster_here(read_manifest(self.path), measure=False) if is_bundle(self.path) else []
        except BundleError:  # the folder has changed since it was loaded
            return []

    def _why_not_sparse(self) -> str:
        if is_bundle(self.path):
            return ""
        from gte_deploy.models.folder import CheckpointFiles
        from gte_deploy.models.sparse_modules import read_sparse_modules

        found = read_sparse_modules(CheckpointFiles(self.path))
        return f" Its modules are not supported: {found.reason}" if found is not None and found.reason else ""

    def _require_masked_lm(self) -> None:
        # A splade checkpoint also offers the logits of masks; its bundle offers only their pooled form.
        if self.spec.task != "sparse" or "logits" not in self._backend.outputs:
            self._require_task("fill-mask")

    def _check_device(self, device: str | None) -> None:
        if device is not None and parse_device(str(device)) != parse_device(self.device):
            raise InputError(
                f"this model is on {self.device!r}, not {str(device)!r}; load it with gte_deploy.load(…, device=…)"
            )


def _in_call(call: Call, work: Callable[[TokenBatch], Result], batch: TokenBatch) -> Result:
    with call:
        return work(batch)


def _run_for(call: Call, backend: Backend, batch: Batch, outputs: Sequence[str]) -> Outputs:
    """Run a batch for a call that may be over already, and add its cost."""
    call.check()
    started = time.perf_counter()
    values = backend.run(batch, outputs)
    rows, tokens = len(batch.input_ids), int(batch.attention_mask.sum())
    call.add(Usage(rows, tokens, batch.input_ids.size, 1, 0.0, time.perf_counter() - started))
    return values
