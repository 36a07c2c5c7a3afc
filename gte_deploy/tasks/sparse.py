"""Sparse embeddings: vectors with a weight for few entries of the vocabulary, and the forms of SparseEncoder.encode.

Shapes: N texts, B rows, S tokens, V vocabulary, K entries that a vector has.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_flags
from gte_deploy.core.spec import ModelSpec, SparseRoute, TaskName
from gte_deploy.tasks.base import HIDDEN, Ensemble, Library, Outputs, Task, Tensors, filled, import_torch

if TYPE_CHECKING:
    from gte_deploy.text.tokenization import TextTokenizer

_POOLED = "sparse_embedding"

TOKEN_WEIGHTS = "token_weights"
"""The output of hybrid models: [B, S, 1], relu(logit) of each token; the values of padding have no meaning."""

# The output that has the weights of a model for another task.
_OUTPUTS: Mapping[TaskName, str] = {"token-classify": "logits", "hybrid": TOKEN_WEIGHTS}

Names = Callable[[int], str] | Mapping[int, str] | Sequence[str]
"""Vocabulary id -> name of the entry."""


SERVED = Ensemble("gte_sparse", ("TOKENS", "TOKEN", "TOKEN_ID", "WEIGHT"), ("MAX_ACTIVE_DIMS",))
QUERIES_SERVED = Ensemble("gte_sparse_query", SERVED.outputs, SERVED.options)
"""Queries answered from the stored weights of their tokens, if the model has such weights."""


@dataclass(frozen=True, eq=False)
class SparseEmbedding:
    """The weights of one text.

    Args:
        indices: [K] int64, vocabulary ids in rising order, each once.
        values: [K] float32, their weights; none is 0.
        size: V.
    """

    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    size: int

    def __len__(self) -> int:
        """Entries that have a weight."""
        return len(self.indices)

    def to_dense(self) -> NDArray[np.float32]:
        """Return [V] float32, 0 for entries without a weight."""
        dense = np.zeros(self.size, np.float32)
        dense[self.indices] = self.values
        return dense

    def ordered(self) -> list[tuple[int, float]]:
        """(vocabulary id, weight), heaviest first; equal weights by id."""
        order = np.argsort(-self.values, kind="stable")
        return list(zip(self.indices[order].tolist(), self.values[order].tolist(), strict=True))

    def as_dict(self, names: Names) -> dict[str, float]:
        """Return name -> weight, heaviest first. If several entries share a name, the heaviest weight counts."""
        found: dict[str, float] = {}
        for index, weight in self.ordered():
            found.setdefault(names(index) if callable(names) else names[index], weight)
        return found


@dataclass(frozen=True)
class SparseRequest:
    """The arguments of one call that say what to answer.

    Args:
        spec: facts of a model for this task, of a hybrid model, or of a token classifier with one label.
        max_active_dims: entries that the caller wants to keep; None for the checkpoint's own number.
        route: "query" or "document", if the two differ.
        unweighted: token ids without a weight, for a token classifier.
    """

    spec: ModelSpec
    max_active_dims: int | None = None
    route: SparseRoute = "document"
    unweighted: tuple[int, ...] = ()

    @property
    def kept(self) -> int | None:
        """Entries to keep, the heaviest; None for all."""
        if self.max_active_dims is not None:
            return self.max_active_dims
        return None if self.spec.sparse is None else self.spec.sparse.max_active_dims

    def graph_outputs(self, offered: Sequence[str]) -> tuple[str, ...]:
        """See `Request`."""
        return (_OUTPUTS.get(self.spec.task, _POOLED),)

    def answer(self, batch: Batch, outputs: Outputs) -> list[SparseEmbedding]:
        """See `Request`."""
        return self.vectors(self.weights(batch, outputs))

    def vectors(self, weights: Iterable[NDArray[np.float32]]) -> list[SparseEmbedding]:
        """A vector for each row of weights [V]."""
        return [sparsify(row, self.kept) for row in weights]

    def weights(self, batch: Batch, outputs: Outputs) -> Iterable[NDArray[np.float32]]:
        """The weights [V] of each row."""
        if _POOLED in outputs:
            return outputs[_POOLED]
        (name,) = self.graph_outputs(tuple(outputs))
        rows = zip(batch.input_ids, outputs[name][:, :, 0], batch.attention_mask == 1, strict=True)
        size = self.spec.vocab_size
        unweighted = self.unweighted if self.spec.sparse is None else self.spec.sparse.unweighted
        return (weights_of_tokens(ids[real], row[real], size, unweighted) for ids, row, real in rows)


def sparsify(weights: NDArray[np.float32], max_active_dims: int | None = None) -> SparseEmbedding:
    """A row of weights [V] as a vector; `max_active_dims` keeps the heaviest."""
    indices = np.flatnonzero(weights)
    if max_active_dims is not None and max_active_dims < len(indices):
        heaviest = np.argsort(-np.abs(weights[indices]), kind="stable")[:max_active_dims]
        indices = np.sort(indices[heaviest])
    return SparseEmbedding(indices.astype(np.int64), weights[indices].astype(np.float32), len(weights))


def weights_of_tokens(
    ids: NDArray[np.int64], logits: NDArray[np.float32], size: int, unweighted: Collection[int]
) -> NDArray[np.float32]:
    """[V] weights of a text's token ids [S] and logits (or token weights) [S], as gte-multilingual-base defines them.

    An entry weighs the largest relu(logit) of its occurrences; `unweighted` ids weigh nothing.
    """
    weights = np.zeros(size, np.float32)
    np.maximum.at(weights, ids, logits)
    weights[list(unweighted)] = 0
    return weights


def weights_of_query(ids: Sequence[int], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return weights [V]: the stored weight of each entry that `ids` contain, however often."""
    found = np.zeros_like(weights)
    present = np.unique(np.asarray(ids, dtype=np.int64))
    found[present] = weights[present]
    return found


