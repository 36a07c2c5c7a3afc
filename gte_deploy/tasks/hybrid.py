"""Dense and sparse embeddings of a text in one pass: pooled hidden states, and the weights of the text's tokens.

Shapes: N texts, B rows, S tokens, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gte_deploy.backends.base import Batch
from gte_deploy.tasks.base import EMBEDDING, HIDDEN, Ensemble, Outputs, Task
from gte_deploy.tasks.embed import EMBED, EmbeddingRequest
from gte_deploy.tasks.embed import SERVED as EMBED_SERVED
from gte_deploy.tasks.sparse import SERVED as SPARSE_SERVED
from gte_deploy.tasks.sparse import TOKEN_WEIGHTS, Names, SparseForm, SparseRequest

SERVED = Ensemble(
    "gte_hybrid",
    (*EMBED_SERVED.outputs, *SPARSE_SERVED.outputs),
    (*EMBED_SERVED.options, *SPARSE_SERVED.options),
)


@dataclass(frozen=True, eq=False)
class HybridEmbedding:
    """The dense and the sparse embedding of one text, or of a list of texts.

    Args:
        dense: [D] or, for a list, [N, D]: what `encode` gives.
        sparse: a `SparseEmbedding` or, for a list, a list of them: what `encode_sparse` gives.
    """

    dense: Any
    sparse: Any


@dataclass(frozen=True)
class HybridRequest:
    """The arguments of one call that say what to answer: those of its two halves."""

    dense: EmbeddingRequest
    sparse: SparseRequest

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """See `Request`."""
        return (*self.dense.graph_outputs(offered), *self.sparse.graph_outputs(offered))

    def answer(self, batch: Batch, outputs: Outputs) -> list[tuple[Any, Any]]:
        """See `Request`: the two embeddings of each row."""
        return list(zip(self.dense.answer(batch, outputs), self.sparse.answer(batch, outputs), strict=True))

    def assemble(
        self, answers: Sequence[tuple[Any, Any]], form: SparseForm, names: Names, *, single: bool
    ) -> HybridEmbedding:
        """Return all rows, in the caller's order, in the forms of the two halves."""
        dense, sparse = (list(half) for half in zip(*answers, strict=True))
        return HybridEmbedding(self.dense.assemble(dense, single=single), form.assemble(sparse, names, single=single))


HYBRID = Task(
    name="hybrid",
    outputs=(HIDDEN, EMBEDDING, TOKEN_WEIGHTS),
    request=HybridRequest,
    method="encode_hybrid",
    ensembles=(*EMBED.ensembles, SPARSE_SERVED, SERVED),
    similarity=EMBED.similarity,
    library=EMBED.library,
)
