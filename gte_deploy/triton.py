"""A model on a Triton Inference Server, used as one that is loaded here: `encode`, `fill_mask`, `predict`, `rank`.

from gte_deploy.triton import Client

with Client("http://localhost:8000") as model:
    model.encode(["a text", "another"])

The server runs a repository that `gte-export --format triton` wrote. Texts go in and answers come out; what is done
here is the checking of arguments, the splitting of long lists, and the last step into the forms that `Model` returns.

Shapes: N inputs, B rows of a request, S tokens, H hidden size, D embedding size, L labels, M masks, K answers.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy._version import __version__
from gte_deploy.backends.base import Batch
from gte_deploy.backends.checks import check_finite
from gte_deploy.batching import BatchLimits, plan_batches
from gte_deploy.bundle import spec_from_json
from gte_deploy.embedding import EmbeddingRequest, OutputValue
from gte_deploy.errors import BackendError, InputError, NonFiniteError
from gte_deploy.fill_mask import MaskAnswer
from gte_deploy.forking import follow, keep_for_good
from gte_deploy.inputs import MAX_BATCH_SIZE, MAX_BATCH_TOKENS, as_pairs, as_texts, check_integer
from gte_deploy.pooling import EmbeddingPrecision
from gte_deploy.scores import ActivationFn, ScoreRequest, former_arguments, refuse_processes
from gte_deploy.sparse import SparseEmbedding, SparseForm
from gte_deploy.spec import ModelSpec, Pooling, SparseRoute
from gte_deploy.text_interface import TextInterface, one_of, prompt_text, return_type, with_progress
from gte_deploy.token_classification import AggregationStrategy, Entity, TaggingRequest
from gte_deploy.triton_transport import open_transport

DEFAULT_MAX_BATCH_TOKENS = 16_384

_MAX_CONNECTIONS = 1024
# Tokens are guessed before the server counts them: English has 4 to 5 bytes a token, Chinese 3.
_BYTES_PER_TOKEN = 3
_SPECIAL_TOKENS = 4
_DESCRIPTIONS = ("gte_deploy", "gte_deploy_spec")
_INDEX = re.compile(r"\b(inputs? )(\d+(?:, \d+)*)\b")

Texts = Mapping[str, Sequence[str]]
Options = dict[str, NDArray[Any]]
"""Tensors of one row, which hold for every row."""


class Client(TextInterface):
    """A model on a server. Methods may be called from several threads at once; results are in the order of the inputs.

    As a context manager it closes on leaving. Where an answer depends on the vocabulary, the server's log has the
    warnings that `Model` gives here.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        timeout_s: float = 60.0,
        connections: int = 8,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Ask the server what it serves.

        Args:
            url: http://HOST:PORT or grpc://HOST:PORT; https:// and grpcs:// with TLS.
            timeout_s: seconds that one request may take.
            connections: requests at once for one list of texts, and HTTP connections at most, which are kept.
            max_batch_tokens: tokens of a request, padding included, as far as the bytes of its texts tell; a longer
                text goes alone.
            headers: sent with every request, such as those that a gateway wants.

        Raises:
            InputError: an argument out of its range.
            UnavailableError: the server cannot be reached, or not within `timeout_s`.
            BackendError: it serves no repository that gte-export wrote.
            MissingDependencyError: tritonclient is not installed.
        """
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < float("inf"):
            raise InputError(f"timeout_s must be a positive number of seconds, not {timeout_s!r}")
        check_integer("connections", connections, 1, _MAX_CONNECTIONS)
        self._max_batch_tokens = check_integer("max_batch_tokens", max_batch_tokens, 1, MAX_BATCH_TOKENS)
        self._name = url
        self._options: dict[str, Any] = {
            "url": url,
            "timeout_s": timeout_s,
            "connections": connections,
            "max_batch_tokens": max_batch_tokens,
            "headers": dict(headers or {}),
        }
        self._closed = self._is_cut_off = False
        self._connect()
        follow(self)
        try:
            config = self._transport.config("gte_embed")
            self._facts, self.spec = _described(config, url)
        except BaseException:
            self.close()
            raise
        self._max_rows = int(config.get("max_batch_size", 0)) or int(self._facts.get("max_batch_size", 1))

    def close(self) -> None:
        """Close the connections. Idempotent; later calls that compute raise BackendError."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if not self._is_cut_off:
            self._transport.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, or copied, a client is made again from its URL and options, `headers` included: it asks the server.

        Raises:
            BackendError: the client is closed.
        """
        if self._closed:
            raise BackendError("this client is closed, so it cannot be pickled or copied; make another")
        return _client, (self._options,)

    def after_fork(self, *, idle: bool) -> None:
        """See `forking.Follower`: in a child, HTTP connections are new ones; those of gRPC cannot be had."""
        if self._closed:
            return
        if self._options["url"].startswith("grpc"):
            keep_for_good(self._transport)
            self._is_cut_off = True
        else:
            self._connect()

    def _connect(self) -> None:
        """Connections and threads of this process's own: answers on a socket that two share would go to either."""
        options = {name: self._options[name] for name in ("url", "connections", "timeout_s", "headers")}
        self._transport = open_transport(**options)
        self._pool = ThreadPoolExecutor(self._options["connections"], thread_name_prefix="gte-triton")

    def info(self) -> dict[str, Any]:
        """What is served, as plain JSON data."""
        served = {"served_by" if name == "version" else name: value for name, value in self._facts.items()}
        return {"gte_deploy": __version__, "url": self._name, **served, **dataclasses.asdict(self.spec)}

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
        """Candidates for every mask; see `Model.fill_mask`.

        Raises:
            InputError: as there, by the server's word for what only it can tell.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
        """
        self._require_task("fill-mask")
        options = _text_options(truncation, max_length)
        options["TOP_K"] = _one(check_integer("top_k", top_k, 1, self.spec.vocab_size), np.int32)
        if targets is not None:
            options["TARGETS"] = _bytes([as_texts(targets, name="targets")[0]])
        limits = self._limits(batch_size, max_batch_tokens)
        texts, single = as_texts(inputs)
        names = ("MASKS", "TOKEN", "TOKEN_ID", "SCORE", "SEQUENCE")
        nested: list[Any] = [None] * len(texts)
        for indices, values in self._infer_all("gte_fill_mask", {"TEXT": texts}, options, names, limits):
            for row, index in enumerate(indices):
                masks = [_answers(values, row, mask) for mask in range(values["MASKS"][row, 0])]
                nested[index] = masks[0] if len(masks) == 1 else masks
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
        """Embeddings; see `Model.encode`. `device` must be None.

        Raises:
            InputError: as there, by the server's word for what only it can tell.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
            MissingDependencyError: tensors are asked for and torch is not installed.
        """
        self._refuse_sparse()
        self._refuse_device(device)
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
        options = _text_options(truncation, max_length) | self._no_prompt()
        if output_value == "sentence_embedding":
            options |= self._embedding_options(request)
            answers = self._infer_all("gte_embed", {"TEXT": texts}, options, ("EMBEDDING",), limits)
        else:
            types = ["TOKEN_TYPE_IDS"] if self.spec.token_types else []
            names = ("INPUT_IDS", "ATTENTION_MASK", "TOKEN_EMBEDDINGS", *types)
            answers = self._infer_all("gte_token_embed", {"TEXT": texts}, options, names, limits)
        results: list[Any] = [None] * len(texts)
        for indices, values in with_progress(answers, len(texts), show_progress_bar):
            for index, result in zip(indices, self._rows(request, values), strict=True):
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
        """Sparse embeddings; see `Model.encode_sparse`. `device` must be None.

        `as_dict` is True by default where no tensors are asked for: {token: weight} for a text, heaviest first, and a
        list of those for a list. False gives the vectors that `Model` gives.

        Raises:
            InputError: not a sparse model, or as `encode`.
            UnavailableError, NonFiniteError, BackendError, MissingDependencyError: as `encode`.
        """
        self._require_sparse()
        self._refuse_device(device)
        form = SparseForm(
            convert_to_tensor, convert_to_sparse_tensor, not convert_to_tensor if as_dict is None else as_dict
        )
        form.check()
        stored = self.spec.sparse is not None and self.spec.sparse.query_weights is not None
        model = "gte_sparse_query" if self._route(route) == "query" and stored else "gte_sparse"
        limits = self._limits(batch_size, max_batch_tokens)
        texts, single = as_texts(one_of(inputs, sentences), prompt=prompt_text(self.spec, prompt, prompt_name))
        options = _text_options(truncation, max_length) | self._no_prompt()
        if max_active_dims is not None:
            options["MAX_ACTIVE_DIMS"] = _one(self._max_active_dims(max_active_dims), np.int32)
        found: list[Any] = [None] * len(texts)
        called: dict[int, str] = {}
        names = ("TOKENS", "TOKEN", "TOKEN_ID", "WEIGHT")
        answers = self._infer_all(model, {"TEXT": texts}, options, names, limits)
        for indices, values in with_progress(answers, len(texts), show_progress_bar):
            for row, index in enumerate(indices):
                found[index] = self._sparse_embedding(values, row, called)
        return form.assemble(found, called, single=single)

    def _sparse_embedding(self, values: Options, row: int, called: dict[int, str]) -> SparseEmbedding:
        """One row of an answer; `called` learns the names of its entries."""
        count = int(values["TOKENS"][row, 0])
        ids = values["TOKEN_ID"][row, :count]
        called.update((token, name.decode()) for token, name in zip(ids.tolist(), values["TOKEN"][row], strict=False))
        order = np.argsort(ids)
        return SparseEmbedding(ids[order], values["WEIGHT"][row, :count][order], self.spec.vocab_size)

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
        """Scores of a classifier, or logits of a token classifier; see `Model.predict`. `device` must be None.

        Raises:
            InputError: as there, by the server's word for what only it can tell.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
            MissingDependencyError: tensors are asked for and torch is not installed.
        """
        self._require_task("classify", "token-classify")
        self._refuse_device(device)
        refuse_processes(pool, chunk_size)
        request = ScoreRequest(
            activation_fn=former_arguments(activation_fn, activation_fct, num_workers),
            apply_softmax=bool(apply_softmax),
            return_type=return_type(convert_to_numpy, convert_to_tensor),
        )
        request.check()
        limits = self._limits(batch_size, max_batch_tokens)
        given, before = one_of(inputs, sentences), prompt_text(self.spec, prompt, prompt_name)
        options = _text_options(truncation, max_length)
        if self.spec.task == "token-classify":
            texts, single = as_texts(given, prompt=before)
            names = ("TOKENS", "LOGITS")
            tokens: list[Any] = [None] * len(texts)
            answers = self._infer_all("gte_classify_tokens", {"TEXT": texts}, options, names, limits)
            for indices, values in with_progress(answers, len(texts), show_progress_bar):
                for index, count, logits in zip(indices, values["TOKENS"][:, 0], values["LOGITS"], strict=True):
                    tokens[index] = logits[:count]
            return request.of_tokens(tokens, self.spec, single=single)
        pairs, single = as_pairs(given, prompt=before)
        logits = np.empty((len(pairs), self.spec.num_labels), dtype=np.float32)
        answers = self._infer_pairs(pairs, options | self._no_prompt(), limits)
        for indices, values in with_progress(answers, len(pairs), show_progress_bar):
            logits[indices] = values["LOGITS"]
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
        """Labels of the tokens of each text; see `Model.classify_tokens`.

        Windows of long texts (`stride`), words (`is_split_into_words`) and places of the caller's (`offset_mapping`)
        are for a model that is loaded here: the server takes whole texts, and must not be asked for them.

        Raises:
            InputError: as there, by the server's word for what only it can tell.
            UnavailableError: the server is overloaded, gone or slow; the same call may succeed later.
            NonFiniteError, BackendError: the model or the server failed.
        """
        self._require_task("token-classify")
        for name, asked in (
            ("stride", stride is not None),
            ("is_split_into_words", is_split_into_words),
            ("offset_mapping", offset_mapping is not None),
        ):
            if asked:
                raise InputError(f"{name} is not served: {self._name} takes whole texts. Load the model for it.")
        request = TaggingRequest.of(aggregation_strategy, ignore_labels, None)
        options = _text_options(truncation, max_length)
        options["AGGREGATION_STRATEGY"] = _bytes([[request.aggregation_strategy]])
        options["IGNORE_LABELS"] = _bytes([request.ignore_labels or [""]])
        limits = self._limits(batch_size, max_batch_tokens)
        texts, single = as_texts(inputs)
        names = ("ENTITIES", "LABEL", "SCORE", "INDEX", "WORD", "START", "END")
        results: list[Any] = [None] * len(texts)
        for indices, values in self._infer_all("gte_classify_tokens", {"TEXT": texts}, options, names, limits):
            for row, index in enumerate(indices):
                results[index] = _entities(values, row, grouped=request.aggregation_strategy != "none")
        return results[0] if single else results

    def _infer_pairs(
        self, pairs: Sequence[tuple[str, ...]], options: Options, limits: BatchLimits
    ) -> Iterator[tuple[list[int], Options]]:
        # A request holds single texts or pairs, not both.
        for size in (1, 2):
            numbers = [i for i, pair in enumerate(pairs) if len(pair) == size]
            if numbers:
                columns = zip(*(pairs[i] for i in numbers), strict=True)
                texts: dict[str, Sequence[str]] = dict(zip(("TEXT", "TEXT_PAIR"), columns, strict=False))
                yield from self._infer_all("gte_rerank", texts, options, ("SCORE", "LOGITS"), limits, numbers)

    def _infer_all(
        self,
        model: str,
        texts: Texts,
        options: Options,
        outputs: Sequence[str],
        limits: BatchLimits,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], Options]]:
        """The inputs' numbers and the outputs [B, …] of each request, several requests at a time.

        `numbers` are the caller's of the inputs, for results and errors; by default they count from 0.
        """
        if self._closed:
            raise BackendError("this client is closed")
        if self._is_cut_off:
            raise BackendError(
                "this client was made before the process forked, and gRPC does not survive a fork. Make the client "
                "after the fork, in each process that uses it, or use an http:// URL."
            )
        rows = list(zip(*texts.values(), strict=True))
        lengths = [min(self.spec.max_length, _guessed_tokens(row)) for row in rows]
        groups = list(plan_batches(lengths, limits))
        calls = [([i if numbers is None else numbers[i] for i in group], [rows[i] for i in group]) for group in groups]

        def infer(indices: list[int], chosen: list[tuple[str, ...]]) -> Options:
            columns = zip(*chosen, strict=True)
            inputs = {name: _bytes([[text] for text in column]) for name, column in zip(texts, columns, strict=True)}
            inputs |= {name: np.repeat(row, len(indices), axis=0) for name, row in options.items()}
            return self._infer(model, inputs, outputs, indices)

        if len(calls) == 1:
            yield calls[0][0], infer(*calls[0])
            return
        waiting: list[tuple[list[int], Future[Options]]] = []
        try:
            waiting = [(indices, self._pool.submit(infer, indices, chosen)) for indices, chosen in calls]
            for indices, future in waiting:
                yield indices, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _infer(self, model: str, inputs: Options, outputs: Sequence[str], indices: list[int]) -> Options:
        try:
            values = self._transport.infer(model, inputs, outputs)
        except (InputError, NonFiniteError) as error:
            raise type(error)(_INDEX.sub(lambda found: _renumbered(found, indices), str(error))) from error
        mask = values.get("ATTENTION_MASK", np.ones((len(indices), 1), dtype=np.int64))
        floats = {name: array for name, array in values.items() if array.dtype == np.float32}
        check_finite(floats, Batch(values.get("INPUT_IDS", mask), mask), indices)
        return values

    def _rows(self, request: EmbeddingRequest, values: Options) -> list[Any]:
        if "EMBEDDING" in values:
            return list(values["EMBEDDING"])
        batch = Batch(values["INPUT_IDS"], values["ATTENTION_MASK"], None, values.get("TOKEN_TYPE_IDS"))
        return request.rows(self.spec, batch, {"last_hidden_state": values["TOKEN_EMBEDDINGS"]})

    def _refuse_device(self, device: str | None) -> None:
        if device is not None:
            raise InputError(f"the server at {self._name} decides where it computes; leave device out")

    def _embedding_options(self, request: EmbeddingRequest) -> Options:
        options: Options = {}
        if request.pooling != self.spec.pooling:
            options["POOLING"] = _bytes([[request.pooling]])
        if request.normalize:
            options["NORMALIZE"] = _one(True, np.bool_)
        if request.truncate_dim is not None:
            options["TRUNCATE_DIM"] = _one(request.truncate_dim, np.int32)
        return options

    def _no_prompt(self) -> Options:
        # The prompt already stands before each text: the server must not add the default one.
        return {} if self.spec.default_prompt_name is None else {"PROMPT": _bytes([[""]])}

    def _limits(self, batch_size: int, max_batch_tokens: int | None) -> BatchLimits:
        tokens = self._max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        return BatchLimits(
            max_rows=min(check_integer("batch_size", batch_size, 1, MAX_BATCH_SIZE), self._max_rows),
            max_tokens=check_integer("max_batch_tokens", tokens, 1, MAX_BATCH_TOKENS),
            max_square=self.spec.max_length**2,
        )


