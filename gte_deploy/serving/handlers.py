"""From a request to an answer, by the methods of a Model. Handlers run in threads, each inside its `Call`.

Shapes: N texts, S tokens of a text, H hidden size, D embedding size.
"""

import base64
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.activations import identity, sigmoid, softmax
from gte_deploy.core.calls import current_call
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.core.tokenizer_rules import failures_as
from gte_deploy.serving import requests as forms
from gte_deploy.serving.failures import RequestError
from gte_deploy.serving.options import ServerOptions
from gte_deploy.serving.registry import ServedModel
from gte_deploy.tasks.chunks import ChunkEmbeddings
from gte_deploy.tasks.fill_mask import MAX_ANSWERS
from gte_deploy.tasks.interface import prompt_text
from gte_deploy.tasks.similarity import similarity_matrix
from gte_deploy.tasks.sparse import SparseEmbedding
from gte_deploy.text.chunking import SentenceChunks, TokenChunks
from gte_deploy.text.inputs import as_texts

# What one answer may hold: numbers of token embeddings, and objects of JSON, of which each takes far more memory.
MAX_NUMBERS = 1 << 25
MAX_OBJECTS = 1 << 20
# Characters of the candidates of fill-mask, which repeat the text.
MAX_CHARACTERS = 1 << 26

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Work:
    """A request in work.

    Args:
        served: the model.
        options: those of the server.
    """

    served: ServedModel
    options: ServerOptions

    @property
    def spec(self) -> ModelSpec:
        """The facts about the model."""
        return self.served.model.spec

    def truncation(self, wanted: bool | None, direction: str | None = None) -> bool:
        """Whether texts are cut.

        Raises:
            InputError: the direction is not that of the model's tokenizer.
        """
        side = self.served.model.tokenizer.truncation_side
        if direction is not None and direction.lower() != side:
            raise InputError(
                f"truncation_direction is {direction!r}, and the tokenizer of {self.served.name} cuts texts on the "
                f"{side}; leave the field out"
            )
        return self.options.auto_truncate if wanted is None else wanted

    def texts(self, inputs: Any, name: str = "inputs") -> str | list[str]:
        """Return the texts of a request, of which some may be token ids.

        Raises:
            RequestError: there are more than the server allows.
            InputError: token ids are not what the tokenizer gives for their text.
        """
        if isinstance(inputs, str):
            return inputs
        if isinstance(inputs[0], int):
            return self._text_of(inputs, name)
        self.check_count(len(inputs), name)
        return [text if isinstance(text, str) else self._text_of(text, f"{name}[{i}]") for i, text in enumerate(inputs)]

    def check_count(self, count: int, name: str = "inputs") -> None:
        """Refuse too many texts.

        Raises:
            RequestError: there are more than the server allows.
        """
        if count > self.options.max_client_batch_size:
            raise RequestError(
                413,
                f"{name} has {count:,} texts, and this server takes {self.options.max_client_batch_size:,} in one "
                "request; send them in several",
                field=name,
            )

    def dimensions(self, wanted: int | None) -> int | None:
        """Check the number of leading dimensions to keep.

        Raises:
            InputError: embeddings have fewer.
        """
        if wanted is not None and wanted > self.spec.embedding_width:
            raise InputError(
                f"dimensions is {wanted:,}; embeddings of {self.served.name} have {self.spec.embedding_width}"
            )
        return wanted

    def count_tokens(self, inputs: str | Sequence[str], prompt_name: str | None, truncation: bool) -> int:
        """Return the number of tokens of the texts, special tokens and the prompt included."""
        texts, prompt = as_list(inputs), prompt_text(self.spec, None, prompt_name)
        rows = self.served.model.tokenizer([prompt + text for text in texts], truncation=truncation)["input_ids"]
        return sum(map(len, rows))

    def _text_of(self, ids: list[int], name: str) -> str:
        """Return the text of token ids, which may have the special tokens around them."""
        tokenizer, limit = self.served.model.tokenizer, self.spec.vocab_size
        if (highest := max(ids)) >= limit:
            raise InputError(
                f"{name} has the token id {highest:,}, and {self.served.name} has {limit:,}. Token ids must come from "
                "the model's own tokenizer; send the text if they do not (LangChain: check_embedding_ctx_length=False)"
            )
        around = tokenizer.encode("")
        for first in range(len(around) + 1):
            end = len(ids) - (len(around) - first)
            if list(ids[:first]) == around[:first] and list(ids[end:]) == around[first:]:
                text = tokenizer.decode(ids[first:end])
                if tokenizer.encode(text) == ids:
                    return text
        text = tokenizer.decode(ids)
        if tokenizer.encode(text, add_special_tokens=False) == ids:
            return text
        raise InputError(
            f"{name}: the tokenizer of {self.served.name} gives other token ids for the text of these; send the text"
        )