def unweighted_ids(tokenizer: "TextTokenizer", pad_token_id: int | None = None) -> tuple[int, ...]:
    """Ids that a token-weights head gives no weight: those put around a text (cls, sep or eos), pad and unk.

    The rule is gte-multilingual-base's own (`_process_token_weights` of its scripts/gte_embedding.py). [MASK] and added
    words keep their weights.
    """
    template = tokenizer.template
    around = (*template.prefix, *template.suffix, *template.middle, *template.pair_suffix)
    others = (tokenizer.pad_token_id, tokenizer.unknown_token_id, pad_token_id)
    return tuple(sorted({*around, *(token for token in others if token is not None)}))


def entry_names(tokenizer: "TextTokenizer", spec: ModelSpec) -> Callable[[int], str]:
    """A function that names the entries of the vocabulary as the model's own library does.

    With token weights, the name is the decoded token, as in gte-multilingual-base's dictionaries. Otherwise it is the
    vocabulary's entry, as from SparseEncoder.decode. An id that only pads the vocabulary is called "[ID]".
    """
    decodes = spec.head_task == "token-classify"

    def name(token_id: int) -> str:
        token = tokenizer.id_to_token(token_id)
        if token is None:
            return f"[{token_id}]"
        return tokenizer.decode([token_id]) if decodes else token

    return name


@dataclass(frozen=True)
class SparseForm:
    """The form that `encode_sparse` returns: vectors, torch tensors, or dictionaries.

    Args:
        tensor: whether tensors are returned.
        one_tensor: whether all texts are one tensor, or a list of one for each.
        sparse_tensor: whether tensors are sparse or dense.
        as_dict: whether dictionaries are returned.
    """

    tensor: bool
    one_tensor: bool
    sparse_tensor: bool
    as_dict: bool

    @classmethod
    def of(
        cls,
        convert_to_tensor: bool | None,
        convert_to_sparse_tensor: bool | None,
        as_dict: bool | None,
        *,
        by_default: bool,
    ) -> "SparseForm":
        """Read the arguments of `encode_sparse`; `by_default` says whether dictionaries are the form if none is.

        Raises:
            InputError: one of them is no flag.
        """
        check_flags(
            convert_to_tensor=convert_to_tensor, convert_to_sparse_tensor=convert_to_sparse_tensor, as_dict=as_dict
        )
        tensor = bool(convert_to_tensor) or convert_to_sparse_tensor is not None
        return cls(
            tensor=tensor,
            one_tensor=convert_to_tensor is not False,
            sparse_tensor=convert_to_sparse_tensor is not False,
            as_dict=(by_default and not tensor) if as_dict is None else bool(as_dict),
        )

    def check(self) -> None:
        """Refuse an unsupported form, before any work.

        Raises:
            InputError: both tensors and dictionaries are requested.
            MissingDependencyError: tensors are requested and torch is not installed.
        """
        if self.tensor and self.as_dict:
            raise InputError("tensors and as_dict are different forms; ask for one of them")
        if self.tensor:
            import_torch()

    def assemble(self, embeddings: Sequence[SparseEmbedding], names: Names, *, single: bool) -> Any:
        """Return all texts, in the caller's order, in the requested form."""
        if self.tensor:
            whole = as_tensors(embeddings, sparse=self.sparse_tensor)
            whole = whole if self.one_tensor else list(whole)
        else:
            whole = [embedding.as_dict(names) for embedding in embeddings] if self.as_dict else list(embeddings)
        return whole[0] if single else whole


