"""What `Model` and `triton.Client` share: the methods that are made of others, and the reading of their arguments.

Shapes: N inputs, L labels.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from gte_deploy.embedding import ReturnType, check_choice
from gte_deploy.errors import InputError
from gte_deploy.inputs import as_texts, check_integer
from gte_deploy.scores import ActivationFn
from gte_deploy.spec import SPARSE_ROUTES, ModelSpec, SparseRoute, Task

logger = logging.getLogger(__name__)

# sentence-transformers knows these two of every model.
_EMPTY_PROMPTS = ("query", "document")
_NO_EFFECT_IN_RANK = ("apply_softmax", "convert_to_numpy", "convert_to_tensor")
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class TextInterface(ABC):
    """Texts in, answers out, wherever they are computed."""

    spec: ModelSpec
    _name: str
    """Of the model, for messages."""

    @abstractmethod
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embeddings, with the arguments of SentenceTransformer.encode."""

    @abstractmethod
    def encode_sparse(self, *args: Any, **kwargs: Any) -> Any:
        """Sparse embeddings, with the arguments of SparseEncoder.encode."""

    @abstractmethod
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Scores, as CrossEncoder.predict returns them."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode_query(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`encode` with the prompt "query"; without any where the checkpoint has none of that name.

        Of a sparse model `encode_sparse`, by the route of queries where they have their own.
        """
        if prompt_name is None and prompt is None:
            prompt = self.spec.prompts.get("query", "")
        if self.spec.task == "sparse":
            return self.encode_sparse(inputs, prompt_name, prompt, *args, route="query", **kwargs)
        return self.encode(inputs, prompt_name, prompt, *args, **kwargs)

    def encode_document(
        self,
        inputs: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`encode` with the first prompt of "document", "passage" and "corpus" that the checkpoint has, else none.

        Of a sparse model `encode_sparse`, by the route of documents.
        """
        if prompt_name is None and prompt is None:
            prompts = self.spec.prompts
            prompt = next((prompts[name] for name in _DOCUMENT_PROMPTS if name in prompts), "")
        if self.spec.task == "sparse":
            return self.encode_sparse(inputs, prompt_name, prompt, *args, route="document", **kwargs)
        return self.encode(inputs, prompt_name, prompt, *args, **kwargs)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: ActivationFn | None = None,
        device: str | None = None,
        pool: None = None,
        chunk_size: None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Documents by their score with the query, best first: {corpus_id, score} and, where asked, text.

        The arguments are those of CrossEncoder.rank, in its order; see `predict` for the later ones. `kwargs` are the
        keyword-only arguments of `predict`. `apply_softmax`, `convert_to_numpy` and `convert_to_tensor` have no effect,
        as in CrossEncoder.

        Raises:
            InputError: the model has more than one label; `top_k` is not positive; see `predict`.
        """
        self._require_task("classify")
        if self.spec.num_labels != 1:
            raise InputError(f"rank needs a model with one label, and this has {self.spec.num_labels}; use predict")
        texts, single = as_texts(documents, name="documents")
        if single:
            raise InputError("documents must be a list of texts, not one text")
        if top_k is not None:
            check_integer("top_k", top_k, 1, 1 << 31)
        as_texts([query], name="query")
        scores = self.predict(
            [(query, text) for text in texts],
            prompt_name,
            prompt,
            batch_size,
            show_progress_bar,
            activation_fn,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
            **_without_effect(kwargs),
        ).tolist()
        order = sorted(range(len(texts)), key=lambda i: -scores[i])[:top_k]
        shown = [{"text": text} if return_documents else {} for text in texts]
        return [{"corpus_id": i, "score": scores[i], **shown[i]} for i in order]

    def _require_task(self, *tasks: Task) -> None:
        if self.spec.task not in tasks:
            raise InputError(f"this needs a {' or '.join(tasks)} model, and {self._name} is made for {self.spec.task}")

    def _refuse_sparse(self) -> None:
        if self.spec.task == "sparse":
            raise InputError(
                f"{self._name} is made for sparse embeddings: use encode_sparse, encode_query or encode_document"
            )

    def _require_sparse(self) -> None:
        """A token classifier with one label gives the weights of tokens, too."""
        one_label = self.spec.task == "token-classify" and self.spec.num_labels == 1
        if self.spec.task != "sparse" and not one_label:
            raise InputError(
                f"this needs a sparse model, and {self._name} is made for {self.spec.task}. A checkpoint with a "
                "masked-LM head or with a token classifier of one label is loaded (task='sparse') or exported "
                f"(--task sparse) as one.{self._why_not_sparse()}"
            )

    def _why_not_sparse(self) -> str:
        """What the checkpoint itself says of it, to end a message with."""
        return ""

    def _route(self, route: str | None) -> SparseRoute:
        """Which way texts go; see `SparseSpec.default_route`."""
        sparse = self.spec.sparse
        if route is None and sparse is not None and sparse.query_weights is not None:
            route = sparse.default_route
            if route is None:
                raise InputError(
                    f"{self._name} encodes queries and documents in different ways: use encode_query or encode_document"
                )
        check_choice("route", route, (None, *SPARSE_ROUTES))
        return "query" if route == "query" else "document"

    def _max_active_dims(self, wanted: int | None) -> int | None:
        if wanted is not None:
            return check_integer("max_active_dims", wanted, 1, (1 << 31) - 1)
        return None if self.spec.sparse is None else self.spec.sparse.max_active_dims


def _without_effect(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `rank` that go to `predict`: without those that CrossEncoder.rank takes and ignores."""
    for name in _NO_EFFECT_IN_RANK:
        if name in options:
            logger.warning("%s has no effect in rank, which returns Python floats", name)
    return {name: value for name, value in options.items() if name not in _NO_EFFECT_IN_RANK}


