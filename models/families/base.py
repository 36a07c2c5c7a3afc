"""A family: the facts about one architecture that loading, tracing and fusing need.

Each file of this package describes one family; `FAMILIES` in `__init__.py` lists them. A module of a family imports
neither torch nor transformers at its top, because a checkpoint can be described without them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gte_deploy.core.spec import Pooling, TaskName
from gte_deploy.models.fields import FileFields
from gte_deploy.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Positions = Literal["rotary", "absolute", "alibi"]
"""How a model knows the order of tokens.

"rotary": queries and keys are rotated. "absolute": a table has an embedding of each place, so that the number of places
is a size of the weights. "alibi": scores are biased by the distance of two tokens. No attention without padding
computes these biases, so models of a family with "alibi" run padded.
"""

_POOLER = "pooler."


class WriteConfig(Protocol):
    """Writes a config as the fields of config.json in one layout."""

    def __call__(self, config: Any, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
        """Write the fields.

        Args:
            config: config of the model.
            task: task of the head.
            dtype: type of the stored tensors, such as "float32".

        Raises:
            ConfigError: the layout cannot express the config.
        """
        ...


@dataclass(frozen=True)
class TensorNames:
    """How the tensors of a checkpoint are named.

    A bare name is a name without the prefix of the encoder. The native layout is that of transformers. A family may
    have an original layout as well, with other names and with matrices that hold the rows of several native ones.

    Args:
        prefixes: prefixes of the encoder's tensors, which reading drops.
        original_prefix: the one of them that the original layout writes.
        renames: pairs (original, native) of parts of bare names, applied in order.
        merged: part of a merged tensor's native name -> the parts that name its rows' modules, in order.
        tied: bare native name of a tensor -> the bare native name of the tensor that it shares. A checkpoint may leave
            the first out; where it has both, they must be equal.
        zeros: bare native names of biases that the original layout lacks: where a checkpoint stores none of them, they
            are zero.
        derived: pattern of tensors that some checkpoints store and that the config determines; None for none.
    """

    prefixes: tuple[str, ...] = ()
    original_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    derived: re.Pattern[str] | None = None

    def bare(self, name: str) -> str:
        """The name without the encoder's prefix."""
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        return name.removeprefix(prefix)

    def targets(self, name: str) -> tuple[str, ...]:
        """Bare native names of the tensors that the rows of one stored tensor fill, in order."""
        name = self.bare(name)
        for original, native in self.renames:
            name = name.replace(original, native)
        for merged, parts in self.merged.items():
            if merged in name:
                return tuple(name.replace(merged, part) for part in parts)
        return (name,)

    def original(self, name: str) -> str:
        """The bare original name of the tensor that holds the rows of a bare native one."""
        for merged, parts in self.merged.items():
            for part in parts:
                name = name.replace(part, merged)
        for original, native in self.renames:
            name = name.replace(native, original)
        return name

    def has_zeros(self, bare: Collection[str]) -> bool:
        """Return whether none of these bare native names is a bias of `zeros`, so that the biases are zero."""
        return not {*self.zeros, *(name for name, source in self.tied.items() if source in self.zeros)} & set(bare)

    def is_derived(self, name: str) -> bool:
        """Return whether the config determines the tensor, so that loading ignores a stored one."""
        return self.derived is not None and self.derived.search(name) is not None


