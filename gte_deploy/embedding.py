"""What `Model.encode` returns, from a backend's outputs to the forms of SentenceTransformer.encode.

Shapes: N inputs, B rows, S tokens, H hidden size, D embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.errors import InputError, MissingDependencyError
from gte_deploy.inputs import check_integer
from gte_deploy.pooling import EMBEDDING_PRECISIONS, EmbeddingPrecision, l2_normalize, pool, quantize
from gte_deploy.spec import POOLINGS, ModelSpec, Pooling

OutputValue = Literal["sentence_embedding", "token_embeddings"]
ReturnType = Literal["numpy", "tensor", "list of tensors"]


@dataclass(frozen=True)
class EmbeddingRequest:
    """The checked arguments of one call that say what to return.

    Args:
        pooling: "mean" or "cls".
        output_value: as in SentenceTransformer.encode; None is all there is.
        precision: type of sentence embeddings.
        return_type: "numpy", one "tensor", or a "list of tensors".
        normalize: scale to length 1, after truncation.
        truncate_dim: leading dimensions to keep, or None for all.
    """

    pooling: Pooling
    output_value: OutputValue | None
    precision: EmbeddingPrecision
    return_type: ReturnType
    normalize: bool
    truncate_dim: int | None

    def check(self, hidden_size: int) -> None:
        """Refuse what cannot be honoured, before any work.

        Raises:
            InputError: naming the argument and what it may be.
            MissingDependencyError: tensors are asked for and torch is not installed.
        """
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("output_value", self.output_value, ("sentence_embedding", "token_embeddings", None))
        check_choice("precision", self.precision, EMBEDDING_PRECISIONS)
        if self.truncate_dim is not None:
            check_integer("truncate_dim", self.truncate_dim, 1, hidden_size)
        if self.precision != "float32" and self.output_value != "sentence_embedding":
            raise InputError(f"precision {self.precision!r} is for sentence embeddings, not {self.output_value!r}")
        if self.return_type != "numpy":
            import_torch()

    def graph_outputs(self, spec: ModelSpec, offered: Sequence[str]) -> tuple[str, ...]:
        """Names to ask the backend for: its own pooling where that is the one wanted."""
        own_pooling = "sentence_embedding" in offered and self.pooling == spec.pooling
        if self.output_value == "sentence_embedding":
            return ("sentence_embedding",) if own_pooling else ("last_hidden_state",)
        if self.output_value == "token_embeddings" or not own_pooling:
            return ("last_hidden_state",)
        return ("last_hidden_state", "sentence_embedding")

    def rows(self, spec: ModelSpec, batch: Batch, outputs: Mapping[str, NDArray[np.float32]]) -> list[Any]:
        """The result of each row of a batch, still in numpy."""
        lengths = batch.attention_mask.sum(axis=1).tolist()
        if self.output_value == "token_embeddings":
            return [tokens[:length] for tokens, length in zip(outputs["last_hidden_state"], lengths, strict=True)]
        sentences = self._sentence_embeddings(spec, batch, outputs)
        if self.output_value == "sentence_embedding":
            return list(l2_normalize(sentences) if self.normalize else sentences)
        return [
            {
                "input_ids": batch.input_ids[row, :length],
                "attention_mask": batch.attention_mask[row, :length],
                "token_embeddings": outputs["last_hidden_state"][row, :length],
                "sentence_embedding": sentences[row],
            }
            for row, length in enumerate(lengths)
        ]

    def assemble(self, results: list[Any], *, single: bool) -> Any:
        """All rows, in the caller's order, in the form asked for."""
        if self.output_value == "sentence_embedding":
            embeddings = quantize(np.stack(results), self.precision)
            whole = embeddings if self.return_type == "numpy" else import_torch().from_numpy(embeddings)
            if self.return_type == "list of tensors":
                whole = list(whole)
        else:
            whole = results if self.return_type == "numpy" else [_as_tensors(result) for result in results]
        return whole[0] if single else whole

    def _sentence_embeddings(
        self, spec: ModelSpec, batch: Batch, outputs: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        embeddings = outputs.get("sentence_embedding")
        if embeddings is None:
            embeddings = pool(outputs["last_hidden_state"], batch.attention_mask, self.pooling)
        # The checkpoint's own Normalize module comes before the caller's truncation.
        embeddings = l2_normalize(embeddings) if spec.normalize else embeddings
        return embeddings[:, : self.truncate_dim]


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value that is not among the allowed ones.

    Raises:
        InputError: naming them.
    """
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def _as_tensors(result: Any) -> Any:
    torch = import_torch()
    if isinstance(result, dict):
        return {name: torch.tensor(value) for name, value in result.items()}
    return torch.tensor(result)


def import_torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependencyError("torch", "torch") from error
    return torch