def prompt_text(spec: ModelSpec, prompt: str | None, name: str | None) -> str:
    """What to put before each text: `prompt`, else the prompt of that name, else the checkpoint's default, else "".

    Raises:
        InputError: the prompt is no text, or none of the checkpoint's has that name.
    """
    if prompt is not None:
        if not isinstance(prompt, str):
            raise InputError(f"prompt must be a text, not {type(prompt).__name__}")
        if name is not None:
            logger.warning("both prompt and prompt_name are given; prompt_name %r is ignored", name)
        return prompt
    name = spec.default_prompt_name if name is None else name
    if name is None:
        return ""
    if name not in spec.prompts and name in _EMPTY_PROMPTS:
        return ""
    if name not in spec.prompts:
        known = ", ".join(spec.prompts) or "none"
        raise InputError(f"prompt_name {name!r} is none of this model's prompts: {known}")
    return spec.prompts[name]


def one_of(inputs: Any, sentences: Any) -> Any:
    """The texts of `encode`, by their name or their former one.

    Raises:
        InputError: both or neither are given.
    """
    if (inputs is None) == (sentences is None):
        raise InputError("give the texts as `inputs` (or, as before, as `sentences`), once")
    return sentences if inputs is None else inputs


def return_type(convert_to_numpy: bool, convert_to_tensor: bool) -> ReturnType:
    """What `encode` returns, as SentenceTransformer.encode reads the two."""
    if convert_to_tensor:
        return "tensor"
    return "numpy" if convert_to_numpy else "list of tensors"


_Payload = TypeVar("_Payload")


def with_progress(
    batches: Iterator[tuple[list[int], _Payload]], total: int, wanted: bool | None
) -> Iterator[tuple[list[int], _Payload]]:
    """The batches, which begin with the indices of their inputs, with a bar on stderr.

    `wanted` None is where the package logs at INFO or DEBUG.
    """
    if wanted is None:
        wanted = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    if not wanted:
        yield from batches
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Inputs") as bar:
        for indices, payload in batches:
            yield indices, payload
            bar.update(len(indices))
