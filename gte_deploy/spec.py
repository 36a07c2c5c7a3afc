"""What a model offers, in plain data: the same facts for a bundle and for a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Task = Literal["fill-mask", "embed", "classify", "token-classify"]
Pooling = Literal["mean", "cls"]
Logits = Literal["masked", "all"]
Engine = Literal["onnxruntime", "openvino"]
Precision = Literal["fp32", "int8", "int8-weight", "int4-weight"]
"""What a bundle's weights and graphs are made for."""
ComputePrecision = Literal["fp32", "bf16"]
"""What an engine computes in wherever the graph leaves it the choice."""

TASKS: tuple[Task, ...] = get_args(Task)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
LOGITS: tuple[Logits, ...] = get_args(Logits)
ENGINES: tuple[Engine, ...] = get_args(Engine)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
COMPUTE_PRECISIONS: tuple[ComputePrecision, ...] = get_args(ComputePrecision)


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph's input or output; a dynamic axis is a name, such as "batch"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ModelSpec:
    """The facts that the runtime needs of a model, whatever runs it.

    Args:
        task: what the head computes.
        max_length: longest input in tokens, special tokens included.
        vocab_size: rows of the word embedding (padded); ids at or above it are refused.
        hidden_size: width of the hidden states.
        pad_token_id: id that fills short rows.
        pooling: how `encode` pools; "mean" or "cls".
        logits: "masked" where the graph takes mask_positions, "all" for the classical graph (fill-mask only).
        num_labels: labels of a classifier, 0 otherwise.
        id2label: label names of a classifier.
        prompts: name -> text put before an input, as sentence-transformers' config has them.
        default_prompt_name: the prompt used where the caller names none.
        normalize: whether the checkpoint's own modules end in a Normalize step.
    """

    task: Task
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
