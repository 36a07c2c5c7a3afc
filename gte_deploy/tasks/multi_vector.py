"""Late interaction: an embedding of each token, and the MaxSim score of a query with a document (ColBERT).

Shapes: N queries, M documents, B rows, S tokens of the longest row, T tokens of a text that count, H hidden size,
D embedding size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import LateInteraction, ModelSpec, MultiVectorSpec, QueryExpansion
from gte_deploy.tasks.base import HIDDEN, Ensemble, Library, Outputs, Task
from gte_deploy.tasks.pooling import l2_normalize
from gte_deploy.text.batching import ExpandedRow, TypedRow
from gte_deploy.text.inputs import check_integer

if TYPE_CHECKING:
    from gte_deploy.text.tokenization import TextTokenizer

TOKEN_VECTORS = "token_vectors"
"""The output of multi-vector models: [B, S, D], projected and not normalised; also for the tokens of the prompt."""

KEPT_TOKENS = "kept_tokens"
"""The tensor of a Triton repository that says which tokens of a row get an embedding: bool [B, S]."""

SERVED_VECTORS = "TOKEN_EMBEDDINGS"
_SERVED = ("TOKENS", SERVED_VECTORS), ("NORMALIZE", "SKIP_WORDS")
QUERY_VECTORS_SERVED = Ensemble("gte_multi_vector_query", *_SERVED)
DOCUMENT_VECTORS_SERVED = Ensemble("gte_multi_vector_document", *_SERVED)


@dataclass(frozen=True)
class MultiVectorRequest:
    """The arguments of one call that say what to answer.

    Args:
        spec: facts of a model for this task.
        is_query: whether the texts are queries, or documents.
        skip_words: tokens without an embedding; None for the checkpoint's own.
        normalize: whether each embedding is scaled to length 1.
        cut_to: tokens that the model's user has set as the limit of all texts; see `DropIn.max_seq_length`.
        skipped: the ids of `skip_words`, from `of_tokenizer`.
    """

    spec: ModelSpec
    is_query: bool
    skip_words: tuple[str, ...] | None = None
    normalize: bool = True
    cut_to: int | None = None
    skipped: Collection[int] | None = None

    @property
    def _own(self) -> MultiVectorSpec:
        assert self.spec.multi_vector is not None  # a model for this task has one
        return self.spec.multi_vector

    @property
    def _expansion(self) -> QueryExpansion | None:
        return self._own.expansion if self.is_query else None

    @property
    def prefix(self) -> int | None:
        """The token that follows the first special token of each text; None for none."""
        return self._own.query_prefix if self.is_query else self._own.document_prefix

    def of_tokenizer(self, tokenizer: TextTokenizer) -> MultiVectorRequest:
        """Return the request with the ids of its `skip_words`; a word that is no token is ignored."""
        if self.skip_words is None:
            return self
        ids = {tokenizer.token_to_id(word) for word in self.skip_words}
        return dataclasses.replace(self, skipped=sorted(token for token in ids if token is not None))

    def rows(
        self, tokenizer: TextTokenizer, texts: Sequence[str], indices: Sequence[int] | None, *, limit: int, cut: bool
    ) -> list[list[int]]:
        """Return the token ids of texts, with the tokens that lengthen queries.

        Args:
            tokenizer: the model's tokenizer, `with_prefix` of this request.
            texts: the texts, prompts included.
            indices: the numbers of the texts in the caller's list, for errors; None to count from 0.
            limit: largest number of tokens, from `limit`.
            cut: whether a text that is too long loses tokens.

        Raises:
            InputError: a text is too long, and `cut` is off.
        """
        rows = tokenizer.encode_texts(texts, indices, max_length=limit, truncation=cut)
        return [self.expanded(row, limit) for row in rows]

    def limit(self, asked: int | None, low: int) -> int:
        """Return the largest number of tokens in a text: as `asked`, else the checkpoint's own.

        Raises:
            InputError: `asked` is below `low` or above the model's limit; or `cut_to` is below `low`.
        """
        own = self._own.query_length if self.is_query else self._own.document_length
        if asked is not None:
            expansion = self._expansion
            least = expansion.length if expansion is not None and not expansion.fixed else low
            return check_integer("max_length", asked, max(low, least), self.spec.max_length)
        cut = self.cut_limit
        return own if cut is None else check_integer("max_seq_length", cut, low, own)

    @property
    def cut_limit(self) -> int | None:
        """The largest number of tokens in a text as `cut_to` says; None if `cut_to` changes nothing."""
        expansion = self._expansion
        # As in MultiVectorEncoder, queries of a fixed length keep it.
        if self.cut_to is None or (expansion is not None and expansion.fixed):
            return None
        return min(self.cut_to, self._own.query_length if self.is_query else self._own.document_length)

    def expanded(self, row: list[int], limit: int) -> list[int]:
        """Return the token ids of a text with the tokens that lengthen a query; `limit` as from `limit`."""
        expansion = self._expansion
        if expansion is None:
            return row
        added = (limit if expansion.fixed else expansion.length) - len(row)
        if added <= 0:
            return row
        runs = row.type_runs if isinstance(row, TypedRow) else [(0, len(row))]
        ids = [*row, *[expansion.token] * added]
        return ExpandedRow(ids, [*runs, (0, added)], len(ids) if expansion.attended else len(row))

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """See `Request`."""
        return (TOKEN_VECTORS,)

    def scored(self, batch: Batch) -> NDArray[np.bool_]:
        """Return [B, S]: the tokens of the texts, and those that lengthen queries, without any padding."""
        found = batch.attention_mask == 1
        expansion = self._expansion
        if expansion is not None and not expansion.attended:
            # A row of a fixed length is as long as the batch.
            found[:, : None if expansion.fixed else expansion.length] = True
        return found

    def answer(self, batch: Batch, outputs: Outputs) -> list[NDArray[np.float32]]:
        """See `Request`: [T, D] float32 of each row, in the order of its tokens."""
        return kept_vectors(
            outputs[TOKEN_VECTORS], self.kept(batch.input_ids, self.scored(batch)), normalize=self.normalize
        )

    def kept_in(self, rows: Sequence[Sequence[int]], input_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return [B, S]: the tokens that get an embedding, of `rows` and of the same rows with any padding [B, S]."""
        lengths = np.array([len(row) for row in rows])
        return self.kept(input_ids, np.arange(input_ids.shape[1]) < lengths[:, None])

    def kept(self, input_ids: NDArray[np.int64], scored: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return [B, S]: the tokens that get an embedding, those of `scored` [B, S] that are not skipped."""
        own = self._own.skipped_in_queries if self.is_query else self._own.skipped_in_documents
        return scored & ~np.isin(input_ids, list(own if self.skipped is None else self.skipped))


def kept_vectors(
    vectors: NDArray[np.float32], kept: NDArray[np.bool_], *, normalize: bool
) -> list[NDArray[np.float32]]:
    """Return [T, D] of each row, from the vectors [B, S, D] of all tokens and those to keep [B, S]."""
    chosen = [row[tokens] for row, tokens in zip(vectors, kept, strict=True)]
    return [l2_normalize(each) for each in chosen] if normalize else chosen


@dataclass(frozen=True)
class TokenVectors:
    """Makes the embeddings of a text's tokens from its hidden states.

    Args:
        projection: [D, H], the weight of a linear layer without bias, as torch stores it; None to keep the states.
        skipped: ids of tokens without an embedding, such as punctuation.
        normalize: whether each embedding is scaled to length 1, after the projection.
    """

    projection: NDArray[np.float32] | None = None
    skipped: Collection[int] = ()
    normalize: bool = True

    @classmethod
    def of(cls, projection: Any, skipped: Collection[int], *, normalize: bool, width: int) -> TokenVectors:
        """Read the arguments of `encode_multi_vector` for a model with hidden states of `width`.

        Raises:
            InputError: the projection is not a matrix [D, width] of finite numbers.
        """
        if projection is None:
            return cls(None, skipped, normalize)
        given = projection.detach().cpu() if hasattr(projection, "detach") else projection  # a torch tensor
        weight = np.asarray(given, dtype=np.float32)
        if weight.ndim != 2 or weight.shape[1] != width or not np.isfinite(weight).all():
            raise InputError(
                f"projection must be a matrix [D, {width}] of finite numbers, not one of shape {list(weight.shape)}"
            )
        return cls(weight, skipped, normalize)

    def of_text(self, answer: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return [T, D] from `input_ids` [S] and `token_embeddings` [S, H] of a text, in the order of its tokens."""
        states = answer["token_embeddings"][~np.isin(answer["input_ids"], list(self.skipped))]
        vectors = states if self.projection is None else states @ self.projection.T
        return l2_normalize(vectors) if self.normalize else vectors


def late_interaction(queries: Any, documents: Any, name: LateInteraction) -> NDArray[np.float32]:
    """Return the score [N, M] of each query with each document, by the function `name`.

    "maxsim" is `maxsim`; "meanmaxsim" divides it by the number of the query's tokens.

    Args:
        queries: [T, D] of each query: arrays or torch tensors. One matrix stands for one query.
        documents: likewise, of each document.
        name: the function.

    Raises:
        InputError: see `maxsim`.
    """
    left, right = as_matrices(queries), as_matrices(documents)
    scores = maxsim(left, right)
    return scores / _lengths(left)[:, None] if name == "meanmaxsim" else scores


def late_interaction_of_pairs(queries: Any, documents: Any, name: LateInteraction) -> NDArray[np.float32]:
    """Return the score [N] of each query with the document at its place; see `late_interaction`.

    Raises:
        InputError: see `maxsim`; or there are not equally many.
    """
    left, right = as_matrices(queries), as_matrices(documents)
    if len(left) != len(right):
        raise InputError(f"pairs need equally many embeddings, not {len(left)} and {len(right)}")
    scores: NDArray[np.float32] = np.array([maxsim([a], [b])[0, 0] for a, b in zip(left, right, strict=True)])
    return scores / _lengths(left) if name == "meanmaxsim" else scores


def as_matrices(embeddings: Any) -> list[Any]:
    """Return the embeddings of several texts as arrays; one matrix [T, D] stands for one text."""
    items = list(embeddings) if isinstance(embeddings, list | tuple) or embeddings.ndim != 2 else [embeddings]
    return [item.detach().float().cpu().numpy() if hasattr(item, "detach") else item for item in items]


def _lengths(items: Sequence[Any]) -> NDArray[np.float32]:
    """[N] the number of tokens of each text, at least 1."""
    return np.array([max(1, len(item)) for item in items], np.float32)


def maxsim(queries: Sequence[NDArray[np.float32]], documents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the MaxSim score [N, M] of each query with each document.

    For each token of the query the largest dot product with a token of the document counts; the score is their sum
    (Khattab and Zaharia 2020, ColBERT, equation 3). A document without a token scores 0.

    Args:
        queries: [T, D] of each query, from `encode_multi_vector`.
        documents: likewise, of each document.

    Raises:
        InputError: an item is not a matrix, or the widths differ.
    """
    items = [*queries, *documents]
    if not all(isinstance(item, np.ndarray) and item.ndim == 2 for item in items):
        raise InputError("maxsim takes two lists of arrays [T, D], as encode_multi_vector gives for lists of texts")
    if len(widths := {item.shape[1] for item in items}) > 1:
        raise InputError(f"the embeddings have the widths {', '.join(map(str, sorted(widths)))}; they must be equal")
    scores = np.zeros((len(queries), len(documents)), np.float32)
    for column, document in enumerate(documents):
        if len(document):
            scores[:, column] = [(query @ document.T).max(axis=1).sum() for query in queries]
    return scores


MULTI_VECTOR = Task(
    name="multi-vector",
    outputs=(HIDDEN, TOKEN_VECTORS),
    request=MultiVectorRequest,
    method="encode_multi_vector",
    ensembles=(QUERY_VECTORS_SERVED, DOCUMENT_VECTORS_SERVED),
    similarity="maxsim",
    library=Library("MultiVectorEncoder", "feature-extraction", HIDDEN, "token_embeddings"),
)