@dataclass(frozen=True)
class Answer:
    """What a handler returns.

    Args:
        content: plain data and numpy arrays, to be written as JSON.
        inputs: number of texts or pairs.
        characters: characters of the texts.
    """

    content: Any
    inputs: int
    characters: int


def as_list(inputs: str | Sequence[str]) -> list[str]:
    """The texts of a request as a list."""
    return [inputs] if isinstance(inputs, str) else list(inputs)


def _answer(content: Any, texts: str | Sequence[str]) -> Answer:
    many = as_list(texts)
    return Answer(content, len(many), sum(map(len, many)))


def embed(work: Work, request: forms.EmbedRequest) -> Answer:
    """Embeddings [N, D]."""
    texts = work.texts(request.inputs)
    found = work.served.model.encode(
        as_list(texts),
        request.prompt_name,
        normalize_embeddings=request.normalize,
        truncate_dim=work.dimensions(request.dimensions),
        truncation=work.truncation(request.truncate, request.truncation_direction),
        show_progress_bar=False,
    )
    return _answer(_encoded(found, request.encoding_format), texts)


def embed_all(work: Work, request: forms.EmbedAllRequest) -> Answer:
    """The hidden states [S, H] of each text, special tokens included."""
    texts = work.texts(request.inputs)
    truncation = work.truncation(request.truncate, request.truncation_direction)
    _check_token_embeddings(work, texts, request.prompt_name, truncation)
    found = work.served.model.encode(
        as_list(texts),
        request.prompt_name,
        output_value="token_embeddings",
        truncation=truncation,
        show_progress_bar=False,
    )
    return _answer([np.ascontiguousarray(each) for each in found], texts)


def embed_chunks(work: Work, request: forms.EmbedChunksRequest) -> Answer:
    """The embeddings [D] of the chunks of each text, from one pass over the whole text."""
    texts, chunks = as_list(work.texts(request.inputs)), request.chunks
    # No chunk of a rule is without a token.
    count = sum(map(len, chunks.spans or ())) or work.count_tokens(texts, request.prompt_name, False)
    rule: Any = chunks.spans
    if chunks.tokens is not None:
        rule = TokenChunks(chunks.tokens, chunks.overlap or 0)
    elif chunks.sentences is not None:
        rule = SentenceChunks(chunks.sentences)
    _check_numbers(count * work.spec.embedding_width, f"{count:,} chunks")
    found: list[ChunkEmbeddings] = work.served.model.encode(
        texts,
        chunks=rule,
        prompt_name=request.prompt_name,
        normalize_embeddings=request.normalize,
        truncate_dim=work.dimensions(request.dimensions),
        window_overlap=request.window_overlap,
        truncation=work.truncation(request.truncate, request.truncation_direction),
        show_progress_bar=False,
    )
    content = [
        [
            {"start": start, "end": end, "embedding": np.ascontiguousarray(embedding)}
            for (start, end), embedding in zip(each.offsets.tolist(), each.embeddings, strict=True)
        ]
        for each in found
    ]
    return _answer(content, texts)


