"""The call of a model that is timed: the one that gives the answer of its task, and not always `encode`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gte_deploy.tasks import TASKS

if TYPE_CHECKING:
    from gte_deploy.model import Model

# Those that put a model's default prompt before a text, which would make it longer than its shape says.
_WITH_PROMPT = ("encode", "predict", "encode_sparse", "encode_hybrid", "encode_multi_vector")


def answer(model: "Model", texts: Sequence[str], **limits: int) -> None:
    """Call the method of the model's task on a list of texts, without a prompt.

    Args:
        model: the model.
        texts: for fill-mask, with a mask each. A classifier takes each text as an input of its own, not as a pair.
        **limits: `batch_size` and `max_batch_tokens`, as the method takes them.
    """
    name = TASKS[model.spec.task].method
    options: dict[str, Any] = {"prompt": ""} if name in _WITH_PROMPT else {}
    if name == "encode_multi_vector":
        # As documents, up to the limit of the model; the token that stands before each counts.
        options |= {"is_query": False, "max_length": model.spec.max_length, "truncation": True}
    inputs: Any = [[text] for text in texts] if name == "predict" else list(texts)
    getattr(model, name)(inputs, **options, **limits)