def as_tensors(embeddings: Sequence[SparseEmbedding], *, sparse: bool) -> Any:
    """One torch tensor [N, V] float32: sparse COO, or dense.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    torch = import_torch()
    if not sparse:
        return torch.from_numpy(np.stack([embedding.to_dense() for embedding in embeddings]))
    rows = np.repeat(np.arange(len(embeddings)), [len(embedding) for embedding in embeddings])
    places = np.stack([rows, np.concatenate([embedding.indices for embedding in embeddings])])
    values = np.concatenate([embedding.values for embedding in embeddings])
    size = (len(embeddings), embeddings[0].size)
    return torch.sparse_coo_tensor(
        torch.from_numpy(places), torch.from_numpy(values), size, check_invariants=False, is_coalesced=True
    )


def as_embeddings(embeddings: Any) -> tuple[list[SparseEmbedding], bool]:
    """Read vectors in any form that `encode_sparse` gives, or arrays and tensors [V] or [N, V].

    Returns:
        The vectors, and whether a single one was given.

    Raises:
        InputError: another form.
    """
    if isinstance(embeddings, SparseEmbedding):
        return [embeddings], True
    if isinstance(embeddings, list | tuple) and all(isinstance(each, SparseEmbedding) for each in embeddings):
        return list(embeddings), False
    array: Any = embeddings
    if hasattr(array, "to_dense"):  # a torch tensor
        array = array.detach().to_dense().cpu().numpy()
    if isinstance(array, np.ndarray) and array.ndim in (1, 2) and array.dtype.kind == "f":
        return [sparsify(row) for row in np.atleast_2d(array)], array.ndim == 1
    raise InputError(
        "embeddings must be what encode_sparse gives, or an array or tensor of floats [V] or [N, V], not "
        f"{type(embeddings).__name__}"
    )


def to_tensors(embeddings: Sequence[SparseEmbedding], name: Callable[[int], str]) -> dict[str, NDArray[Any]]:
    """Convert vectors to the tensors of `SERVED`: `TOKENS` [B, 1] counts entries, others are [B, K], heaviest first.

    `name` gives the name of an entry.
    """
    rows = [embedding.ordered() for embedding in embeddings]
    width = max(1, *map(len, rows))
    return {
        "TOKENS": np.array([[len(row)] for row in rows], dtype=np.int32),
        "TOKEN": filled([[name(token).encode() for token, _ in row] for row in rows], width, b"", np.object_),
        "TOKEN_ID": filled([[token for token, _ in row] for row in rows], width, -1, np.int64),
        "WEIGHT": filled([[weight for _, weight in row] for row in rows], width, 0.0, np.float32),
    }


def from_tensors(tensors: Tensors, size: int, names: dict[int, str]) -> list[SparseEmbedding]:
    """Return the vectors that `to_tensors` converted, with `size` entries each; `names` receives the entry names."""
    return [_embedding_of(tensors, row, size, names) for row in range(len(tensors["TOKENS"]))]


def _embedding_of(tensors: Tensors, row: int, size: int, names: dict[int, str]) -> SparseEmbedding:
    count = int(tensors["TOKENS"][row, 0])
    ids = tensors["TOKEN_ID"][row, :count]
    names.update((token, name.decode()) for token, name in zip(ids.tolist(), tensors["TOKEN"][row], strict=False))
    order = np.argsort(ids)
    return SparseEmbedding(ids[order], tensors["WEIGHT"][row, :count][order], size)


def _suits(spec: ModelSpec) -> bool:
    """A hybrid model and a token classifier with one label give the weights of tokens, too."""
    return spec.task in ("sparse", "hybrid") or (spec.task == "token-classify" and spec.num_labels == 1)


SPARSE = Task(
    name="sparse",
    outputs=(_POOLED, HIDDEN),
    request=SparseRequest,
    method="encode_sparse",
    ensembles=(SERVED, QUERIES_SERVED),
    similarity="dot",
    library=Library("SparseEncoder", "fill-mask", "logits", "token_embeddings"),
    suits=_suits,
)
