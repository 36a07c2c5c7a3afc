"""The reference of a comparison, computed by PyTorch.

Shapes: B rows, S tokens of the longest row, H hidden size, L labels, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.spec import Logits, Pooling, SparseSpec, TaskName, head_task
from gte_deploy.exporters.verification.reference_cache import CachingEncoder, ReferenceCache
from gte_deploy.exporters.verification.results import ReferenceUse
from gte_deploy.models.families import head_of, head_transform_of
from gte_deploy.models.heads import (
    ClassifyHead,
    Head,
    HeadOptions,
    States,
    TokenClassifyHead,
    encode_padded,
    make_heads,
)
from gte_deploy.tasks.base import HIDDEN

# The number of tokens whose logits over the whole vocabulary are in memory at the same time.
_TOKENS_AT_ONCE = 256


class TorchReference:
    """transformers' own module in the model's dtype, with the heads that the torch backend has.

    The sparse head differs: it follows the definitions token by token, so that it can find an error in the head that
    graphs are traced from.

    With a cache, the encoder's outputs for long batches are taken from it, and new ones are stored there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        task: TaskName,
        pooling: Pooling,
        logits: Logits,
        sparse: SparseSpec | None = None,
        cache: ReferenceCache | None = None,
    ) -> None:
        self._model: Any = model.eval()
        encoder: Any = model.base_model
        self._cached = None if cache is None else CachingEncoder(encoder, cache)
        self._encoder = encoder if self._cached is None else self._cached
        options = HeadOptions(task, pooling, logits, sparse)
        self._heads: Sequence[Head] = (
            [_SparseByDefinition(model, sparse)]
            if task == "sparse" and sparse is not None
            else make_heads(model, options)
        )
        self.terms: dict[str, NDArray[np.float64]] = {}
        """Output with labels -> [L], the largest √(Σ(w·x)² + b²) of each label so far; see `Scales`."""

    @property
    def use(self) -> ReferenceUse | None:
        """The number of batches so far, and how many of them came from the cache; None without a cache."""
        return None if self._cached is None else self._cached.use

    @torch.inference_mode()
    def run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """See `Backend.run`; every output of the task is returned, whatever `outputs` names."""
        states = encode_padded(self._encoder, batch)
        for head in self._heads:
            if isinstance(head, (ClassifyHead, TokenClassifyHead)):
                self._keep_terms(head, states)
        results = {HIDDEN: states.hidden, **{head.output: head(states) for head in self._heads}}
        return {name: value.float().numpy() for name, value in results.items()}

    def _keep_terms(self, head: ClassifyHead | TokenClassifyHead, states: States) -> None:
        """Update `terms` by the features [..., H] of the head's classifier, where that is one linear layer."""
        classifier, features = head.classifier, head.features(states)
        if not isinstance(classifier, torch.nn.Linear):
            return
        terms = features.double().square() @ classifier.weight.double().square().T
        if classifier.bias is not None:
            terms = terms + classifier.bias.double().square()
        largest = terms.sqrt().reshape(-1, terms.shape[-1]).amax(0).numpy()
        self.terms[head.output] = np.maximum(self.terms.get(head.output, 0.0), largest)


@dataclass(frozen=True)
class _SparseByDefinition:
    """Sparse embeddings [B, V] token by token: padding is a logit of 0, and no weight is below 0."""

    output: ClassVar[str] = "sparse_embedding"
    model: Any
    sparse: SparseSpec

    def __call__(self, states: States) -> torch.Tensor:
        """See `Head`."""
        hidden, mask, input_ids = states.tokens_of_batch()
        head, transform = head_of(self.model, head_task("sparse", self.sparse)), head_transform_of(self.model)
        head = head if transform is None else torch.nn.Sequential(transform, head)
        weights = hidden.new_zeros(len(hidden), self.model.config.vocab_size)
        if self.sparse.head == "token-weights":
            rows = torch.arange(len(hidden))
            for place, ids in enumerate(input_ids.T):
                found = (head(hidden[:, place])[:, 0] * mask[:, place]).relu()
                weights[rows, ids] = torch.maximum(weights[rows, ids], found)
            weights[:, list(self.sparse.unweighted)] = 0
            return weights
        is_max = self.sparse.pooling == "max"
        for part, kept in zip(hidden.split(_TOKENS_AT_ONCE, 1), mask.split(_TOKENS_AT_ONCE, 1), strict=True):
            active = (head(part) * kept[:, :, None]).relu().log1p()
            active = active.log1p() if self.sparse.activation == "log1p_relu" else active
            weights = torch.maximum(weights, active.amax(1)) if is_max else weights + active.sum(1)
        return weights
