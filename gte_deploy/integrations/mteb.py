"""MTEB: a model as an encoder or a cross-encoder of `mteb.evaluate`. Needs mteb 2."""

from typing import Any

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

from gte_deploy.integrations.opening import AnyModel, call_options, name_of, opened


class GteEncoder(AbsEncoder):
    """Embeddings for MTEB's tasks, of a dense or a sparse model.

    A prompt for a task is found by MTEB's rules. Without one, queries and documents have the prompts that the
    checkpoint has for them.

    Args:
        model: a model, what `gte_deploy.load` takes, or the URL of a Triton server.
        model_prompts: task, type of task, or "query" and "document" -> prompt; by default the checkpoint's prompts.
        name: the name in MTEB's results, "organisation/name".
        options: keyword arguments of `encode` for each call; long texts are cut unless `truncation` is False.
    """

    def __init__(
        self, model: AnyModel, model_prompts: dict[str, str] | None = None, *, name: str | None = None, **options: Any
    ) -> None:
        self.model = opened(model)
        prompts = self.model.prompts if model_prompts is None else model_prompts
        # A checkpoint's other prompts have names of their own.
        self.model_prompts, _ = self.validate_task_to_prompt_name(prompts, raise_for_invalid_keys=False)
        self.mteb_model_meta = _meta(self.model, name)
        self._options = call_options(options)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> Any:
        """Return embeddings [N, D] of the texts of a data loader: an array, or a tensor of a sparse model."""
        texts = [text for batch in inputs for text in batch["text"]]
        key = self.get_prompt_name(task_metadata, prompt_type)
        prompt = None if key is None or self.model_prompts is None else self.model_prompts.get(key)
        names = {None: "encode", PromptType.query: "encode_query", PromptType.document: "encode_document"}
        options = {**self._options, **_call_arguments(kwargs)}
        if self.model.spec.task == "sparse":
            options["convert_to_sparse_tensor"] = False
        return getattr(self.model, names[prompt_type])(texts, prompt=prompt, **options)


class GteCrossEncoder:
    """Scores of pairs for MTEB's reranking tasks.

    Args:
        model: a model for reranking; as for GteEncoder.
        name: the name in MTEB's results.
        options: keyword arguments of `predict` for each call; long texts are cut unless `truncation` is False.
    """

    def __init__(self, model: AnyModel, *, name: str | None = None, **options: Any) -> None:
        self.model = opened(model)
        self.mteb_model_meta = _meta(self.model, name).model_copy(update={"model_type": ["cross-encoder"]})
        self._options = call_options(options)

    def predict(self, inputs1: Any, inputs2: Any, **kwargs: Any) -> Any:
        """Return the scores [N] float32 of the pairs that two data loaders give."""
        first, second = ([text for batch in inputs for text in batch["text"]] for inputs in (inputs1, inputs2))
        pairs = list(zip(first, second, strict=True))
        return self.model.predict(pairs, **{**self._options, **_call_arguments(kwargs)})


def _call_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of MTEB's arguments a model takes; the others describe the task."""
    return {name: kwargs[name] for name in ("batch_size", "show_progress_bar", "precision") if name in kwargs}


def _meta(model: Any, name: str | None) -> ModelMeta:
    facts = {
        "name": name or "gte-deploy/" + name_of(model).rstrip("/").rpartition("/")[2],
        "revision": "local",
        "max_tokens": model.max_seq_length,
        "embed_dim": model.get_embedding_dimension(),
    }
    return ModelMeta.create_empty(overwrites=facts)
