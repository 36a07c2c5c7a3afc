"""The form of each answer, for /openapi.json. Handlers build plain lists and arrays, which are written as they are."""

from typing_extensions import TypedDict

Embeddings = list[list[float] | str]
TokenEmbeddings = list[list[list[float]]]
Similarities = list[float]
DecodedTexts = list[str]


class SparseValue(TypedDict):
    """The weight of one entry of the vocabulary."""

    index: int
    value: float


SparseEmbeddings = list[list[SparseValue]]


class HybridEmbeddings(TypedDict):
    """Dense and sparse embeddings of the same texts."""

    dense: list[list[float]]
    sparse: SparseEmbeddings


class ChunkEmbedding(TypedDict):
    """The embedding of a chunk, and the characters of the text at which it begins and ends."""

    start: int
    end: int
    embedding: list[float]


ChunksOfTexts = list[list[ChunkEmbedding]]


class Rank(TypedDict, total=False):
    """A text of a ranking."""

    index: int
    score: float
    text: str


Ranks = list[Rank]


class Prediction(TypedDict):
    """A label and its score."""

    label: str
    score: float


Predictions = list[Prediction] | list[list[Prediction]]


class SimpleToken(TypedDict):
    """A token, and its place in the text in characters; a special token has none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


Tokens = list[list[SimpleToken]]


class FilledMask(TypedDict):
    """A candidate for a mask."""

    score: float
    token: int
    token_str: str
    sequence: str


FilledMasks = list[FilledMask] | list[list[FilledMask]] | list[list[FilledMask] | list[list[FilledMask]]]


class Entity(TypedDict, total=False):
    """A token, or a group of neighbours, with a label."""

    entity: str
    entity_group: str
    score: float
    index: int
    word: str
    start: int
    end: int


Entities = list[Entity] | list[list[Entity]]


class Usage(TypedDict):
    """Tokens that a request took, special tokens included; a reranker computes equal documents once."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbedding(TypedDict):
    """One embedding of `/v1/embeddings`."""

    object: str
    embedding: list[float] | str
    index: int


class OpenAIEmbeddings(TypedDict):
    """The answer of `/v1/embeddings`."""

    object: str
    data: list[OpenAIEmbedding]
    model: str
    usage: Usage


class RerankedDocument(TypedDict):
    """The text of a ranked document."""

    text: str


class CohereRank(TypedDict, total=False):
    """One document of `/v1/rerank`."""

    index: int
    relevance_score: float
    document: RerankedDocument


class CohereRanking(TypedDict):
    """The answer of `/v1/rerank` and `/v2/rerank`."""

    id: str
    object: str
    model: str
    results: list[CohereRank]
    usage: Usage


class ErrorResponse(TypedDict):
    """An error, in the form of text-embeddings-inference."""

    error: str
    error_type: str


class OpenAIError(TypedDict):
    """What an error of OpenAI's form says."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(TypedDict):
    """An error, in the form of OpenAI."""

    error: OpenAIError