def _text_options(truncation: bool, max_length: int | None) -> Options:
    options: Options = {}
    if truncation:
        options["TRUNCATION"] = _one(True, np.bool_)
    if max_length is not None:
        options["MAX_LENGTH"] = _one(check_integer("max_length", max_length, 1, (1 << 31) - 1), np.int32)
    return options


def _one(value: Any, dtype: Any) -> NDArray[Any]:
    return np.array([[value]], dtype=dtype)


def _bytes(rows: Sequence[Sequence[str]]) -> NDArray[Any]:
    return np.array([[text.encode() for text in row] for row in rows], dtype=object)


def _guessed_tokens(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) // _BYTES_PER_TOKEN for text in texts) + _SPECIAL_TOKENS


def _client(options: Mapping[str, Any]) -> Client:
    return Client(**options)


def _answers(values: Options, row: int, mask: int) -> list[MaskAnswer]:
    columns = zip(
        values["SCORE"][row, mask].tolist(),
        values["TOKEN_ID"][row, mask].tolist(),
        values["TOKEN"][row, mask],
        values["SEQUENCE"][row, mask],
        strict=True,
    )
    return [
        {"score": score, "token": token, "token_str": text.decode(), "sequence": sequence.decode()}
        for score, token, text, sequence in columns
    ]


