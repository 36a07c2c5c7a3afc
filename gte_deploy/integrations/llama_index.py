"""LlamaIndex: a model as `BaseEmbedding` or `BaseSparseEmbedding`, and a reranker. Needs llama-index-core."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.embeddings.base_sparse import BaseSparseEmbedding
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import PrivateAttr

from gte_deploy.integrations.opening import AnyModel, call_options, name_of, opened

Vector = list[float]
SparseVector = dict[int, float]


class GteEmbedding(BaseEmbedding):
    """Embeddings of texts and of queries, each with the prompt that the checkpoint has for them.

    Args:
        model: a model, what `gte_deploy.load` takes, or the URL of a Triton server.
        options: keyword arguments of `encode` for each call; long texts are cut unless `truncation` is False.
        fields: fields of BaseEmbedding, such as `embed_batch_size`.
    """

    _model: Any = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()

    def __init__(self, model: AnyModel, options: dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__(**{"model_name": name_of(model), **fields})
        self._model, self._options = opened(model), call_options(options)

    @classmethod
    def class_name(cls) -> str:
        """See BaseEmbedding."""
        return "GteEmbedding"

    def _get_query_embedding(self, query: str) -> Vector:
        found: Vector = self._model.encode_query(query, **self._options).tolist()
        return found

    def _get_text_embedding(self, text: str) -> Vector:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Vector]:
        found: list[Vector] = self._model.encode_document(texts, **self._options).tolist()
        return found

    async def _aget_query_embedding(self, query: str) -> Vector:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Vector:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Vector]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


class GteSparseEmbedding(BaseSparseEmbedding):
    """Sparse embeddings of texts and queries: vocabulary id -> weight.

    Args:
        model: as for GteEmbedding, for a sparse model.
        options: keyword arguments of `encode_sparse` for each call, as for GteEmbedding.
        fields: fields of BaseSparseEmbedding.
    """

    _model: Any = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()

    def __init__(self, model: AnyModel, options: dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__(**{"model_name": name_of(model), **fields})
        self._model, self._options = opened(model), {**call_options(options), "as_dict": False}

    @classmethod
    def class_name(cls) -> str:
        """See BaseSparseEmbedding."""
        return "GteSparseEmbedding"

    def _get_query_embedding(self, query: str) -> SparseVector:
        return dict(self._model.encode_query(query, **self._options).ordered())

    def _get_text_embedding(self, text: str) -> SparseVector:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[SparseVector]:
        return [dict(vector.ordered()) for vector in self._model.encode_document(texts, **self._options)]

    async def _aget_query_embedding(self, query: str) -> SparseVector:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> SparseVector:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[SparseVector]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


def sparse_functions(
    model: AnyModel, **options: Any
) -> tuple[Callable[[Sequence[str]], Any], Callable[[Sequence[str]], Any]]:
    """Return `sparse_doc_fn` and `sparse_query_fn` of QdrantVectorStore: texts -> (indices, weights) of each.

    Args:
        model: as for GteSparseEmbedding.
        options: keyword arguments of `encode_sparse`, as for GteEmbedding.
    """
    used = opened(model)
    kept = {**call_options(options), "as_dict": False}

    def function(encode: Callable[..., Any]) -> Callable[[Sequence[str]], tuple[list[list[int]], list[Vector]]]:
        def vectors(texts: Sequence[str]) -> tuple[list[list[int]], list[Vector]]:
            found = encode(list(texts), **kept)
            return [each.indices.tolist() for each in found], [each.values.tolist() for each in found]

        return vectors

    return function(used.encode_document), function(used.encode_query)


class GteRerank(BaseNodePostprocessor):
    """Sorts nodes by a cross-encoder's score for the query, which becomes their score.

    Args:
        model: a model for reranking; as for GteEmbedding.
        top_n: number of nodes to keep; None for all.
        options: keyword arguments of `rank` for each call; long texts are cut unless `truncation` is False.
    """

    top_n: int | None = None
    _model: Any = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()

    def __init__(
        self, model: AnyModel, top_n: int | None = None, options: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        super().__init__(top_n=top_n, **fields)
        self._model, self._options = opened(model), call_options(options)

    @classmethod
    def class_name(cls) -> str:
        """See BaseNodePostprocessor."""
        return "GteRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("GteRerank needs the query: pass query_bundle or query_str")
        if not nodes:
            return []
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        ranking = self._model.rank(query_bundle.query_str, texts, top_k=self.top_n, **self._options)
        return [NodeWithScore(node=nodes[hit["corpus_id"]].node, score=hit["score"]) for hit in ranking]
