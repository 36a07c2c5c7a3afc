"""The facts about a model as plain data, the same for a bundle and for a checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

TaskName = Literal["fill-mask", "embed", "classify", "token-classify", "sparse", "hybrid", "multi-vector"]
Pooling = Literal["mean", "cls"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
"""The function that compares two embeddings, under its name in sentence-transformers."""
LateInteraction = Literal["maxsim", "meanmaxsim"]
"""The function that compares the token embeddings of two texts, under its name in sentence-transformers."""
Logits = Literal["masked", "all"]
SparseHeadName = Literal["splade", "token-weights"]
SparseActivation = Literal["relu", "log1p_relu"]
SparsePooling = Literal["max", "sum"]
SparseRoute = Literal["query", "document"]
Engine = Literal["onnxruntime", "openvino", "tensorrt", "executorch"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int8-weight", "int4-weight"]
"""The precision of a bundle's weights and graphs."""
DeviceType = Literal["cpu", "cuda"]
"""The device that ONNX Runtime's graph is for."""
TensorRTVariant = Literal["tensorrt", "tensorrt-rtx"]
ComputePrecision = Literal["fp32", "bf16"]
"""The precision that an engine computes in if the graph leaves it the choice."""
LoadPrecision = Literal["auto", "fp32", "bf16"]
"""What `gte_deploy.load` takes: a compute precision, or "auto" for the one that suits bundle and machine."""
BackendName = Literal["auto", "onnx", "openvino", "torch", "tensorrt", "executorch"]
"""The backend that runs a model, as `gte_deploy.load` takes it."""
BundleBackend = Literal["onnx", "openvino", "tensorrt", "executorch"]
"""The backends that can run a bundle."""
EmbeddingPrecision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
FilePrecision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
"""The data type of sentence embeddings, under its name in sentence-transformers."""
ScoreFunction = Literal["sigmoid", "softmax", "none"]
"""The function from the logits of a classifier to its scores, under its name in transformers' pipeline."""
AggregationStrategy = Literal["none", "simple", "first", "average", "max"]
"""The rule that joins neighbouring tokens with one label, under its name in transformers' pipeline."""

TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
TASK_ALIASES: Mapping[str, TaskName] = {
    "mlm": "fill-mask",
    "masked-lm": "fill-mask",
    "embedding": "embed",
    "embeddings": "embed",
    "encode": "embed",
    "feature-extraction": "embed",
    "sentence-similarity": "embed",
    "rerank": "classify",
    "reranker": "classify",
    "reranking": "classify",
    "cross-encoder": "classify",
    "classification": "classify",
    "text-classification": "classify",
    "sequence-classification": "classify",
    "ner": "token-classify",
    "token-classification": "token-classify",
    "splade": "sparse",
    "colbert": "multi-vector",
    "late-interaction": "multi-vector",
}
"""Other names of tasks, as hubs and libraries call them."""
PRECISION_ALIASES: Mapping[str, Precision] = {
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "int4": "int4-weight",
    "w8": "int8-weight",
    "w4": "int4-weight",
}
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
LATE_INTERACTIONS: tuple[LateInteraction, ...] = get_args(LateInteraction)
LOGITS: tuple[Logits, ...] = get_args(Logits)
SPARSE_HEADS: tuple[SparseHeadName, ...] = get_args(SparseHeadName)
SPARSE_ACTIVATIONS: tuple[SparseActivation, ...] = get_args(SparseActivation)
SPARSE_POOLINGS: tuple[SparsePooling, ...] = get_args(SparsePooling)
SPARSE_ROUTES: tuple[SparseRoute, ...] = get_args(SparseRoute)
ENGINES: tuple[Engine, ...] = get_args(Engine)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEVICE_TYPES: tuple[DeviceType, ...] = get_args(DeviceType)
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""The files of a tokenizer that are read, of a checkpoint as of a bundle."""
TENSORRT_VARIANTS: tuple[TensorRTVariant, ...] = get_args(TensorRTVariant)
COMPUTE_PRECISIONS: tuple[ComputePrecision, ...] = get_args(ComputePrecision)
LOAD_PRECISIONS: tuple[LoadPrecision, ...] = get_args(LoadPrecision)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
BUNDLE_BACKENDS: tuple[BundleBackend, ...] = get_args(BundleBackend)
EMBEDDING_PRECISIONS: tuple[EmbeddingPrecision, ...] = get_args(EmbeddingPrecision)
FILE_PRECISIONS: tuple[FilePrecision, ...] = get_args(FilePrecision)
SCORE_FUNCTIONS: tuple[ScoreFunction, ...] = get_args(ScoreFunction)
AGGREGATION_STRATEGIES: tuple[AggregationStrategy, ...] = get_args(AggregationStrategy)


def computed_in(precision: Precision, computes: Precision) -> str:
    """Return the name of what a graph is computed in, by an engine that computes in `computes` where it has the choice.

    It is that of the graph's own types, such as "int8" or "fp16". "int8+bf16" are INT8 products with the rest in
    bfloat16. The graphs of "fp32" and "bf16" leave the engine the choice.
    """
    if precision in ("fp32", "bf16"):
        return computes
    return f"{precision}{'+bf16' * (precision == 'int8' and computes == 'bf16')}"


def engine_title(
    engine: Engine, precision: Precision, computes: Precision, *, device: DeviceType = "cpu", emulated: bool = False
) -> str:
    """Return the name of an engine and of what it computes in, the same wherever people read it.

    Examples: "openvino int8+bf16", and "onnxruntime fp16 on cuda (emulated)" if an emulation computed the numbers.
    """
    place = f" on {device}" if engine == "onnxruntime" and device != "cpu" else ""
    return f"{engine} {computed_in(precision, computes)}{place}{' (emulated)' if emulated else ''}"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph's input or output; a dynamic axis is a name, such as "batch"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def is_packed(inputs: Iterable[TensorSpec]) -> bool:
    """Whether a graph takes the tokens of all texts in a row, without padding, rather than [batch, sequence]."""
    return any(tensor.name == "input_ids" and len(tensor.shape) == 1 for tensor in inputs)


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of a TensorRT engine: the range of (batch, sequence) that it takes.

    Kernels are tuned for `opt`. For a padding-free engine the pairs are (texts, tokens of all texts).
    """

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    def __post_init__(self) -> None:
        sizes = (self.min, self.opt, self.max)
        if not all(len(size) == 2 and all(type(n) is int and n > 0 for n in size) for size in sizes):
            raise ValueError(f"a profile is three pairs of positive integers (batch, sequence), not {sizes}")
        if not all(low <= opt <= high for low, opt, high in zip(*sizes, strict=True)):
            raise ValueError(f"the profile {self} is not in the order min, opt, max")

    def __str__(self) -> str:
        """As the command line takes it: 1x1:8x128:32x512."""
        return ":".join(f"{batch}x{sequence}" for batch, sequence in (self.min, self.opt, self.max))

    def takes(self, batch: int, sequence: int) -> bool:
        """Whether a tensor [batch, sequence] is within the profile."""
        return self.min[0] <= batch <= self.max[0] and self.min[1] <= sequence <= self.max[1]


@dataclass(frozen=True)
class SparseSpec:
    """The computation of sparse embeddings: vectors with a weight for each entry of the vocabulary.

    Args:
        head: "splade" pools the masked-LM logits of all tokens; "token-weights" gives each token one weight.
        activation: of a splade head, "relu" for log1p(relu(x)) or "log1p_relu" for log1p(log1p(relu(x))). A
            token-weights head has only "relu", without a logarithm.
        pooling: the pooling over the tokens, "max" or "sum".
        query_weights: path, relative to the folder, of the weights that the tokens of a query get without the model,
            float32 [vocabulary]; None if queries go through the model, as documents do.
        default_route: whether a text counts as a query or a document if the caller does not say; None if the caller
            must say it.
        max_active_dims: number of entries that a vector keeps, the heaviest; None for all.
        unweighted: token ids that never have a weight, for a token-weights head.
    """

    head: SparseHeadName
    activation: SparseActivation = "relu"
    pooling: SparsePooling = "max"
    query_weights: str | None = None
    default_route: SparseRoute | None = "document"
    max_active_dims: int | None = None
    unweighted: tuple[int, ...] = ()


@dataclass(frozen=True)
class QueryExpansion:
    """The tokens that lengthen a short query; they have embeddings of their own (Khattab and Zaharia 2020, ColBERT).

    Args:
        token: id of the token, usually the mask token.
        length: number of tokens that a query has at least, special tokens included.
        attended: whether other tokens attend to these tokens. If not, their attention mask is 0, as that of padding.
        fixed: whether a query has exactly `length` tokens, so that longer queries are too long.
    """

    token: int
    length: int
    attended: bool
    fixed: bool