def _entities(values: Options, row: int, *, grouped: bool) -> list[Entity]:
    count = int(values["ENTITIES"][row, 0])
    columns = {
        "entity_group" if grouped else "entity": [label.decode() for label in values["LABEL"][row, :count]],
        "score": values["SCORE"][row, :count].tolist(),
        **({} if grouped else {"index": values["INDEX"][row, :count].tolist()}),
        "word": [word.decode() for word in values["WORD"][row, :count]],
        "start": values["START"][row, :count].tolist(),
        "end": values["END"][row, :count].tolist(),
    }
    return [dict(zip(columns, entity, strict=True)) for entity in zip(*columns.values(), strict=True)]


def _renumbered(found: re.Match[str], indices: Sequence[int]) -> str:
    rows = [int(row) for row in found[2].split(", ")]
    return found[1] + ", ".join(str(indices[row]) if row < len(indices) else str(row) for row in rows)


def _described(config: Mapping[str, Any], url: str) -> tuple[dict[str, Any], ModelSpec]:
    """What gte-export wrote about the model into the configuration of every ensemble."""
    try:
        facts, spec = (json.loads(config["parameters"][name]["string_value"]) for name in _DESCRIPTIONS)
        return dict(facts), spec_from_json(spec)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackendError(
            f"gte_embed at {url} is not what this version of gte-export writes ({error!r}). Export the repository "
            "again with gte-export --format triton."
        ) from error
