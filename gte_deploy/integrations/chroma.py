"""Chroma: a model as the embedding function of a collection. Needs chromadb."""

from typing import Any

from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from gte_deploy.integrations.opening import AnyModel, call_options, name_of, opened

_SPACES = {"cosine": "cosine", "dot": "ip", "euclidean": "l2"}


@register_embedding_function
class GteEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds documents and queries, each with the prompt that the checkpoint has for them.

    A collection stores the name of the model. After an import of this module, `get_collection` opens it again.

    Args:
        model: a model, what `gte_deploy.load` takes, or the URL of a Triton server.
        options: keyword arguments of `encode` for each call; long texts are cut unless `truncation` is False.
    """

    def __init__(self, model: AnyModel, **options: Any) -> None:
        self.model = opened(model)
        self._given = options

    def __call__(self, input: Documents) -> Embeddings:
        """Return an embedding [D] float32 for each document."""
        return list(self.model.encode_document(input, **call_options(self._given)))

    def embed_query(self, input: Documents) -> Embeddings:
        """Return an embedding [D] float32 for each query."""
        return list(self.model.encode_query(input, **call_options(self._given)))

    @staticmethod
    def name() -> str:
        """The name under which Chroma finds this class."""
        return "gte-deploy"

    def default_space(self) -> Space:
        """The distance that belongs to the model's similarity."""
        return _SPACES.get(self.model.similarity_fn_name, "cosine")

    def get_config(self) -> dict[str, Any]:
        """What a collection stores."""
        return {"model": name_of(self.model), "options": self._given}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "GteEmbeddingFunction":
        """Open the model that a collection names."""
        return GteEmbeddingFunction(config["model"], **config["options"])
