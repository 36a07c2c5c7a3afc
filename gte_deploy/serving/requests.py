"""The form of each request. A field that a request does not have is refused by its name; no value is converted.

The names are those of text-embeddings-inference, of the inference API of Hugging Face (`parameters`), and of OpenAI,
Cohere and Jina.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from gte_deploy.core.spec import AggregationStrategy, SparseRoute
from gte_deploy.serving.failures import RequestError

TokenIds = list[int]
Text = str | TokenIds
"""A text, or its token ids."""

_STRING = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"anyOf": [_STRING, _IDS]}
_TOO_LARGE = 1 << 31

RequestT = TypeVar("RequestT", bound="Request")


def _fault(message: str) -> PydanticCustomError:
    # The message may have braces of the caller, so it goes in as a value.
    return PydanticCustomError("value", "{message}", {"message": message})


def _check_ids(value: Sequence[Any], place: str) -> None:
    if not value:
        raise _fault(f"{place} is empty; expected token ids")
    for number, item in enumerate(value):
        if type(item) is not int or not 0 <= item < _TOO_LARGE:
            raise _fault(f"{place}[{number}] must be a token id, an integer from 0, not {_shown(item)}")


def _check_texts(value: Any) -> Any:
    """Check a text, token ids, or a list of texts and lists of token ids."""
    if isinstance(value, str):
        return value
    _check_list(value, "a text, token ids, or a list of these")
    if type(value[0]) is int:
        _check_ids(value, "")
        return value
    for number, item in enumerate(value):
        if isinstance(item, list):
            _check_ids(item, f"[{number}]")
        elif not isinstance(item, str):
            raise _fault(f"[{number}] must be a text or token ids, not {_shown(item)}")
    return value


def _check_strings(value: Any) -> Any:
    """Check a text or a list of texts."""
    return value if isinstance(value, str) else _check_string_list(value)


def _check_string_list(value: Any) -> Any:
    _check_list(value, "a list of texts")
    for number, item in enumerate(value):
        if not isinstance(item, str):
            raise _fault(f"[{number}] must be a text, not {_shown(item)}")
    return value


def _check_pairs(value: Any) -> Any:
    """Check a text, a pair, or a list of lists of one or two texts; a list of one text is that text."""
    if isinstance(value, str):
        return value
    _check_list(value, "a text, a pair of texts, or a list of lists of one or two texts")
    if isinstance(value[0], str):
        if len(value) > 2:
            raise _fault(
                f"it is a flat list of {len(value)} texts; a pair has two, and a batch is a list of lists, such as "
                '[["a text"], ["a query", "a document"]]'
            )
        _check_string_list(value)
        return value[0] if len(value) == 1 else value
    for number, item in enumerate(value):
        if not isinstance(item, list) or len(item) not in (1, 2) or not all(isinstance(text, str) for text in item):
            raise _fault(f"[{number}] must be a list of one or two texts, not {_shown(item)}")
    return value


def _check_documents(value: Any) -> Any:
    """Check a list of texts, or of objects with a text, and return the texts."""
    _check_list(value, "a list of texts")
    texts = [item.get("text") if isinstance(item, dict) and item.keys() == {"text"} else item for item in value]
    return _check_string_list(texts)


def _check_decoded(value: Any) -> Any:
    """Check token ids, or a list of lists of them."""
    _check_list(value, "token ids, or a list of lists of them")
    if isinstance(value[0], list):
        for number, item in enumerate(value):
            if not isinstance(item, list):
                raise _fault(f"[{number}] must be a list of token ids, not {_shown(item)}")
            _check_ids(item, f"[{number}]")
    else:
        _check_ids(value, "")
    return value


def _check_list(value: Any, expected: str) -> None:
    if not isinstance(value, list):
        raise _fault(f"expected {expected}, not {_shown(value)}")
    if not value:
        raise PydanticCustomError("empty", "it is empty; give at least one")


def _shown(value: Any) -> str:
    """What a value is, in JSON's words; never the value itself, which may be long or private."""
    if isinstance(value, bool):
        return "a boolean"
    for kind, name in (
        (str, "a text"),
        (int, "an integer"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, kind):
            return name
    return "null"


def _many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


Texts = Annotated[Any, BeforeValidator(_check_texts), WithJsonSchema({"anyOf": [_STRING, _IDS, _many(_TEXT)]})]
Strings = Annotated[Any, BeforeValidator(_check_strings), WithJsonSchema({"anyOf": [_STRING, _many(_STRING)]})]
StringList = Annotated[Any, BeforeValidator(_check_string_list), WithJsonSchema(_many(_STRING))]
Documents = Annotated[
    Any,
    BeforeValidator(_check_documents),
    WithJsonSchema(
        _many({"anyOf": [_STRING, {"type": "object", "properties": {"text": _STRING}, "required": ["text"]}]})
    ),
]
_PAIR = {"type": "array", "items": _STRING, "minItems": 1, "maxItems": 2}
Pairs = Annotated[Any, BeforeValidator(_check_pairs), WithJsonSchema({"anyOf": [_STRING, _PAIR, _many(_PAIR)]})]
Decoded = Annotated[Any, BeforeValidator(_check_decoded), WithJsonSchema({"anyOf": [_IDS, _many(_IDS)]})]

EncodingFormat = Literal["float", "base64"]
TruncationDirection = Literal["Left", "Right", "left", "right"]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Request(_Fields):
    """Fields of every request."""

    model: str | None = Field(
        default=None, description="name of the model; by default the first that can answer this route"
    )


class Truncating(Request):
    """Fields of requests whose texts may be too long."""

    truncate: bool | None = Field(
        default=None, description="whether a text that is too long is cut; by default as the server was started"
    )
    truncation_direction: TruncationDirection | None = Field(
        default=None, description="the side where a text loses tokens; only that of the model's tokenizer is possible"
    )


class EmbedAllRequest(Truncating):
    """Texts, each with the same prompt before it."""

    inputs: Texts
    prompt_name: str | None = Field(default=None, description="prompt of the model to put before each text")


class EmbedRequest(EmbedAllRequest):
    """A request for `/embed`."""

    normalize: bool = Field(default=True, description="scale each embedding to length 1")
    dimensions: int | None = Field(default=None, ge=1, le=_TOO_LARGE, description="leading dimensions to keep")
    encoding_format: EncodingFormat = Field(default="float", description="base64: the bytes of float32, little endian")


class EmbedSparseRequest(EmbedAllRequest):
    """A request for `/embed_sparse`."""

    route: SparseRoute | None = Field(default=None, description="whether the texts are queries or documents")


class EmbedHybridRequest(EmbedAllRequest):
    """A request for `/embed_hybrid`."""

    normalize: bool = Field(default=True, description="scale each dense embedding to length 1")
    dimensions: int | None = Field(default=None, ge=1, le=_TOO_LARGE, description="leading dimensions to keep")


class Chunks(_Fields):
    """How texts are cut into chunks: one of `tokens`, `sentences` and `spans`."""

    tokens: int | None = Field(default=None, ge=1, le=_TOO_LARGE, description="tokens of a chunk")
    overlap: int | None = Field(default=None, ge=0, le=_TOO_LARGE, description="tokens that chunks of `tokens` share")
    sentences: int | None = Field(
        default=None, ge=1, le=_TOO_LARGE, description="most tokens of a chunk of whole sentences"
    )
    spans: list[list[list[int]]] | None = Field(
        default=None, description="for each text, the characters at which each chunk begins and ends"
    )

    @model_validator(mode="after")
    def _check_one(self) -> "Chunks":
        if sum(value is not None for value in (self.tokens, self.sentences, self.spans)) != 1:
            raise _fault("give one of tokens, sentences and spans")
        if self.overlap is not None and self.tokens is None:
            raise _fault("overlap is for tokens; leave it out")
        return self


class EmbedChunksRequest(Truncating):
    """A request for `/embed_chunks`."""

    inputs: Strings
    chunks: Chunks
    prompt_name: str | None = None
    normalize: bool = Field(default=True, description="scale each embedding to length 1")
    dimensions: int | None = Field(default=None, ge=1, le=_TOO_LARGE, description="leading dimensions to keep")
    window_overlap: int | None = Field(
        default=None, ge=0, le=_TOO_LARGE, description="tokens that windows of a text above the model's limit share"
    )


class EmbedMultiVectorRequest(EmbedAllRequest):
    """A request for `/embed_multi_vector`."""

    is_query: bool | None = Field(
        default=None, description="whether the texts are queries; needed by multi-vector models"
    )


class RerankRequest(Truncating):
    """A request for `/rerank`."""

    query: str
    texts: StringList
    raw_scores: bool = Field(default=False, description="logits in place of values between 0 and 1")
    return_text: bool = Field(default=False, description="whether the answer has the texts, too")


class PredictParameters(_Fields):
    """Parameters of Hugging Face's inference API for text classification."""

    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: int | None = Field(default=None, ge=1, le=_TOO_LARGE)


class PredictRequest(Truncating):
    """A request for `/predict`."""

    inputs: Pairs
    raw_scores: bool = Field(default=False, description="logits in place of probabilities")
    parameters: PredictParameters | None = Field(
        default=None,
        description="as Hugging Face's inference API has them; the answer to one text is then a list in a list",
    )


class SimilarityInput(_Fields):
    """The texts of a request for `/similarity`."""

    source_sentence: str
    sentences: StringList


class SimilarityParameters(_Fields):
    """Parameters of a request for `/similarity`."""

    truncate: bool | None = None
    truncation_direction: TruncationDirection | None = None
    prompt_name: str | None = None


class SimilarityRequest(Request):
    """A request for `/similarity`."""

    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class TokenizeRequest(Request):
    """A request for `/tokenize`."""

    inputs: Strings
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Request):
    """A request for `/decode`."""

    ids: Decoded
    skip_special_tokens: bool = True


