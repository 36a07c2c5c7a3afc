"""Loads weights strictly, from any layout of a family into the classes of transformers, and saves them in each layout.

The layouts share the bare names, without the encoder's prefix; the family's `TensorNames` lists them. Loading uses
every stored tensor and fills every parameter, or fails. It reads only safetensors and never unpickles.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Set
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.files import write_text, write_with
from gte_deploy.core.spec import TaskName, head_task
from gte_deploy.models.adapters import Places, merge_adapter, places_of
from gte_deploy.models.config import read_config, task_of_files, task_of_tensors
from gte_deploy.models.dense import INNER_WEIGHT, load_dense
from gte_deploy.models.description import Description
from gte_deploy.models.families import family_of
from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.modules import SentenceSettings, read_settings
from gte_deploy.models.stored_tensors import MAX_NAMED, StoredTensor, open_tensors, save_tensors
from gte_deploy.models.weight_files import INDEX
from gte_deploy.tasks import TASKS

CHECKPOINT_LAYOUTS: tuple[str, ...] = ("native", "original")
"""The layouts that `save_model` writes; a family may lack the original one."""

logger = logging.getLogger(__name__)

# The files of a tokenizer: tokenizer.json is required, and a checkpoint may have any of the other files.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)

_ENCODER: TaskName = "embed"  # the task whose class is the encoder alone


def load_model(
    folder: str | Path,
    *,
    task: TaskName | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load a checkpoint of any layout into the class of transformers, in eval mode on the CPU.

    Args:
        folder: a local checkpoint (see `resolve_checkpoint`).
        task: task that decides the head, such as "fill-mask" (for GTE, GteForMaskedLM); see `Family.classes`. "sparse"
            takes the stored head, of fill-mask or of token-classify. None takes the task that the checkpoint was
            trained for. Known tensors of another task are left out and logged: for "embed" a masked-LM or token head.
        dtype: dtype of the parameters; stored tensors are cast. RoPE frequencies stay float32.
        attn_implementation: a name in transformers' AttentionInterface.

    An adapter in the folder is merged, which needs peft. An embedding model's Dense modules after the pooling become
    the submodule `sentence_projection`, and those of a multi-vector model `token_projection`.

    Raises:
        ConfigError: config.json has a setting that the model does not support.
        CheckpointError: a file is missing or damaged, or a tensor is missing, unused or misshapen; the message names
            it.
    """
    if task is not None and task not in TASKS:
        raise CheckpointError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    files = CheckpointFiles(folder)
    places = places_of(files)
    task = task or task_of_files(files, places)
    settings = read_settings(files, task)
    config = read_config(places.config, settings.config_overrides)
    task = task_of_tensors(places) if task == "sparse" else head_task(task, None)
    return _load(files, places, settings, config, task, dtype, attn_implementation)


