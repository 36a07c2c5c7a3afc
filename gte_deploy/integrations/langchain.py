"""LangChain: a model as `Embeddings`, and a reranker as `BaseDocumentCompressor`. Needs langchain-core."""

# pyright: reportMissingImports=false
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from pydantic import ConfigDict, PrivateAttr

from gte_deploy.integrations.opening import AnyModel, call_options, opened


class GteEmbeddings(Embeddings):
    """Embeddings of documents and of queries, each with the prompt that the checkpoint has for them.

    Args:
        model: a model, what `gte_deploy.load` takes, or the URL of a Triton server.
        options: keyword arguments of `encode` for each call. Texts that are too long are cut unless `truncation` is
            False.
    """

    def __init__(self, model: AnyModel, **options: Any) -> None:
        self.model = opened(model)
        self._options = call_options(options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return an embedding [D] for each document."""
        found: list[list[float]] = self.model.encode_document(texts, **self._options).tolist() if texts else []
        return found

    def embed_query(self, text: str) -> list[float]:
        """Return the embedding [D] of a query."""
        found: list[float] = self.model.encode_query(text, **self._options).tolist()
        return found


class GteReranker(BaseDocumentCompressor):
    """Sorts documents by a cross-encoder's score for the query, which it adds to their metadata.

    Args:
        model: a model for reranking, what `gte_deploy.load` takes, or the URL of a Triton server.
        top_n: number of documents to keep; None for all.
        score_key: name of the score in the metadata.
        options: keyword arguments of `rank` for each call; long texts are cut unless `truncation` is False.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    model: Any
    top_n: int | None = None
    score_key: str = "relevance_score"
    options: dict[str, Any] = {}
    _opened: Any = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the model."""
        self._opened = opened(self.model)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return copies of the `top_n` best documents, best first."""
        if not documents:
            return []
        texts = [document.page_content for document in documents]
        ranking = self._opened.rank(query, texts, top_k=self.top_n, **call_options(self.options))
        chosen = [(documents[hit["corpus_id"]], hit["score"]) for hit in ranking]
        return [
            document.model_copy(update={"metadata": {**document.metadata, self.score_key: score}})
            for document, score in chosen
        ]
