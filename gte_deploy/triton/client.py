"""A model on a Triton Inference Server, used as one that is loaded here: `encode`, `fill_mask`, `predict`, `rank`.

from gte_deploy.triton import Client

with Client("http://localhost:8000") as model:
    model.encode(["a text", "another"])

The server runs a repository that `gte-export --format triton` wrote. It takes texts and gives answers. The client
checks arguments, splits long lists, and converts the answers to the forms that `Model` returns. A client that has the
model's tokenizer sends token ids in place of texts.

Shapes: N inputs, B rows of a request, S tokens, H hidden size, D embedding size, L labels, M masks, K answers.
"""

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy._version import __version__
from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_finite
from gte_deploy.core.errors import BackendError, InputError, NonFiniteError, UnavailableError
from gte_deploy.core.forking import follow, keep_for_good
from gte_deploy.tasks import TASKS, classify, embed, fill_mask, hybrid, multi_vector, sparse, token_classify
from gte_deploy.tasks.base import Ensemble, from_counted
from gte_deploy.tasks.chunks import ChunkedTexts, ChunkRequest, ChunkSums, Document, Window
from gte_deploy.tasks.classify import ScoreRequest
from gte_deploy.tasks.embed import EmbeddingRequest
from gte_deploy.tasks.hybrid import HybridRequest
from gte_deploy.tasks.interface import Batches, BatchOptions, Pairs, TextInterface, Texts
from gte_deploy.tasks.multi_vector import MultiVectorRequest
from gte_deploy.tasks.pooling import l2_normalize
from gte_deploy.tasks.token_classify import TaggedTexts, TaggingRequest
from gte_deploy.text.batching import BatchLimits, plan_batches, token_batches
from gte_deploy.text.inputs import MAX_BATCH_TOKENS, MAX_TEXT_BYTES, check_integer, distinct
from gte_deploy.text.model_tokenizer import ModelTokenizer
from gte_deploy.text.tokenization import checked_max_length
from gte_deploy.triton.address import checked_headers, parse_address
from gte_deploy.triton.answers import checked_answer, forms, read_description
from gte_deploy.triton.tokenizing import ClientTokenizer, TextKind, open_tokenizer
from gte_deploy.triton.transport import MAX_ANSWER_BYTES, open_transport

DEFAULT_MAX_BATCH_TOKENS = 16_384

_MAX_CONNECTIONS = 1024
# Tokens are guessed before the server counts them: English has 4 to 5 bytes a token, Chinese 3.
_BYTES_PER_TOKEN = 3
_SPECIAL_TOKENS = 4
# Masks of a text; with more, and many answers for each, a request may be above the server's limits.
_EXPECTED_MASKS = 16
_INDEX = re.compile(r"\b(inputs? )(\d+(?:, \d+)*)\b")

Values = dict[str, NDArray[Any]]
"""Tensors by name."""