def embed_sparse(work: Work, request: forms.EmbedSparseRequest) -> Answer:
    """The entries of each sparse embedding, in the order of the vocabulary."""
    texts = work.texts(request.inputs)
    found = work.served.model.encode_sparse(
        as_list(texts),
        request.prompt_name,
        truncation=work.truncation(request.truncate, request.truncation_direction),
        route=request.route,
        as_dict=False,
        show_progress_bar=False,
    )
    return _answer(_sparse_values(found), texts)


def embed_hybrid(work: Work, request: forms.EmbedHybridRequest) -> Answer:
    """Dense and sparse embeddings from one pass."""
    texts = work.texts(request.inputs)
    found = work.served.model.encode_hybrid(
        as_list(texts),
        request.prompt_name,
        normalize_embeddings=request.normalize,
        truncate_dim=work.dimensions(request.dimensions),
        truncation=work.truncation(request.truncate, request.truncation_direction),
        as_dict=False,
        show_progress_bar=False,
    )
    dense = np.ascontiguousarray(found.dense)
    return _answer({"dense": dense, "sparse": _sparse_values(found.sparse)}, texts)


def embed_multi_vector(work: Work, request: forms.EmbedMultiVectorRequest) -> Answer:
    """An embedding for each token of each text, for late interaction."""
    texts = work.texts(request.inputs)
    truncation = work.truncation(request.truncate, request.truncation_direction)
    _check_token_embeddings(work, texts, request.prompt_name, truncation)
    model, many = work.served.model, as_list(texts)
    options: dict[str, Any] = {"truncation": truncation, "show_progress_bar": False}
    if request.is_query is None or model.spec.multi_vector is None:
        found = model.encode_multi_vector(many, request.prompt_name, is_query=request.is_query, **options)
    else:
        # As these methods do, with the prompt of that name.
        encode = model.encode_query if request.is_query else model.encode_document
        found = encode(many, request.prompt_name, **options)
    return _answer([np.ascontiguousarray(each) for each in found], texts)


def rerank(work: Work, request: forms.RerankRequest) -> Answer:
    """The texts by their score with the query, best first."""
    truncation = work.truncation(request.truncate, request.truncation_direction)
    ranking = _ranked(work, request.query, request.texts, truncation, raw=request.raw_scores, name="texts")
    ranks = [
        {"index": index, **({"text": request.texts[index]} if request.return_text else {}), "score": score}
        for index, score in ranking
    ]
    return _answer(ranks, [request.query, *request.texts])


