"""Sentence and token embeddings: from the outputs of a graph to the forms of SentenceTransformer.encode.

Shapes: N inputs, B rows, S tokens, H hidden size, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choice
from gte_deploy.core.spec import EMBEDDING_PRECISIONS, POOLINGS, EmbeddingPrecision, ModelSpec, Pooling
from gte_deploy.tasks.base import EMBEDDING, HIDDEN, Ensemble, Library, Outputs, ReturnType, Task, import_torch
from gte_deploy.tasks.pooling import l2_normalize, pool, quantize
from gte_deploy.text.inputs import check_integer

OutputValue = Literal["sentence_embedding", "token_embeddings"]

SERVED = Ensemble("gte_embed", ("EMBEDDING",), ("POOLING", "NORMALIZE", "TRUNCATE_DIM"))
TOKENS_SERVED = Ensemble("gte_token_embed", ("INPUT_IDS", "ATTENTION_MASK", "TOKEN_EMBEDDINGS"))
"""Token embeddings; for a model with token types also TOKEN_TYPE_IDS."""


@dataclass(frozen=True)
class EmbeddingRequest:
    """The arguments of one call that say what to return.

    Args:
        spec: facts of the model.
        pooling: "mean" or "cls".
        output_value: as in SentenceTransformer.encode; None gives every output.
        precision: type of sentence embeddings.
        return_type: "numpy", one "tensor", or a "list of tensors".
        normalize: scale to length 1, after truncation.
        truncate_dim: leading dimensions to keep, or None for all.
    """

    spec: ModelSpec
    pooling: Pooling
    output_value: OutputValue | None = "sentence_embedding"
    precision: EmbeddingPrecision = "float32"
    return_type: ReturnType = "numpy"
    normalize: bool = False
    truncate_dim: int | None = None

    def check(self) -> None:
        """Refuse unsupported arguments, before any work.

        Raises:
            InputError: an argument has a wrong value; the message names the argument and the allowed values.
            MissingDependencyError: tensors are requested and torch is not installed.
        """
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("output_value", self.output_value, ("sentence_embedding", "token_embeddings", None))
        check_choice("precision", self.precision, EMBEDDING_PRECISIONS)
        if self.truncate_dim is not None:
            check_integer("truncate_dim", self.truncate_dim, 1, self.spec.embedding_width)
        check_pooling(self.spec, self.pooling)
        if self.precision != "float32" and self.output_value != "sentence_embedding":
            raise InputError(f"precision {self.precision!r} is for sentence embeddings, not {self.output_value!r}")
        if self.return_type != "numpy":
            import_torch()

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """See `Request`: uses the backend's own pooling if the call asks for the same pooling."""
        own_pooling = EMBEDDING in offered and self.pooling == self.spec.pooling
        if self.output_value == "sentence_embedding":
            return (EMBEDDING,) if own_pooling else (HIDDEN,)
        if self.output_value == "token_embeddings" or not own_pooling:
            return (HIDDEN,)
        return (HIDDEN, EMBEDDING)

    def answer(self, batch: Batch, outputs: Outputs) -> list[Any]:
        """See `Request`; results are numpy arrays for every return type."""
        if self.output_value == "sentence_embedding":
            return list(self.finished(self.pooled(batch.attention_mask, outputs)))
        lengths = batch.attention_mask.sum(axis=1).tolist()
        if self.output_value == "token_embeddings":
            return [tokens[:length] for tokens, length in zip(outputs[HIDDEN], lengths, strict=True)]
        sentences = self._truncated(self.pooled(batch.attention_mask, outputs))
        types = batch.token_type_ids
        return [
            {
                "input_ids": batch.input_ids[row, :length],
                "attention_mask": batch.attention_mask[row, :length],
                **({} if types is None else {"token_type_ids": types[row, :length]}),
                "token_embeddings": outputs[HIDDEN][row, :length],
                "sentence_embedding": sentences[row],
            }
            for row, length in enumerate(lengths)
        ]

    def assemble(self, results: list[Any], *, single: bool) -> Any:
        """Return all rows, in the caller's order, in the requested form."""
        if self.output_value == "sentence_embedding":
            whole = self.in_form(np.stack(results))
        else:
            whole = results if self.return_type == "numpy" else [_as_tensors(result) for result in results]
        return whole[0] if single else whole

    def nothing(self) -> Any:
        """Return the answer for an empty list of texts: [0] of float64, or tensors, as SentenceTransformer gives it."""
        if self.return_type == "list of tensors" or self.output_value != "sentence_embedding":
            return []
        return np.array([]) if self.return_type == "numpy" else import_torch().Tensor()

    def in_form(self, embeddings: NDArray[np.float32]) -> Any:
        """Return finished embeddings [N, D] in the requested precision and type."""
        quantized = quantize(embeddings, self.precision)
        if self.return_type == "numpy":
            return quantized
        tensor = import_torch().from_numpy(quantized)
        return list(tensor) if self.return_type == "list of tensors" else tensor

    def pooled(self, attention_mask: NDArray[np.int64], outputs: Outputs) -> NDArray[np.float32]:
        """Return pooled states [B, D]: the graph's own, or the pooling of its hidden states."""
        pooled = outputs.get(EMBEDDING)
        return pool(outputs[HIDDEN], attention_mask, self.pooling) if pooled is None else pooled

    def finished(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sentence embeddings of pooled states [B, D]: normalized and truncated as the model and the call say."""
        embeddings = self._truncated(pooled)
        return l2_normalize(embeddings) if self.normalize else embeddings

    def _truncated(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        # The checkpoint's own Normalize module comes before the caller's truncation.
        embeddings = l2_normalize(pooled) if self.spec.normalize else pooled
        return embeddings[:, : self.truncate_dim]


def check_pooling(spec: ModelSpec, pooling: str) -> None:
    """Refuse a pooling other than the checkpoint's if Dense modules follow it: they were trained on its output.

    Raises:
        InputError: the pooling differs; the message names both.
    """
    if spec.embedding_size is not None and pooling != spec.pooling:
        raise InputError(
            f"pooling is {pooling!r}; this model's Dense modules follow its own pooling, {spec.pooling!r}. Leave "
            "pooling out, or take the token embeddings."
        )


def _as_tensors(result: Any) -> Any:
    torch = import_torch()
    if isinstance(result, dict):
        return {name: torch.tensor(value) for name, value in result.items()}
    return torch.tensor(result)


EMBED = Task(
    name="embed",
    outputs=(HIDDEN, EMBEDDING),
    request=EmbeddingRequest,
    architecture="Model",
    ensembles=(SERVED, TOKENS_SERVED),
    similarity="cosine",
    library=Library("SentenceTransformer", "feature-extraction", HIDDEN, "token_embeddings"),
)