class Client(TextInterface):
    """A model on a server. Methods may be called from several threads at once; results are in the order of the inputs.

    The methods are those of `Model`; equal inputs of one call are sent once. For an error that only the server can
    find, the message is the server's. As a context manager the client closes at the end. Warnings about words that are
    not in the vocabulary, which `Model` gives here, are in the server's log.
    """

    _gives_dictionaries = True
    _takes_whole_texts_only = True

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        timeout_s: float = 60.0,
        connections: int = 8,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        headers: Mapping[str, str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        """Connect to a server and read the description of its models.

        Args:
            url: http://HOST:PORT or grpc://HOST:PORT; https:// and grpcs:// with TLS. A user and a password in it
                (https://USER:PASSWORD@HOST) are sent as Authorization and shown nowhere.
            timeout_s: seconds that one request may take, from the connection to the last byte of the answer.
            connections: the most requests at once for one list of texts, and the most HTTP connections, which stay
                open.
            max_batch_tokens: the most tokens of a request, padding included, as estimated from the bytes of its texts;
                a longer text is sent by itself.
            headers: HTTP headers or gRPC metadata for every request, such as those that a gateway needs.
            tokenizer: the folder of the bundle or checkpoint that the server's repository was exported from, or its
                tokenizer files. With it, texts are tokenised here and token ids are sent, which saves the server most
                of its work on a CPU. Token embeddings of models for other tasks than multi-vector, labels of tokens,
                stored weights of queries, and embeddings with another pooling still send texts.
            max_answer_bytes: the largest answer to one request; a larger one is an error before it is in memory.

        Raises:
            InputError: an argument is out of range, or the server has another tokenizer.
            CheckpointError: the folder has no tokenizer.
            UnreachableError: there is no connection to the server: its port is closed, or its host is unknown.
            NoAnswerError: the server does not answer within `timeout_s`.
            UnavailableError: the server is overloaded; the base class of the two errors above.
            BackendError: the server has no repository that gte-export wrote. Later calls raise it for an answer that
                has not the form, the size or the number of rows that was asked for.
            MissingDependencyError: tritonclient is not installed.
        """
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < float("inf"):
            raise InputError(f"timeout_s must be a positive number of seconds, not {timeout_s!r}")
        check_integer("connections", connections, 1, _MAX_CONNECTIONS)
        check_integer("max_answer_bytes", max_answer_bytes, 1, (1 << 63) - 1)
        address = parse_address(url)
        checked_headers(headers, address)
        self._max_batch_tokens = check_integer("max_batch_tokens", max_batch_tokens, 1, MAX_BATCH_TOKENS)
        self._name, self._is_grpc = str(address), address.is_grpc
        self._options: dict[str, Any] = {
            "url": url,
            "timeout_s": timeout_s,
            "connections": connections,
            "max_batch_tokens": max_batch_tokens,
            "headers": dict(headers or {}),
            "tokenizer": None if tokenizer is None else os.fspath(tokenizer),
            "max_answer_bytes": max_answer_bytes,
        }
        self._closed = self._is_cut_off = False
        self._connect()
        follow(self)
        try:
            self._served = read_description(self._config(), self._name)
            self.spec = self._served.spec
            self._tokenizer = None if tokenizer is None else open_tokenizer(Path(tokenizer), self._served, self._name)
        except BaseException:
            self.close()
            raise
        self._max_rows = self._served.max_rows

    def close(self) -> None:
        """Close the connections. Idempotent; later calls that compute raise BackendError."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if not self._is_cut_off:
            self._transport.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle or copy a client as its URL and options, passwords and `headers` included.

        The new client asks the server again.

        Raises:
            BackendError: the client is closed.
        """
        if self._closed:
            raise BackendError("this client is closed, so it cannot be pickled or copied; create another one")
        return _client, (self._options,), self._settings()

    def after_fork(self, *, idle: bool) -> None:
        """See `forking.Follower`: a child opens new HTTP connections; gRPC does not work in a child."""
        if self._closed:
            return
        if self._is_grpc:
            keep_for_good(self._transport)
            self._is_cut_off = True
        else:
            self._connect()

    def _connect(self) -> None:
        """Open connections and threads of this process: on a shared socket, answers could reach the other process."""
        names = ("url", "connections", "timeout_s", "headers", "max_answer_bytes")
        options = {name: self._options[name] for name in names}
        self._transport = open_transport(**options)
        self._pool = ThreadPoolExecutor(self._options["connections"], thread_name_prefix="gte-triton")

    def _config(self) -> dict[str, Any]:
        """The configuration of an ensemble, of which each describes the model."""
        try:
            return self._transport.config(embed.SERVED.name)
        except UnavailableError:
            raise
        except BackendError:
            # The repository of an engine that gives only logits, or of a multi-vector model, has no such ensemble.
            for ensemble in (classify.SERVED, fill_mask.SERVED, multi_vector.QUERY_VECTORS_SERVED):
                with contextlib.suppress(BackendError):
                    return self._transport.config(ensemble.name)
            raise

    @property
    def tokenizer(self) -> ModelTokenizer | None:
        """The tokenizer, if the client was created with one; otherwise None."""
        return None if self._tokenizer is None else ModelTokenizer(self._tokenizer.tokenizer, self.spec)

    @property
    def device(self) -> str:
        """The device of results, as tensors: "cpu". The server decides where it computes."""
        return "cpu"

    def info(self) -> dict[str, Any]:
        """Facts about the served model, as plain JSON data."""
        served = {"served_by" if name == "version" else name: value for name, value in self._served.told.items()}
        return {"gte_deploy": __version__, "url": self._name, **served, **dataclasses.asdict(self.spec)}

    def _embed_batches(self, request: EmbeddingRequest, texts: Texts, options: BatchOptions) -> Batches:
        before = self._no_prompt()
        self._require_states(request)
        if request.output_value == "sentence_embedding":
            yield from self._sentence_batches(request, texts, options)
            return
        types = ("TOKEN_TYPE_IDS",) if self.spec.token_types else ()
        call = _Call(embed.TOKENS_SERVED, options, before=before, more_outputs=types)
        for numbers, values in self._infer_all(call, texts):
            batch = Batch(values["INPUT_IDS"], values["ATTENTION_MASK"], None, values.get("TOKEN_TYPE_IDS"))
            yield numbers, request.answer(batch, {"last_hidden_state": values["TOKEN_EMBEDDINGS"]})

    def _require_states(self, request: EmbeddingRequest) -> None:
        """Refuse a request that needs hidden states if the server's engine gives only the answer of its task."""
        is_answer = request.output_value == "sentence_embedding" and request.pooling == self.spec.pooling
        if not (self._served.hidden_states or (is_answer and TASKS[self.spec.task].pools)):
            raise BackendError(
                f"the engine of the server at {self._name} gives only the answer of task {self.spec.task}, and this "
                "call needs hidden states. Export it with --outputs all"
            )

    def _sentence_batches(self, request: EmbeddingRequest, texts: Texts, options: BatchOptions) -> Batches:
        """Embeddings from the encoder itself if it gives them; a Python model on the server computes the others."""
        kept = self.spec.truncate_dim or self.spec.embedding_width
        size = request.truncate_dim or self.spec.embedding_width
        own = request.pooling == self.spec.pooling and self._served.tokenizer is not None
        # The server's cache belongs to gte_embed.
        fast = self._tokenizer is not None or not self._served.response_cache
        if own and fast and (size == kept or (size < kept and self._tokenizer is not None)):
            # A shorter vector is cut and scaled here.
            name = "NORMALIZED_EMBEDDING" if request.normalize and size == kept else "EMBEDDING"
            ensemble = Ensemble("gte_embed_fast", (name,))
            call = _Call(ensemble, options, before=self._no_prompt(), ids="gte_embed_ids")
            for numbers, values in self._infer_all(call, texts):
                vectors = values[name][:, :size]
                yield numbers, list(l2_normalize(vectors) if request.normalize and size < kept else vectors)
            return
        call = _Call(embed.SERVED, options, self._embedding_inputs(request), before=self._no_prompt())
        for numbers, values in self._infer_all(call, texts):
            yield numbers, list(values["EMBEDDING"])

    def _chunk_batches(self, request: ChunkRequest, given: ChunkedTexts, options: BatchOptions) -> Batches:
        self._require_states(dataclasses.replace(request.embedding, output_value="token_embeddings"))
        if self.spec.embedding_size is not None:
            raise InputError(
                f"the server at {self._name} applies the model's Dense modules to whole texts only; load the model for "
                "chunks"
            )
        if self._tokenizer is None:
            raise InputError(f"chunks need the tokenizer: give the folder of {self._name} to the client")
        tokenizer = self._tokenizer.tokenizer
        limit = checked_max_length(options.max_length, low=tokenizer.min_length, limit=self.spec.max_length)
        for group in given.groups(list(distinct(given.keys))):
            documents = request.documents(given, group, tokenizer, limit=limit, truncation=options.truncation)
            yield from request.answers(documents, self._window_sums(documents, given.texts, options))

    def _window_sums(
        self, documents: Sequence[Document], texts: Sequence[str], options: BatchOptions
    ) -> Iterator[tuple[Window, ChunkSums]]:
        """Yield the only window of each document with its `sums`, in any order."""
        windows: dict[int, Window] = {}
        for document in documents:
            if len(document.windows) > 1:
                raise InputError(
                    f"input {document.index} is above the limit of tokens, and {self._name} takes whole texts, no "
                    "windows. Load the model for it, split the text, or pass truncation=True to keep the first tokens"
                )
            windows.update((document.index, window) for window in document.windows)
        if not windows:
            return
        call = _Call(embed.TOKENS_SERVED, options, before=self._no_prompt())
        for numbers, values in self._infer_all(call, {number: texts[number] for number in windows}):
            for number, ids, states in zip(numbers, values["INPUT_IDS"], values["TOKEN_EMBEDDINGS"], strict=True):
                row = windows[number].row
                if ids[: len(row)].tolist() != row:
                    raise BackendError(f"the server at {self._name} has cut or tokenised input {number} in another way")
                yield windows[number], windows[number].sums(states)

    def _sparse_batches(
        self, request: sparse.SparseRequest, texts: Texts, options: BatchOptions
    ) -> tuple[Batches, sparse.Names]:
        stored = self.spec.sparse is not None and self.spec.sparse.query_weights is not None
        inputs = self._sparse_inputs(request)
        if request.route == "query" and stored:
            call = _Call(sparse.QUERIES_SERVED, options, inputs, before=self._no_prompt())
        else:
            call = _Call(sparse.SERVED, options, inputs, before=self._no_prompt(), ids="gte_sparse_ids")
        names: dict[int, str] = {}

        def answers() -> Batches:
            for numbers, values in self._infer_all(call, texts):
                yield numbers, sparse.from_tensors(values, self.spec.vocab_size, names)

        return answers(), names

    def _hybrid_batches(
        self, request: HybridRequest, texts: Texts, options: BatchOptions
    ) -> tuple[Batches, sparse.Names]:
        inputs = {**self._embedding_inputs(request.dense), **self._sparse_inputs(request.sparse)}
        call = _Call(hybrid.SERVED, options, inputs, before=self._no_prompt(), ids="gte_hybrid_ids")
        names: dict[int, str] = {}

        def answers() -> Batches:
            for numbers, values in self._infer_all(call, texts):
                vectors = sparse.from_tensors(values, self.spec.vocab_size, names)
                yield numbers, list(zip(values["EMBEDDING"], vectors, strict=True))

        return answers(), names

    def _multi_vector_batches(self, request: MultiVectorRequest, texts: Texts, options: BatchOptions) -> Batches:
        served = multi_vector.QUERY_VECTORS_SERVED if request.is_query else multi_vector.DOCUMENT_VECTORS_SERVED
        inputs = {} if request.normalize == self.spec.normalize else {"NORMALIZE": _one(request.normalize, np.bool_)}
        before = {"PROMPT": _bytes([[""]])} if self.spec.prompts else {}
        if request.skip_words is not None:
            before["SKIP_WORDS"] = _bytes([request.skip_words or [""]])
        if self._tokenizer is not None:
            request = request.of_tokenizer(self._tokenizer.tokenizer)
        elif options.max_length is None:
            options = dataclasses.replace(options, max_length=request.cut_limit)
        call = _Call(served, options, inputs, before, ids="gte_multi_vector_ids", kind=request)
        for numbers, values in self._infer_all(call, texts):
            yield numbers, from_counted(values, multi_vector.SERVED_VECTORS)

    def _sparse_inputs(self, request: sparse.SparseRequest) -> Values:
        kept = request.max_active_dims
        return {} if kept is None else {"MAX_ACTIVE_DIMS": _one(kept, np.int32)}

    def _pair_batches(self, request: ScoreRequest, pairs: Pairs, options: BatchOptions) -> Batches:
        call = _Call(classify.SERVED, options, before=self._no_prompt(), ids="gte_rerank_ids", kind="pairs")
        # A request holds single texts or pairs, not both.
        for size in (1, 2):
            chosen = {number: pair for number, pair in pairs.items() if len(pair) == size}
            if chosen:
                for numbers, values in self._infer_all(call, chosen):
                    yield numbers, list(values["LOGITS"])

    def _token_batches(self, texts: Texts, options: BatchOptions) -> Batches:
        call = _Call(token_classify.LOGITS_SERVED, options)
        for numbers, values in self._infer_all(call, texts):
            yield numbers, from_counted(values, "LOGITS")

    def _entity_batches(self, request: TaggingRequest, given: TaggedTexts, options: BatchOptions) -> Batches:
        inputs = {
            "AGGREGATION_STRATEGY": _bytes([[request.aggregation_strategy]]),
            "IGNORE_LABELS": _bytes([request.ignore_labels or [""]]),
        }
        call = _Call(token_classify.ENTITIES_SERVED, options, inputs)
        grouped = request.aggregation_strategy != "none"
        for numbers, values in self._infer_all(call, distinct(given.texts)):
            yield numbers, token_classify.entities_from_tensors(values, grouped=grouped)

    @property
    def _most_answers(self) -> int:
        return self.spec.vocab_size

    def _mask_batches(self, top_k: int, targets: list[str] | None, texts: Texts, options: BatchOptions) -> Batches:
        inputs = {"TOP_K": _one(top_k, np.int32)}
        if targets is not None:
            inputs["TARGETS"] = _bytes([targets])
        # The server bounds the answers of a request, and who sends texts does not know how many masks they have.
        most = top_k * _EXPECTED_MASKS
        limits = dataclasses.replace(
            options.limits,
            max_rows=min(options.limits.max_rows, max(1, fill_mask.MAX_ANSWERS // most)),
            max_tokens=min(options.limits.max_tokens, max(1, fill_mask.MAX_ANSWER_TOKENS // most)),
        )
        options = dataclasses.replace(options, limits=limits)
        call = _Call(fill_mask.SERVED, options, inputs, ids="gte_fill_mask_ids", kind="masked")
        for numbers, values in self._infer_all(call, texts):
            yield numbers, fill_mask.from_tensors(values)

    def _infer_all(self, call: "_Call", inputs: Texts | Pairs) -> Iterator[tuple[list[int], Values]]:
        """The numbers of the inputs and the outputs [B, …] of each request; several requests run at a time.

        The inputs are texts, or tuples of equally many texts.
        """
        if self._closed:
            raise BackendError("this client is closed")
        if self._is_cut_off:
            raise BackendError(
                "this client was created before the process forked, and gRPC does not survive a fork. Create the "
                "client after the fork, in each process that uses it, or use an http:// URL."
            )
        limits = call.options.limits
        if call.ensemble == embed.TOKENS_SERVED and (most := self._served.max_state_rows):
            limits = dataclasses.replace(limits, max_rows=min(limits.max_rows, most))
        rows = {number: (item,) if isinstance(item, str) else item for number, item in inputs.items()}
        requests = self._requests(call, rows, limits)
        first, second = next(requests), next(requests, None)
        if second is None:
            yield first.indices, self._infer(first, call)
            return
        waiting: list[tuple[list[int], Future[Values]]] = []
        try:
            for request in itertools.chain((first, second), requests):
                waiting.append((request.indices, self._pool.submit(self._infer, request, call)))
            for indices, future in waiting:
                yield indices, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _requests(self, call: "_Call", rows: Pairs, limits: BatchLimits) -> Iterator["_Request"]:
        """The requests for all texts: token ids if this client has the tokenizer and the server takes ids, or texts."""
        if self._tokenizer is not None and call.ids is not None:
            yield from self._id_requests(self._tokenizer, call.ids, call, rows, limits)
            return
        numbers = list(rows)
        lengths = [min(self.spec.max_length, _guessed_tokens(row)) for row in rows.values()]
        groups = ([numbers[i] for i in group] for group in plan_batches(lengths, limits))
        for indices in itertools.chain.from_iterable(_within_characters(group, rows) for group in groups):
            columns = zip(*(rows[number] for number in indices), strict=True)
            named = zip(("TEXT", "TEXT_PAIR"), columns, strict=False)
            inputs = {name: _bytes([[text] for text in column]) for name, column in named}
            inputs |= _repeated({**_text_inputs(call.options), **call.before, **call.inputs}, len(indices))
            yield _Request(call.ensemble.name, inputs, indices)

    def _id_requests(
        self,
        tokenizer: ClientTokenizer,
        name: str,
        call: "_Call",
        rows: Pairs,
        limits: BatchLimits,
    ) -> Iterator["_Request"]:
        def tokenize(chosen: list[int]) -> list[list[int]]:
            return tokenizer.rows(
                list(zip(*(rows[number] for number in chosen), strict=True)),
                chosen,
                max_length=call.options.max_length,
                truncation=call.options.truncation,
                kind=call.kind,
            )

        sizes = {number: sum(map(len, row)) for number, row in rows.items()}
        for indices, ids in token_batches(sizes, tokenize, limits):
            inputs = tokenizer.tensors(ids, call.kind) | _repeated(call.inputs, len(ids))
            yield _Request(name, inputs, indices)

    def _infer(self, request: "_Request", call: "_Call") -> Values:
        indices = request.indices
        try:
            values = self._transport.infer(request.model, request.inputs, call.outputs)
        except (InputError, NonFiniteError) as error:
            raise type(error)(_INDEX.sub(lambda found: _renumbered(found, indices), str(error))) from error
        asked = request.inputs.get("TRUNCATE_DIM")
        width = int(asked[0, 0]) if asked is not None else self.spec.truncate_dim or self.spec.embedding_width
        values = checked_answer(
            {name: values[name] for name in call.outputs},
            forms(call.ensemble, self.spec, width),
            len(indices),
            where=f"{request.model} at {self._name}",
        )
        mask = values.get("ATTENTION_MASK", np.ones((len(indices), 1), dtype=np.int64))
        floats = {name: array for name, array in values.items() if array.dtype.kind == "f"}
        check_finite(floats, Batch(values.get("INPUT_IDS", mask), mask), indices)
        return values

    def _check_device(self, device: str | None) -> None:
        if device is not None:
            raise InputError(f"the server at {self._name} decides where it computes; leave device out")

    def _embedding_inputs(self, request: EmbeddingRequest) -> Values:
        options: Values = {}
        if request.pooling != self.spec.pooling:
            options["POOLING"] = _bytes([[request.pooling]])
        if request.normalize:
            options["NORMALIZE"] = _one(True, np.bool_)
        if request.truncate_dim is not None:
            options["TRUNCATE_DIM"] = _one(request.truncate_dim, np.int32)
        return options

    def _no_prompt(self) -> Values:
        # Each text begins with its prompt already, so the server must not add the default prompt.
        return {} if self.spec.default_prompt_name is None else {"PROMPT": _bytes([[""]])}


@dataclass(frozen=True)
class _Call:
    """The parts that all requests of one call of a method have in common.

    Args:
        ensemble: the ensemble that answers.
        options: options for cutting and batching the texts.
        inputs: option tensors of the answer with one row, which is repeated for every text.
        before: option tensors of the server's tokenizer, as `inputs`.
        more_outputs: output tensors besides those that the ensemble always has.
        ids: the ensemble that answers the same for token ids; None if there is none.
        kind: the kind of the texts.
    """

    ensemble: Ensemble
    options: BatchOptions
    inputs: "Values" = field(default_factory=dict)
    before: "Values" = field(default_factory=dict)
    more_outputs: tuple[str, ...] = ()
    ids: str | None = None
    kind: TextKind = "plain"

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*self.ensemble.outputs, *self.more_outputs)


@dataclass(frozen=True)
class _Request:
    """One request: its model, its input tensors, and the numbers of its rows in the caller's list."""

    model: str
    inputs: "Values"
    indices: list[int]


def _within_characters(numbers: Sequence[int], rows: Pairs) -> Iterator[list[int]]:
    """Split the numbers of rows, so that each part has no more characters than the server takes in a request."""
    part: list[int] = []
    count = 0
    for number in numbers:
        size = sum(map(len, rows[number]))
        if part and count + size > MAX_TEXT_BYTES:
            yield part
            part, count = [], 0
        part.append(number)
        count += size
    yield part


def _repeated(options: Values, rows: int) -> Values:
    """Option tensors for so many rows, from those with one row."""
    return {name: np.repeat(row, rows, axis=0) for name, row in options.items()}


def _text_inputs(options: BatchOptions) -> Values:
    inputs: Values = {}
    if options.truncation:
        inputs["TRUNCATION"] = _one(True, np.bool_)
    if options.max_length is not None:
        inputs["MAX_LENGTH"] = _one(check_integer("max_length", options.max_length, 1, (1 << 31) - 1), np.int32)
    return inputs


def _one(value: Any, dtype: Any) -> NDArray[Any]:
    return np.array([[value]], dtype=dtype)


def _bytes(rows: Sequence[Sequence[str]]) -> NDArray[Any]:
    return np.array([[text.encode() for text in row] for row in rows], dtype=object)


def _guessed_tokens(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) // _BYTES_PER_TOKEN for text in texts) + _SPECIAL_TOKENS


def _client(options: Mapping[str, Any]) -> Client:
    return Client(**options)


def _renumbered(found: re.Match[str], indices: Sequence[int]) -> str:
    rows = [int(row) for row in found[2].split(", ")]
    return found[1] + ", ".join(str(indices[row]) if row < len(indices) else str(row) for row in rows)