@dataclass(frozen=True)
class MultiVectorSpec:
    """How a model embeds each token of queries and documents for late interaction; lengths are in tokens.

    Args:
        query_length: largest number of tokens in a query, special tokens and the prefix included.
        document_length: likewise in a document.
        query_prefix: id of a token that follows the first special token of a query; None for no such token.
        document_prefix: likewise of a document.
        expansion: the tokens that lengthen queries; None for none.
        skipped_in_queries: ids of tokens without an embedding in queries, in rising order.
        skipped_in_documents: likewise in documents.
    """

    query_length: int
    document_length: int
    query_prefix: int | None = None
    document_prefix: int | None = None
    expansion: QueryExpansion | None = None
    skipped_in_queries: tuple[int, ...] = ()
    skipped_in_documents: tuple[int, ...] = ()

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The ids of the tokens before queries and documents, of those that there are."""
        return tuple(token for token in (self.query_prefix, self.document_prefix) if token is not None)

    @property
    def scores_unattended(self) -> bool:
        """Whether tokens have embeddings to which no token attends: kernels must compute what they see as padding."""
        return self.expansion is not None and not self.expansion.attended


@dataclass(frozen=True)
class ModelSpec:
    """The facts about a model that the runtime needs on every engine.

    Args:
        task: the task that the head is for.
        max_length: longest input in tokens, special tokens included.
        vocab_size: rows of the word embedding (padded); ids at or above it are refused.
        hidden_size: width of the hidden states.
        pad_token_id: id that fills short rows.
        pooling: how `encode` pools; "mean" or "cls".
        logits: "masked" if the graph takes mask_positions, "all" if it computes every token's logits (fill-mask only).
        num_labels: number of labels of a classifier, 0 otherwise.
        id2label: names of the labels of a classifier.
        prompts: name -> text put before an input, as in sentence-transformers' config.
        default_prompt_name: the prompt to use if the caller names none.
        normalize: whether the checkpoint's own modules end in a Normalize step.
        token_types: whether the model takes the token types of its tokenizer: 1 for the second text of a pair.
        type_vocab_size: number of token types; ids at or above it are refused. With 0 or 1 the model has no types.
        embedding_size: width of the sentence embedding, or of a token's, if Dense modules project it; None for
            `hidden_size`.
        truncate_dim: leading dimensions that the checkpoint's own configuration keeps; None for all.
        similarity: the function that compares the checkpoint's embeddings; None if the model has none.
        activation: a classifier's default activation, a key of `activations.ACTIVATIONS`; None for the sigmoid of one
            label, and no activation for several.
        sparse: how the model computes sparse embeddings; None if it has none.
        multi_vector: how the model embeds queries and documents for late interaction; None if it is not made for it.
    """

    task: TaskName
    max_length: int
    vocab_size: int
    hidden_size: int
    pad_token_id: int
    pooling: Pooling = "mean"
    logits: Logits = "masked"
    num_labels: int = 0
    id2label: Mapping[int, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    normalize: bool = False
    token_types: bool = False
    type_vocab_size: int = 0
    embedding_size: int | None = None
    truncate_dim: int | None = None
    similarity: Similarity | LateInteraction | None = None
    activation: str | None = None
    sparse: SparseSpec | None = None
    multi_vector: MultiVectorSpec | None = None

    @property
    def embedding_width(self) -> int:
        """Dimensions of a sentence embedding, before any truncation."""
        return self.embedding_size or self.hidden_size

    def width_of(self, output: str) -> int | None:
        """Return the size of the last axis of a graph's output; None for an output of another name."""
        widths = {
            "last_hidden_state": self.hidden_size,
            "sentence_embedding": self.embedding_width,
            "token_vectors": self.embedding_width,
            "sparse_embedding": self.vocab_size,
            "token_weights": 1,
            "logits": self.vocab_size if self.task == "fill-mask" else self.num_labels,
        }
        return widths.get(output)

    @property
    def head_task(self) -> TaskName:
        """The task whose head the model has; see `head_task`."""
        return head_task(self.task, self.sparse)


def head_task(task: TaskName, sparse: SparseSpec | None) -> TaskName:
    """The task whose head a model has: a sparse or hybrid model has that of fill-mask or token-classify.

    A multi-vector model is an encoder alone, as one for embed.
    """
    if task == "multi-vector":
        return "embed"
    if sparse is None or task not in ("sparse", "hybrid"):
        return task
    return "fill-mask" if sparse.head == "splade" else "token-classify"
