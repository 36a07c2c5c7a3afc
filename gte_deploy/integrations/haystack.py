"""Haystack: embedders of texts and documents, dense and sparse, and a ranker. Needs haystack-ai."""

import asyncio
from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.dataclasses import SparseEmbedding

from gte_deploy.integrations.opening import AnyModel, call_options, name_of, opened
from gte_deploy.tasks.interface import TextInterface


class _GteComponent:
    """The model of a component. Haystack writes the name and the options of a pipeline's models, and reads them again.

    Args:
        model: a model, what `gte_deploy.load` takes, or the URL of a Triton server. A name is opened by `warm_up`, or
            by the first call.
        load_options: keyword arguments of `gte_deploy.load` or `triton.Client`, for a name.
        options: keyword arguments of `encode`, `encode_sparse` or `rank` for each call; long texts are cut unless
            `truncation` is False.
    """

    def __init__(
        self, model: AnyModel, load_options: dict[str, Any] | None = None, options: dict[str, Any] | None = None
    ) -> None:
        self._given: AnyModel = model
        self._load_options, self._options = dict(load_options or {}), dict(options or {})
        self._more: dict[str, Any] = {}

    def warm_up(self) -> None:
        """Open the model."""
        self._given = opened(self._given, self._load_options)

    @property
    def _model(self) -> TextInterface:
        self.warm_up()
        assert isinstance(self._given, TextInterface)
        return self._given

    @property
    def _arguments(self) -> dict[str, Any]:
        return call_options(self._options)

    def to_dict(self) -> dict[str, Any]:
        """Return the component as plain data."""
        shown = {"load_options": self._load_options, "options": self._options, **self._more}
        data: dict[str, Any] = default_to_dict(self, model=name_of(self._given), **shown)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """Return the component that `to_dict` described."""
        return default_from_dict(cls, data)


class _DocumentComponent(_GteComponent):
    """Args beside those of every component.

    Args:
        meta_fields_to_embed: names of metadata whose values come before the content of a document.
        embedding_separator: text between them.
    """

    def __init__(
        self,
        model: AnyModel,
        load_options: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        super().__init__(model, load_options, options)
        self._more = {
            "meta_fields_to_embed": meta_fields_to_embed or [],
            "embedding_separator": embedding_separator,
        }

    def _texts(self, documents: list[Document]) -> list[str]:
        fields, separator = self._more["meta_fields_to_embed"], self._more["embedding_separator"]
        return [
            separator.join([*(str(doc.meta[name]) for name in fields if doc.meta.get(name)), doc.content or ""])
            for doc in documents
        ]


def _sparse(vector: Any) -> SparseEmbedding:
    return SparseEmbedding(vector.indices.tolist(), vector.values.tolist())


@component
class GteTextEmbedder(_GteComponent):
    """Embeds the text of a query, with the checkpoint's prompt for queries."""

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """Return {"embedding": [D]}."""
        return {"embedding": self._model.encode_query(text, **self._arguments).tolist()}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, Any]:
        """Return what `run` returns."""
        return await asyncio.to_thread(self.run, text)


@component
class GteDocumentEmbedder(_DocumentComponent):
    """Embeds documents, with the checkpoint's prompt for documents."""

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Return {"documents": copies with their embeddings}."""
        if not documents:
            return {"documents": []}
        found = self._model.encode_document(self._texts(documents), **self._arguments).tolist()
        return {"documents": [replace(doc, embedding=each) for doc, each in zip(documents, found, strict=True)]}

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """Return what `run` returns."""
        return await asyncio.to_thread(self.run, documents)


@component
class GteSparseTextEmbedder(_GteComponent):
    """Gives the sparse embedding of a query."""

    @component.output_types(sparse_embedding=SparseEmbedding)
    def run(self, text: str) -> dict[str, Any]:
        """Return {"sparse_embedding": vocabulary ids and weights}."""
        return {"sparse_embedding": _sparse(self._model.encode_query(text, as_dict=False, **self._arguments))}

    @component.output_types(sparse_embedding=SparseEmbedding)
    async def run_async(self, text: str) -> dict[str, Any]:
        """Return what `run` returns."""
        return await asyncio.to_thread(self.run, text)


@component
class GteSparseDocumentEmbedder(_DocumentComponent):
    """Gives the sparse embeddings of documents."""

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Return {"documents": copies with their sparse embeddings}."""
        if not documents:
            return {"documents": []}
        found = self._model.encode_document(self._texts(documents), as_dict=False, **self._arguments)
        return {
            "documents": [
                replace(doc, sparse_embedding=_sparse(each)) for doc, each in zip(documents, found, strict=True)
            ]
        }

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """Return what `run` returns."""
        return await asyncio.to_thread(self.run, documents)


@component
class GteRanker(_GteComponent):
    """Sorts documents by a cross-encoder's score for the query, which becomes their score.

    Args beside those of every component: `top_k`, the number of documents to keep; None for all.
    """

    def __init__(
        self,
        model: AnyModel,
        load_options: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        top_k: int | None = None,
    ) -> None:
        # Not super(): the decorator of Haystack makes another class of this one.
        _GteComponent.__init__(self, model, load_options, options)
        self._more = {"top_k": top_k}

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, Any]:
        """Return {"documents": copies with their scores, best first}."""
        if not documents:
            return {"documents": []}
        texts = [doc.content or "" for doc in documents]
        kept = self._more["top_k"] if top_k is None else top_k
        ranking = self._model.rank(query, texts, top_k=kept, **self._arguments)
        return {"documents": [replace(documents[hit["corpus_id"]], score=hit["score"]) for hit in ranking]}

    @component.output_types(documents=list[Document])
    async def run_async(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, Any]:
        """Return what `run` returns."""
        return await asyncio.to_thread(self.run, query, documents, top_k)