def cohere_rerank(work: Work, request: forms.CohereRerankRequest) -> Answer:
    """The documents by their score with the query, best first, in the form of Cohere and Jina."""
    truncation = work.truncation(request.truncate)
    ranking = _ranked(work, request.query, request.documents, truncation, raw=False, name="documents")
    results = [
        {
            "index": index,
            "relevance_score": score,
            **({"document": {"text": request.documents[index]}} if request.return_documents else {}),
        }
        for index, score in ranking[: request.top_n]
    ]
    tokens = _computed_tokens()
    content = {
        "id": uuid.uuid4().hex,
        "object": "list",
        "model": work.served.name,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return _answer(content, [request.query, *request.documents])


def predict(work: Work, request: forms.PredictRequest) -> Answer:
    """The labels of each text or pair by their scores, best first."""
    inputs, labels = request.inputs, work.spec.id2label
    single = isinstance(inputs, str) or isinstance(inputs[0], str)
    batch = [[inputs] if isinstance(inputs, str) else inputs] if single else inputs
    work.check_count(len(batch))
    parameters = request.parameters or forms.PredictParameters()
    scores = work.served.model.predict(
        batch,
        activation_fn=_activation(work.spec, parameters.function_to_apply, raw=request.raw_scores),
        truncation=work.truncation(request.truncate, request.truncation_direction),
        show_progress_bar=False,
    ).reshape(len(batch), -1)
    found = [
        [{"score": row[label], "label": labels.get(int(label), f"LABEL_{label}")} for label in order]
        for row, order in zip(scores, np.argsort(-scores, axis=1, kind="stable")[:, : parameters.top_k], strict=True)
    ]
    # The inference API of Hugging Face, whose requests have parameters, answers one text with a list in a list.
    content = found[0] if single and request.parameters is None else found
    return Answer(content, len(batch), sum(len(text) for pair in batch for text in pair))


def similarity(work: Work, request: forms.SimilarityRequest) -> Answer:
    """The cosine of the source sentence with each sentence."""
    given, parameters = request.inputs, request.parameters or forms.SimilarityParameters()
    work.check_count(len(given.sentences), "inputs.sentences")
    texts = [given.source_sentence, *given.sentences]
    found = work.served.model.encode(
        texts,
        parameters.prompt_name,
        truncation=work.truncation(parameters.truncate, parameters.truncation_direction),
        show_progress_bar=False,
    )
    return _answer(similarity_matrix(found[:1], found[1:], "cosine")[0].astype(np.float32), texts)


def tokenize(work: Work, request: forms.TokenizeRequest) -> Answer:
    """The tokens of each text, and their places in it; a prompt counts as its beginning."""
    texts = as_list(work.texts(request.inputs))
    prompt = prompt_text(work.spec, None, request.prompt_name) if request.prompt_name is not None else ""
    content = []
    count = 0
    for whole in as_texts(texts, prompt=prompt)[0]:
        with failures_as(InputError, "a text cannot be tokenised"):
            found = work.served.tokenizer.encode(whole, add_special_tokens=request.add_special_tokens)
        count += len(found.ids)
        if count > MAX_OBJECTS:
            raise _too_large(f"more than {MAX_OBJECTS:,} tokens")
        tokens = zip(found.ids, found.tokens, found.special_tokens_mask, found.offsets, strict=True)
        content.append([_token(whole, *token) for token in tokens])
    return _answer(content, texts)


def decode(work: Work, request: forms.DecodeRequest) -> Answer:
    """The text of each list of token ids."""
    rows = request.ids if isinstance(request.ids[0], list) else [request.ids]
    work.check_count(len(rows), "ids")
    for number, row in enumerate(rows):
        if (highest := max(row)) >= work.spec.vocab_size:
            raise InputError(f"ids[{number}] has the id {highest:,}; the vocabulary has {work.spec.vocab_size:,}")
    tokenizer = work.served.model.tokenizer
    texts = [tokenizer.decode(row, skip_special_tokens=request.skip_special_tokens) for row in rows]
    return Answer(texts, len(rows), sum(map(len, texts)))


def fill_mask(work: Work, request: forms.FillMaskRequest) -> Answer:
    """The candidates for every mask."""
    texts = work.texts(request.inputs)
    tokenizer, parameters = work.served.model.tokenizer, request.parameters
    masks = [text.count(tokenizer.mask_token) if tokenizer.mask_token else 1 for text in as_list(texts)]
    if sum(masks) * parameters.top_k > MAX_ANSWERS:
        raise _too_large(f"more than {MAX_ANSWERS:,} candidates")
    if sum(number * len(text) for number, text in zip(masks, as_list(texts), strict=True)) * parameters.top_k > (
        MAX_CHARACTERS
    ):
        raise _too_large(f"more than {MAX_CHARACTERS:,} characters, because each candidate repeats its text")
    found = work.served.model.fill_mask(
        texts,
        top_k=parameters.top_k,
        targets=parameters.targets,
        truncation=work.truncation(request.truncate, request.truncation_direction),
    )
    return _answer(found, texts)


def classify_tokens(work: Work, request: forms.ClassifyTokensRequest) -> Answer:
    """The labelled tokens, or groups of them, of each text."""
    texts, parameters = work.texts(request.inputs), request.parameters
    found = work.served.model.classify_tokens(
        texts,
        aggregation_strategy=parameters.aggregation_strategy,
        ignore_labels=parameters.ignore_labels,
        stride=parameters.stride,
        truncation=work.truncation(request.truncate, request.truncation_direction),
    )
    return _answer(found, texts)


def openai_embeddings(work: Work, request: forms.OpenAIEmbeddingsRequest) -> Answer:
    """Embeddings of length 1, in the form of OpenAI."""
    texts, truncation = work.texts(request.input, "input"), work.truncation(request.truncate)
    found = work.served.model.encode(
        as_list(texts),
        request.prompt_name,
        normalize_embeddings=True,
        truncate_dim=work.dimensions(request.dimensions),
        truncation=truncation,
        show_progress_bar=False,
    )
    # Equal texts are computed once, and each counts.
    whole = len(set(as_list(texts))) == len(as_list(texts))
    tokens = _computed_tokens() if whole else work.count_tokens(texts, request.prompt_name, truncation)
    data = [
        {"object": "embedding", "embedding": embedding, "index": number}
        for number, embedding in enumerate(_encoded(found, request.encoding_format))
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _answer({"object": "list", "data": data, "model": work.served.name, "usage": usage}, texts)


def _computed_tokens() -> int:
    """The tokens that were computed for the request so far."""
    call = current_call()
    return 0 if call is None else call.usage.tokens


def _encoded(embeddings: NDArray[np.float32], encoding_format: str) -> Any:
    """Embeddings [N, D] as numbers, or as the base64 of the bytes of each."""
    if encoding_format == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in embeddings]
    return np.ascontiguousarray(embeddings)


def _sparse_values(embeddings: Sequence[SparseEmbedding]) -> list[list[dict[str, Any]]]:
    if sum(map(len, embeddings)) > MAX_OBJECTS:
        raise _too_large(f"more than {MAX_OBJECTS:,} weights")
    return [
        [{"index": index, "value": value} for index, value in zip(each.indices.tolist(), each.values, strict=True)]
        for each in embeddings
    ]


def _check_token_embeddings(work: Work, texts: Any, prompt_name: str | None, truncation: bool) -> None:
    """Refuse answers that would not fit into memory, before they are computed."""
    tokens = work.count_tokens(texts, prompt_name, truncation)
    _check_numbers(tokens * max(work.spec.hidden_size, work.spec.embedding_width), f"{tokens:,} tokens")


def _check_numbers(numbers: int, what: str) -> None:
    if numbers > MAX_NUMBERS:
        raise _too_large(f"{numbers:,} numbers for {what}, of at most {MAX_NUMBERS:,}")


def _too_large(what: str) -> RequestError:
    return RequestError(413, f"the answer would have {what}; send fewer or shorter texts in one request")


def _activation(spec: ModelSpec, function: str | None, *, raw: bool) -> Callable[[Logits], Logits]:
    """The function from logits to scores: by default a sigmoid for one label and a softmax for several."""
    if raw and function is not None:
        raise InputError("give raw_scores or parameters.function_to_apply, not both")
    if raw or function == "none":
        return identity
    usual = "sigmoid" if spec.num_labels == 1 else "softmax"
    return sigmoid if (function or usual) == "sigmoid" else softmax


def _ranked(
    work: Work, query: str, texts: Sequence[str], truncation: bool, *, raw: bool, name: str
) -> list[tuple[int, np.float32]]:
    """The index and the score of each text, best first."""
    work.check_count(len(texts), name)
    options: dict[str, Any] = {} if work.spec.multi_vector else {"activation_fn": identity if raw else sigmoid}
    ranking = work.served.model.rank(query, texts, truncation=truncation, show_progress_bar=False, **options)
    return [(entry["corpus_id"], np.float32(entry["score"])) for entry in ranking]


def _token(text: str, token_id: int, token: str, special: int, place: tuple[int, int]) -> dict[str, Any]:
    if special:
        return {"id": token_id, "text": token, "special": True, "start": None, "stop": None}
    start, stop = place
    return {"id": token_id, "text": text[start:stop], "special": False, "start": start, "stop": stop}
