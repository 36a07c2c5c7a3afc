"""The table of routes that ask a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gte_deploy.core.spec import TASK_NAMES, TaskName
from gte_deploy.serving import answers, handlers
from gte_deploy.serving import requests as forms
from gte_deploy.serving.registry import ServedModel
from gte_deploy.tasks import TASKS

_DENSE: tuple[TaskName, ...] = ("embed", "hybrid", "fill-mask")


@dataclass(frozen=True)
class ModelRoute:
    """A route that asks a model.

    Args:
        path: the path.
        summary: one sentence for /openapi.json.
        request: the form of a request.
        answer: the form of an answer.
        tasks: tasks of the models that can answer.
        takes_labels: whether classifiers of several labels can answer.
        handle: from a request to an answer.
        aliases: other paths of the same route, which /openapi.json leaves out.
    """

    path: str
    summary: str
    request: type[forms.Request]
    answer: Any
    tasks: tuple[TaskName, ...]
    handle: Callable[..., handlers.Answer]
    takes_labels: bool = True
    aliases: tuple[str, ...] = ()

    def suits(self, served: ServedModel) -> bool:
        """Whether a model can answer."""
        spec = served.model.spec
        if spec.task == "classify" and spec.num_labels > 1 and not self.takes_labels:
            return False
        return any(TASKS[task].can_run_on(spec) for task in self.tasks)

    @property
    def needs(self) -> str:
        """The beginning of a message: which models can answer."""
        of_one_label = "" if self.takes_labels else " with one label"
        return (
            f"{self.path} needs a model for {' or '.join(self.tasks).replace('classify', f'classify{of_one_label}', 1)}"
        )


MODEL_ROUTES: tuple[ModelRoute, ...] = (
    ModelRoute("/embed", "Embed texts.", forms.EmbedRequest, answers.Embeddings, _DENSE, handlers.embed),
    ModelRoute(
        "/embed_all",
        "Give the hidden states of every token, without pooling.",
        forms.EmbedAllRequest,
        answers.TokenEmbeddings,
        _DENSE,
        handlers.embed_all,
    ),
    ModelRoute(
        "/embed_sparse",
        "Embed texts sparsely: weights for some entries of the vocabulary.",
        forms.EmbedSparseRequest,
        answers.SparseEmbeddings,
        ("sparse",),
        handlers.embed_sparse,
    ),
    ModelRoute(
        "/embed_hybrid",
        "Embed texts densely and sparsely in one pass.",
        forms.EmbedHybridRequest,
        answers.HybridEmbeddings,
        ("hybrid",),
        handlers.embed_hybrid,
    ),
    ModelRoute(
        "/embed_chunks",
        "Embed the chunks of texts in the context of the whole text (late chunking).",
        forms.EmbedChunksRequest,
        answers.ChunksOfTexts,
        _DENSE,
        handlers.embed_chunks,
    ),
    ModelRoute(
        "/embed_multi_vector",
        "Embed each token of texts, for late interaction.",
        forms.EmbedMultiVectorRequest,
        answers.TokenEmbeddings,
        ("multi-vector", *_DENSE),
        handlers.embed_multi_vector,
    ),
    ModelRoute(
        "/rerank",
        "Order texts by their score with a query.",
        forms.RerankRequest,
        answers.Ranks,
        ("classify", "multi-vector"),
        handlers.rerank,
        takes_labels=False,
    ),
    ModelRoute(
        "/predict",
        "Classify texts or pairs of texts.",
        forms.PredictRequest,
        answers.Predictions,
        ("classify",),
        handlers.predict,
    ),
    ModelRoute(
        "/similarity",
        "Compare a sentence with others by the cosine of their embeddings.",
        forms.SimilarityRequest,
        answers.Similarities,
        _DENSE,
        handlers.similarity,
    ),
    ModelRoute(
        "/fill-mask",
        "Predict the masked words of texts.",
        forms.FillMaskRequest,
        answers.FilledMasks,
        ("fill-mask",),
        handlers.fill_mask,
    ),
    ModelRoute(
        "/classify_tokens",
        "Label the tokens of texts.",
        forms.ClassifyTokensRequest,
        answers.Entities,
        ("token-classify",),
        handlers.classify_tokens,
    ),
    ModelRoute(
        "/tokenize",
        "Give the tokens of texts, and their places in them.",
        forms.TokenizeRequest,
        answers.Tokens,
        TASK_NAMES,
        handlers.tokenize,
    ),
    ModelRoute(
        "/decode",
        "Give the text of token ids.",
        forms.DecodeRequest,
        answers.DecodedTexts,
        TASK_NAMES,
        handlers.decode,
    ),
    ModelRoute(
        "/v1/embeddings",
        "Embed texts, in the form of OpenAI.",
        forms.OpenAIEmbeddingsRequest,
        answers.OpenAIEmbeddings,
        _DENSE,
        handlers.openai_embeddings,
        aliases=("/embeddings",),
    ),
    ModelRoute(
        "/v1/rerank",
        "Order documents by their score with a query, in the form of Cohere and Jina.",
        forms.CohereRerankRequest,
        answers.CohereRanking,
        ("classify", "multi-vector"),
        handlers.cohere_rerank,
        takes_labels=False,
        aliases=("/v2/rerank",),
    ),
)

_OWN_ROUTES: dict[TaskName, str] = {
    "embed": "/embed",
    "hybrid": "/embed_hybrid",
    "sparse": "/embed_sparse",
    "multi-vector": "/embed_multi_vector",
    "fill-mask": "/fill-mask",
    "token-classify": "/classify_tokens",
}


def own_route(task: TaskName, num_labels: int) -> ModelRoute:
    """The route that `POST /` stands for: that of the first model, as in text-embeddings-inference."""
    path = _OWN_ROUTES.get(task, "/rerank" if num_labels == 1 else "/predict")
    return next(route for route in MODEL_ROUTES if route.path == path)
