"""The attributes of a model that users of sentence-transformers read, set and call.

`DropIn` gives `Model` and `triton.Client` what SentenceTransformer, SparseEncoder and CrossEncoder have beside their
methods for texts, so that the evaluators of that library, its utilities, and users' scripts take them instead.

Shapes: N and M embeddings, D dimensions, V vocabulary.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gte_deploy.core.options import check_choice
from gte_deploy.core.spec import LATE_INTERACTIONS, SIMILARITIES, LateInteraction, ModelSpec, Similarity
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.multi_vector import late_interaction, late_interaction_of_pairs
from gte_deploy.tasks.similarity import similarity_matrix, similarity_of_pairs, sparsity_of
from gte_deploy.text.inputs import check_integer

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing since Python 3.11

    from gte_deploy.text.model_tokenizer import ModelTokenizer


@dataclass
class ModelCardData:
    """The record of evaluations that sentence-transformers' evaluators write to.

    Args:
        base_model: the name of the model.
        evaluations: for each evaluator, by its name or description: its metrics, from the last run.
    """

    base_model: str
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Take the metrics of an evaluator, which calls this. `epoch` and `step` have no effect."""
        self.evaluations[getattr(evaluator, "name", "") or evaluator.description] = dict(metrics)


class DropIn:
    """The attributes of SentenceTransformer, SparseEncoder and CrossEncoder; set them before threads use the model."""

    spec: ModelSpec
    _name: str
    _cut_to: int | None = None
    """The number of tokens that every call cuts texts to, if it says nothing itself; None to refuse long texts."""
    _similarity_fn_name: Similarity | LateInteraction | None = None
    _card: ModelCardData | None = None

    @property
    @abstractmethod
    def tokenizer(self) -> "ModelTokenizer | None":
        """The tokenizer; None for a client that leaves the tokenisation to the server."""

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the similarity [N, M] of each of N embeddings with each of M, by the function `similarity_fn_name`.

        The larger the value, the more alike: distances are negative. The result is a float32 array. It is a torch
        tensor, as SentenceTransformer's always is, if `embeddings1` or `embeddings2` is a tensor or a list of tensors;
        that of a multi-vector model is always an array.

        Args:
            embeddings1: an array or tensor [N, D] or [D], lists of numbers, or what `encode_sparse` gives in any form
                but dictionaries. For a multi-vector model, a list of the queries' arrays or tensors [T, D], or one.
            embeddings2: likewise, [M, D] or [D]. For a multi-vector model, those of documents.

        Raises:
            InputError: the embeddings have another form, or different widths.
        """
        name: Any = self.similarity_fn_name
        compare: Any = late_interaction if name in LATE_INTERACTIONS else similarity_matrix
        return compare(embeddings1, embeddings2, name)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the similarity [N] of each embedding with the one at the same place; see `similarity`.

        Raises:
            InputError: see `similarity`; or there are not equally many embeddings.
        """
        name: Any = self.similarity_fn_name
        compare: Any = late_interaction_of_pairs if name in LATE_INTERACTIONS else similarity_of_pairs
        return compare(embeddings1, embeddings2, name)

    @property
    def similarity_fn_name(self) -> Similarity | LateInteraction:
        """The function of `similarity`: "cosine", "dot", "euclidean" or "manhattan".

        That of a multi-vector model is "maxsim" or "meanmaxsim". By default it is the checkpoint's, else "dot" for a
        sparse model, "maxsim" for a multi-vector model and "cosine" for others. It can be set, also to None for the
        default. Setting another name raises InputError.
        """
        return self._similarity_fn_name or self.spec.similarity or TASKS[self.spec.task].similarity or "cosine"

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: Similarity | LateInteraction | None) -> None:
        given: Any = getattr(name, "value", name)  # sentence-transformers' SimilarityFunction is an Enum
        known = SIMILARITIES if self.spec.multi_vector is None else LATE_INTERACTIONS
        check_choice("similarity_fn_name", given, (None, *known))
        self._similarity_fn_name = given

    @property
    def max_seq_length(self) -> int:
        """Largest number of tokens in an input, special tokens included.

        It can be set, up to `spec.max_length`. Then every call cuts longer inputs to that many tokens, as
        SentenceTransformer does, unless the call has a `max_length`. As long as it is not set, an input that is too
        long is an error. None unsets it. Setting a number out of range raises InputError.
        """
        return self.spec.max_length if self._cut_to is None else self._cut_to

    @max_seq_length.setter
    def max_seq_length(self, length: int | None) -> None:
        self._cut_to = None if length is None else check_integer("max_seq_length", length, 1, self.spec.max_length)

    def get_max_seq_length(self) -> int:
        """Return `max_seq_length`."""
        return self.max_seq_length

    def get_embedding_dimension(self) -> int:
        """Return D, the number of dimensions of an embedding from `encode`; V for a sparse model."""
        if self.spec.task == "sparse":
            return self.spec.vocab_size
        return min(self.spec.embedding_width, self.spec.truncate_dim or self.spec.embedding_width)

    def get_sentence_embedding_dimension(self) -> int:
        """Return `get_embedding_dimension()`, under its former name."""
        return self.get_embedding_dimension()

    @property
    def truncate_dim(self) -> int | None:
        """Leading dimensions that embeddings keep by default; None for all. `encode` has an argument for others."""
        return self.spec.truncate_dim

    @property
    def name(self) -> str:
        """The path that the model was loaded from, or the URL of its server."""
        return self._name

    @property
    def prompts(self) -> dict[str, str]:
        """A copy of the checkpoint's prompts: name -> text before an input."""
        return dict(self.spec.prompts)

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt of a call that names none; None if that is no prompt."""
        return self.spec.default_prompt_name

    @property
    def num_labels(self) -> int:
        """Labels of a classifier; 0 for other models."""
        return self.spec.num_labels

    @property
    def model_card_data(self) -> ModelCardData:
        """The metrics that sentence-transformers' evaluators found for this model, in memory only."""
        if self._card is None:
            self._card = ModelCardData(self._name)
        return self._card

    @staticmethod
    def sparsity(embeddings: Any) -> dict[str, float]:
        """Return the means of sparse embeddings: `active_dims`, entries with a weight; `sparsity_ratio`, the others.

        Args:
            embeddings: what `encode_sparse` gives in any form but dictionaries; see `decode`.

        Raises:
            InputError: the embeddings have another form.
        """
        return sparsity_of(embeddings)

    def eval(self) -> "Self":
        """Return the model as it is, for code that puts torch modules into evaluation mode."""
        return self

    def _settings(self) -> dict[str, Any]:
        """The attributes that the caller has set; a copy of the model gets them, too."""
        settings = {"_cut_to": self._cut_to, "_similarity_fn_name": self._similarity_fn_name}
        return {name: value for name, value in settings.items() if value is not None}