class FillMaskParameters(_Fields):
    """Parameters of Hugging Face's inference API for fill-mask."""

    top_k: int = Field(default=5, ge=1, le=_TOO_LARGE)
    targets: StringList | None = None


class FillMaskRequest(Truncating):
    """A request for `/fill-mask`."""

    inputs: Strings
    parameters: FillMaskParameters = FillMaskParameters()


class ClassifyTokensParameters(_Fields):
    """Parameters of Hugging Face's inference API for token classification."""

    aggregation_strategy: AggregationStrategy = "none"
    ignore_labels: list[str] = ["O"]
    stride: int | None = Field(default=None, ge=0, le=_TOO_LARGE)


class ClassifyTokensRequest(Truncating):
    """A request for `/classify_tokens`."""

    inputs: Strings
    parameters: ClassifyTokensParameters = ClassifyTokensParameters()


class OpenAIEmbeddingsRequest(Request):
    """A request for `/v1/embeddings`."""

    input: Texts
    encoding_format: EncodingFormat = "float"
    dimensions: int | None = Field(default=None, ge=1, le=_TOO_LARGE)
    user: str | None = Field(default=None, description="without effect: nothing is stored")
    truncate: bool | None = Field(default=None, description="not OpenAI's: whether a text that is too long is cut")
    prompt_name: str | None = Field(
        default=None, description="not OpenAI's: prompt of the model to put before each text"
    )


class CohereRerankRequest(Request):
    """A request for `/v1/rerank` and `/v2/rerank`, of Cohere and Jina."""

    query: str
    documents: Documents
    top_n: int | None = Field(default=None, ge=1, le=_TOO_LARGE)
    return_documents: bool = False
    truncate: bool | None = Field(default=None, description="whether a pair that is too long is cut")


def validated(kind: type[RequestT], value: Any) -> RequestT:
    """Return the request that a JSON value describes.

    Raises:
        RequestError: the value has another form; the message names the field, and the index in it.
    """
    if not isinstance(value, dict):
        raise RequestError(422, f"the body must be a JSON object, not {_shown(value)}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "empty":
        raise RequestError(400, f"{place} is empty; give at least one text", "Empty", field=field)
    if first["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        raise RequestError(422, f"the field {place} is not known; this route has: {known}", field=field)
    if first["type"] == "value" and first["msg"].startswith("["):
        raise RequestError(422, f"{place}{first['msg']}", field=field)
    message = "expected an object" if first["type"] == "model_type" else first["msg"]
    raise RequestError(422, f"{place}: {message}", field=field)