@dataclass(frozen=True)
class Family:
    """One architecture, as transformers implements it.

    Args:
        model_types: values of `model_type` in config.json, one for each layout.
        fields: table of the fields of config.json: which are honoured, and which are refused.
        read_config: makes the config of transformers from the contents of config.json and the file's path, which
            errors name. It raises a ConfigError for a field that is missing, malformed or not supported.
        native_config: writes config.json in the layout that transformers reads alone.
        original_config: writes config.json in the family's own layout; None where there is no such layout.
        classes: task -> name of the class in `module`. A family does the tasks that stand here.
        module: path of the module that has the classes: transformers, or one of this package.
        architecture_prefixes: what stands before the task's part (`Task.architecture`) in the `architectures` of
            config.json, such as "Gte" in "GteForMaskedLM"; one for each layout.
        heads: task -> path of the module that turns hidden states into the task's logits, in the class of the task.
        classifier_dense: path of a linear layer that stands before the head for classify, where the class has one of
            its own: the head reads tanh of its output for the first token. None where the head reads the encoder's
            pooler, or `head_transform`.
        head_transform: path of the module that stands before the head of every task, with the same tensors: it makes
            what the head reads of the hidden states of a token or, for classify, of a text. None where there is none.
        classifier_pooling: makes of a config how classify pools hidden states.
        other_architectures: names in `architectures` besides those of `classes` -> the task that is loaded.
        left_out: task -> prefixes of bare names of tensors that checkpoints of the task may hold, and that its class
            does not have. Loading leaves them out.
        tensors: names of tensors.
        positions: how the model knows the order of tokens.
        counts_after_padding: whether the first token has the position pad_token_id + 1, as in RoBERTa; else it has 0.
        claims: whether the contents of a config.json are of this family, although `model_type` is that of another (see
            `SHARED_TYPES`). None where the family publishes under its own alone.
        pooling_field: the field of config.json that names the pooling of an embedding model. Where it has a value, a
            checkpoint in the class for fill-mask is an embedding model. None where the family has no such field.
        position_module: attribute of the encoder whose module computes the cosines and sines of rotary positions; the
            trace puts tables in its place. None where there is no such module.
        sites: makes of a config: name of a fusion pass -> how often it must fire on a graph of the model. A pass that
            does not stand there must not fire at all.
    """

    model_types: tuple[str, ...]
    fields: FileFields
    read_config: Callable[[Mapping[str, Any], Path], PreTrainedConfig]
    native_config: WriteConfig
    classes: Mapping[TaskName, str]
    architecture_prefixes: tuple[str, ...]
    heads: Mapping[TaskName, str]
    positions: Positions
    sites: Callable[[Any], Mapping[str, int]]
    module: str = "transformers"
    claims: Callable[[Mapping[str, Any]], bool] | None = None
    pooling_field: str | None = None
    position_module: str | None = None
    classifier_dense: str | None = None
    head_transform: str | None = None
    classifier_pooling: Callable[[Any], Pooling] = lambda config: "cls"
    counts_after_padding: bool = False
    other_architectures: Mapping[str, TaskName] = field(default_factory=dict)
    left_out: Mapping[TaskName, tuple[str, ...]] = field(default_factory=dict)
    tensors: TensorNames = TensorNames()
    original_config: WriteConfig | None = None

    @property
    def runs_packed(self) -> bool:
        """Whether PyTorch can run its models on the tokens of all rows in one sequence, without padding."""
        return self.positions != "alibi"

    @property
    def hub_config(self) -> WriteConfig:
        """Writes config.json of a bundle, in the layout that other libraries know.

        That is the native one, which transformers and text-embeddings-inference read without remote code, or the
        published one where transformers has no class.
        """
        if self.module != "transformers" and self.original_config is not None:
            return self.original_config
        return self.native_config

    @property
    def architectures(self) -> dict[str, TaskName]:
        """Name in `architectures` of config.json -> the task of its head."""
        own: dict[str, TaskName] = {
            prefix + task.architecture: name
            for prefix in self.architecture_prefixes
            for name, task in TASKS.items()
            if task.architecture is not None
        }
        return {**own, **self.other_architectures}

    def first_position(self, config: PreTrainedConfig) -> int:
        """The position of the first token of a text."""
        return int(config.pad_token_id) + 1 if self.counts_after_padding else 0

    def max_tokens(self, config: PreTrainedConfig) -> int:
        """The longest text in tokens."""
        return int(config.max_position_embeddings) - self.first_position(config)

    def model_class(self, task: TaskName) -> type[PreTrainedModel]:
        """The class for a task of `classes`."""
        found: type[PreTrainedModel] = getattr(importlib.import_module(self.module), self.classes[task])
        return found

    def head_prefixes(self, task: TaskName) -> tuple[str, ...]:
        """What the stored names of the tensors of a task's head begin with."""
        paths = (self.heads.get(task), self.head_transform)
        return tuple(f"{path}." for path in paths if path is not None)

    def has_head(self, names: Iterable[str], task: TaskName) -> bool:
        """Whether tensors of the task's head are among these stored names."""
        return task in self.heads and any(name.startswith(f"{self.heads[task]}.") for name in names)

    def classifier_task(self, names: Collection[str]) -> TaskName | None:
        """The task of a stored classifier, "classify" or "token-classify"; None where these names fit both.

        A classifier of texts has a layer of its own (`classifier_dense`), or reads the pooler. Checkpoints of token
        classifiers may hold a pooler as well (`left_out`), that of the pretrained model. With `head_transform` the
        tensors of both are the same.
        """
        if self.head_transform is not None:
            return None
        if self.classifier_dense is not None:
            return "classify" if self.has_head(names, "classify") else "token-classify"
        if not any(self.tensors.bare(name).startswith(_POOLER) for name in names):
            return "token-classify"
        return None if _POOLER in self.left_out.get("token-classify", ()) else "classify"