def load_described(checkpoint: Description, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the weights of a checkpoint from its description; see `load_model`.

    Args:
        checkpoint: the description, whose task decides the head.
        dtype: dtype of the parameters; stored tensors are cast. RoPE frequencies stay float32.

    Raises:
        CheckpointError: as in `load_model`.
    """
    config = deepcopy(checkpoint.config)  # the model changes its config
    task = checkpoint.spec.head_task
    return _load(checkpoint.files, checkpoint.places, checkpoint.settings, config, task, dtype, "sdpa")


def _load(
    files: CheckpointFiles,
    places: Places,
    settings: SentenceSettings,
    config: PreTrainedConfig,
    task: TaskName,
    dtype: torch.dtype,
    attn_implementation: str,
) -> PreTrainedModel:
    classes = family_of(config).classes
    if task not in classes:
        raise CheckpointError(f"task is {task!r}; expected one of {', '.join(classes)}")
    left_out = {INNER_WEIGHT} if any(not module.path for module in settings.dense) else set()
    model = _load_weights(places, config, task, dtype, left_out)
    if places.adapter is not None:
        model = merge_adapter(model, places.adapter)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    if settings.dense:
        name = "sentence_projection" if settings.multi_vector is None else "token_projection"
        files_of_weights = places.weight_files
        dense = load_dense(
            files.path, settings.dense, width=config.hidden_size, dtype=dtype, weight_files=files_of_weights
        )
        setattr(model, name, dense)
    model.set_attn_implementation(attn_implementation)
    return model.eval()


def _load_weights(
    places: Places, config: PreTrainedConfig, task: TaskName, dtype: torch.dtype, left_out: Set[str]
) -> PreTrainedModel:
    """Load the weights of the class of transformers; `left_out` are names of tensors that belong to other modules."""
    family, folder = family_of(config), places.weights
    with ExitStack() as stack:
        stored = open_tensors(places.weight_files, stack)
        stored = {name: tensor for name, tensor in stored.items() if name not in left_out}
        stored = _without_others(stored, folder, family, task)
        model = _model_without_weights(config, task, with_pooler=_has_pooler(stored, family.tensors))
        state = _read_state(stored, model, folder, dtype, family.tensors)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    _require_materialised(model)
    return model


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    layout: str,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write config.json and safetensors in one layout of the family; load and save round-trip bitwise.

    Every file is written to a temporary name, synced and renamed. config.json is removed first and written last, so
    that loading refuses an interrupted save and never mixes it with an older one.

    Args:
        model: one of the classes `load_model` returns.
        folder: created if it does not exist; other files in it, such as the tokenizer's, stay.
        layout: "native" loads with transformers alone; "original", if the family has it, is the layout that
            text-embeddings-inference and the published remote code read.
        dtype: dtype of the stored tensors; None keeps the model's.
        max_shard_size: bytes, or a string such as "2GB", above which the weights are split; None never splits.

    Raises:
        ConfigError: no family has the model's type.
        CheckpointError: the model is of another class, the family lacks the layout, the layout has no tensor for a
            bias of the model, or a file cannot be written.
    """
    folder = Path(folder)
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(f"cannot save a {type(model).__name__}; expected a model that load_model returns")
    family = family_of(model.config)
    task: TaskName | None = next((task for task in family.classes if type(model) is family.model_class(task)), None)
    layouts = dict(zip(CHECKPOINT_LAYOUTS, (family.native_config, family.original_config), strict=True))
    write_config = layouts.get(layout)
    if task is None or write_config is None:
        known = " or ".join(name for name, write in layouts.items() if write is not None)
        raise CheckpointError(
            f"cannot save a {type(model).__name__} in layout {layout!r}; expected one of "
            f"{', '.join(family.classes.values())} in layout {known}"
        )
    names = family.tensors
    state = {
        name: tensor.detach().to("cpu", dtype)
        for name, tensor in model.state_dict().items()
        if names.bare(name) not in names.tied
    }
    if layout == "original":
        state = _original_state(state, family, has_prefix=task != _ENCODER)
    config = write_config(model.config, task=task, dtype=str(dtype or model.dtype).removeprefix("torch."))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    _write_weights(state, folder, max_shard_size)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(source: str | Path, destination: str | Path) -> list[Path]:
    """Copy a checkpoint's tokenizer files to another folder; return the copies.

    Raises:
        CheckpointError: `source` has no tokenizer.json.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{source} has no tokenizer.json. Write one with transformers' AutoTokenizer.save_pretrained."
        )
    destination.mkdir(parents=True, exist_ok=True)
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        write_with(destination / name, partial(shutil.copyfile, source / name))
    return [destination / name for name in names]


@dataclass
class _Problems:
    """The mismatches of a whole checkpoint, collected so that one error names all of them."""

    lists: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, names: Iterable[str]) -> None:
        self.lists.setdefault(kind, []).extend(names)

    def raise_if_any(self, folder: Path, model: nn.Module) -> None:
        parts = []
        for kind, names in self.lists.items():
            if names:
                more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:MAX_NAMED])}{more}")
        if parts:
            raise CheckpointError(
                f"the tensors in {folder} are not those of {type(model).__name__} as its config.json describes it. "
                + "; ".join(parts)
            )


def _without_others(
    stored: dict[str, StoredTensor], folder: Path, family: Family, task: TaskName
) -> dict[str, StoredTensor]:
    """Leave out what belongs to another task: see `Family.left_out`.

    The encoder alone leaves out a masked-LM head or a token classifier; a classifier of texts stays an error.
    """
    prefixes = family.left_out.get(task, ())
    if task == _ENCODER:
        tasks: tuple[TaskName, ...] = ("fill-mask",)
        tasks += ("token-classify",) if family.classifier_task(stored) == "token-classify" else ()
        prefixes = tuple(prefix for other in tasks for prefix in family.head_prefixes(other))
    names = [name for name in stored if family.tensors.bare(name).startswith(prefixes)]
    if names:
        logger.info("%s: left out, because the task %s has none: %s", folder, task, ", ".join(sorted(names)))
    return {name: tensor for name, tensor in stored.items() if name not in names}


def _has_pooler(stored: Iterable[str], names: TensorNames) -> bool:
    return any(names.bare(name).startswith("pooler.") for name in stored)


def _model_without_weights(config: PreTrainedConfig, task: TaskName, *, with_pooler: bool) -> PreTrainedModel:
    """Create the module with parameters on the meta device: initialising the large model would waste 20 s."""
    family = family_of(config)
    made = family.model_class(task)
    may_pool = task == _ENCODER and "add_pooling_layer" in inspect.signature(made).parameters
    with torch.device("meta"):
        model = made(config, **({"add_pooling_layer": with_pooler} if may_pool else {}))
    _compute_buffers(model, config)
    return model


def _compute_buffers(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give values to the buffers outside the state dict: positions and frequencies, which modules make of the config.

    Only modules of the encoder that take the config alone have such buffers.
    """
    # Such a module may hold the embeddings as well. It is made beside a vocabulary of a few rows.
    small = deepcopy(config)
    small.vocab_size = (config.pad_token_id or 0) + 1
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            made: Any = type(module)
            for name, values in made(small).named_buffers(recurse=False):
                module.register_buffer(name, values, persistent=False)


def rotary_module(config: PreTrainedConfig) -> Any:
    """Create the encoder's rotary module for `config`; the family must have rotary positions."""
    name = family_of(config).position_module
    assert name is not None  # a family with rotary positions has one
    return getattr(_model_without_weights(config, _ENCODER, with_pooler=False).base_model, name)


def _read_state(
    stored: Mapping[str, StoredTensor], model: nn.Module, folder: Path, dtype: torch.dtype, names: TensorNames
) -> dict[str, Tensor]:
    """Read a complete state dict for `model`. Raises CheckpointError before reading data if names or shapes differ."""
    wanted = {names.bare(name): name for name in model.state_dict()}
    shapes = {names.bare(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = _Problems()
    plan, copies = _plan(stored, shapes, names, problems)
    problems.raise_if_any(folder, model)

    state: dict[str, Tensor] = {}
    for source, targets in plan:
        tensor = source.read()
        for copy in (copy for name, copy in copies.items() if targets == (names.tied[name],)):
            if not torch.equal(tensor, copy.read()):
                raise CheckpointError(
                    f"{copy.file}: {copy.name} differs from {source.name}; the model ties them, and loading one "
                    "of the two would change its predictions"
                )
        # A copy, because safetensors maps the file: if the file were shortened later, the process would be killed.
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            state[wanted[target]] = part.to(dtype, copy=True)
    for name in names.zeros:
        if name in wanted and wanted[name] not in state:
            state[wanted[name]] = torch.zeros(shapes[name], dtype=dtype)
    for name in names.tied:
        if name in wanted:
            state[wanted[name]] = state[wanted[names.tied[name]]]
    return state


def _plan(
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    names: TensorNames,
    problems: _Problems,
) -> tuple[list[tuple[StoredTensor, tuple[str, ...]]], dict[str, StoredTensor]]:
    """Map each stored tensor to the parameters that it fills; return this plan and the copies of tied parameters.

    Args:
        stored: tensors by their stored names.
        shapes: shapes of the model's parameters by their bare names.
        names: names of the family's tensors.
        problems: collects the mismatches.
    """
    plan: list[tuple[StoredTensor, tuple[str, ...]]] = []
    copies: dict[str, StoredTensor] = {}
    filled: set[str] = set()
    for name, tensor in stored.items():
        targets = names.targets(name)
        if names.is_derived(name):
            continue
        if not all(target in shapes for target in targets):
            problems.add("unexpected", [name])
            continue
        if filled.intersection(targets):
            problems.add("stored twice", [name])
        elif targets[0] in names.tied:
            copies[targets[0]] = tensor
        else:
            plan.append((tensor, targets))
        filled.update(targets)
        expected = (len(targets) * shapes[targets[0]][0], *shapes[targets[0]][1:])
        if tensor.shape != expected:
            problems.add("misshapen", [f"{name} is {list(tensor.shape)}, expected {list(expected)}"])
        if tensor.dtype not in ("F16", "BF16", "F32", "F64"):
            problems.add("of an unknown precision", [f"{name} is {tensor.dtype}"])
    left = {*names.tied, *(names.zeros if names.has_zeros(filled) else ())}
    missing = (name for name in shapes if name not in filled and name not in left)
    problems.add("missing", dict.fromkeys(_missing_name(name, names) for name in missing))
    return plan, copies


def _missing_name(native: str, names: TensorNames) -> str:
    original = names.original(native)
    return native if original == native else f"{native} ({original} in the original layout)"


def _require_materialised(model: nn.Module) -> None:
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise CheckpointError(f"this version of transformers adds {', '.join(left)}, which no checkpoint fills")


def _original_state(state: Mapping[str, Tensor], family: Family, *, has_prefix: bool) -> dict[str, Tensor]:
    names = family.tensors
    prefix = names.original_prefix if has_prefix else ""
    heads = tuple(head for task in family.heads for head in family.head_prefixes(task))
    bare = {names.bare(name): tensor for name, tensor in state.items()}
    for name in names.zeros:
        if (bias := bare.pop(name, None)) is not None and bias.any():
            raise CheckpointError(
                f"{name} is not zero, and the original layout has no such tensor. Keep the native one."
            )
    merged: dict[str, Tensor] = {}
    for name in dict.fromkeys(names.original(name) for name in bare):
        parts = [bare[target] for target in names.targets(name)]
        full = name if name.startswith(heads) else prefix + name
        merged[full] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return merged


def _write_weights(state: Mapping[str, Tensor], folder: Path, max_shard_size: int | str | None) -> None:
    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size or 1 << 62)
    for name, members in split.filename_to_tensors.items():
        tensors = {member: state[member].contiguous() for member in members}
        write_with(folder / name, partial(save_tensors, tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    # Weights of an earlier save in the same folder would be read in place of the new ones.
    kept = {*split.filename_to_tensors, *([INDEX] if split.is_sharded else [])}
    for file in folder.glob("model*.safetensors*"):
        if file.name not in kept:
            file.unlink()
