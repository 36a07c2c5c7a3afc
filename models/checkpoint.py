"""Weights of the GTE-v1.5 family: strict load from either layout into transformers' Gte classes, and save in either.

Names without prefix are the common ground: `new.` and `gte.` are dropped on reading. Every stored tensor is consumed
and every parameter filled, or nothing is returned. Only safetensors is read: nothing here unpickles.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GteConfig, GteModel, PreTrainedModel

from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.files import write_text, write_with
from gte_deploy.core.spec import Task
from gte_deploy.models.adapters import merge_adapter, places_of
from gte_deploy.models.config import (
    native_config,
    original_config,
    read_config,
    task_of_files,
    task_of_tensors,
)
from gte_deploy.models.dense import load_dense
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.modules import read_settings
from gte_deploy.models.weight_files import INDEX, weight_files
from gte_deploy.tasks import TASKS

logger = logging.getLogger(__name__)

MODEL_CLASSES: dict[Task, type[PreTrainedModel]] = {
    name: getattr(transformers, f"Gte{task.architecture}")
    for name, task in TASKS.items()
    if task.architecture is not None
}
"""Task -> its class, for the tasks that have a head of their own."""
LAYOUTS = ("native", "original")

# Whichever of these a checkpoint has; tokenizer.json is the one that everything here reads.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)

_EMBEDDING = "embeddings.word_embeddings.weight"
_DECODER = "lm_head.decoder.weight"
_MAX_NAMED = 10

# (original, native), as parts of a name without prefix.
_RENAMES = (
    ("encoder.layer.", "layers."),
    (".attention.", ".self_attn."),
    (".attn_ln.", ".post_attention_layernorm."),
    (".mlp_ln.", ".post_mlp_layernorm."),
    ("lm_head.norm.", "lm_head.layer_norm."),
)
# Native name of a packed matrix -> the native modules that take its rows, in order. Up stands before gate.
_PACKED = {
    ".self_attn.qkv_proj.": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
    ".mlp.up_gate_proj.": (".mlp.up_proj.", ".mlp.gate_proj."),
}
# Buffers that older versions stored and that the config determines.
_DERIVED = re.compile(r"(^|\.)(position_ids|rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached))$")


def load_model(
    folder: str | Path,
    *,
    task: Task | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load a checkpoint of either layout into transformers' own module, in eval mode on the CPU.

    Args:
        folder: a local checkpoint (see `resolve_checkpoint`).
        task: which head: "fill-mask" (GteForMaskedLM), "embed" (GteModel), "classify" (GteForSequenceClassification),
            "token-classify" (GteForTokenClassification), "sparse" (that of fill-mask or token-classify, whichever is
            stored). None takes what the checkpoint was made for. "embed" leaves out a stored masked-LM or token head,
            and logs it.
        dtype: of the parameters; stored ones are cast. RoPE frequencies stay float32.
        attn_implementation: a name known to transformers' AttentionInterface.

    An adapter in the folder is merged, for which peft is needed. Dense modules after the pooling of an embedding model
    become its submodule `sentence_projection`.

    Raises:
        ConfigError: config.json asks for what the model cannot honour.
        CheckpointError: a file is missing or damaged, or a tensor is missing, left over or misshapen; it is named.
    """
    files = CheckpointFiles(folder)
    places = places_of(files)
    task = task or task_of_files(files, places)
    if task == "sparse":
        task = task_of_tensors(places.weights)
    if task not in MODEL_CLASSES:
        raise CheckpointError(f"task is {task!r}; expected one of {', '.join(MODEL_CLASSES)}")
    settings = read_settings(files, task)
    config = read_config(places.config, settings.config_overrides)
    model = _load_weights(places.weights, config, task, dtype)
    if places.adapter is not None:
        model = merge_adapter(model, places.adapter)
    if settings.dense:
        model.sentence_projection = load_dense(files.path, settings.dense, width=config.hidden_size, dtype=dtype)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.set_attn_implementation(attn_implementation)
    return model.eval()


def _load_weights(folder: Path, config: GteConfig, task: Task, dtype: torch.dtype) -> PreTrainedModel:
    with ExitStack() as stack:
        stored = _open_tensors(folder, stack)
        if task == "embed":
            stored = _without_head(stored, folder)
        with_pooler = any(_bare(name).startswith("pooler.") for name in stored)
        model = _model_without_weights(config, task, with_pooler=with_pooler)
        state = _read_state(stored, model, folder, dtype)
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
    """Write config.json and safetensors in the "native" or the "original" layout; load and save round-trip bitwise.

    Every file is written aside, synced and renamed. config.json is removed first and written last, so that an
    interrupted save is refused on loading, never mixed with what was there before.

    Args:
        model: one of the classes `load_model` returns.
        folder: made if it does not exist; other files in it, such as the tokenizer's, stay.
        layout: "native" loads with transformers alone; "original" is what text-embeddings-inference and the published
            remote code read.
        dtype: of the stored tensors; None keeps the model's.
        max_shard_size: bytes, or a string such as "2GB", above which the weights are split; None never splits.

    Raises:
        CheckpointError: another class of model, or another layout.
    """
    folder = Path(folder)
    task: Task | None = next((task for task, cls in MODEL_CLASSES.items() if type(model) is cls), None)
    if task is None or layout not in LAYOUTS:
        expected = ", ".join(cls.__name__ for cls in MODEL_CLASSES.values())
        raise CheckpointError(
            f"cannot save a {type(model).__name__} in layout {layout!r}; expected one of {expected} "
            f"in layout {' or '.join(LAYOUTS)}"
        )
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items() if name != _DECODER}
    to_config = native_config
    if layout == "original":
        state, to_config = _original_state(state, prefix="" if task == "embed" else "new."), original_config
    stored_dtype = str(dtype or model.dtype).removeprefix("torch.")
    assert isinstance(model.config, GteConfig)  # as all of MODEL_CLASSES have
    config = to_config(model.config, task=task, dtype=stored_dtype)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    _write_weights(state, folder, max_shard_size)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(source: str | Path, destination: str | Path) -> list[Path]:
    """Copy the tokenizer files of a checkpoint beside another's weights; returns the copies.

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


@dataclass(frozen=True)
class _Stored:
    """One tensor in a safetensors file, unread until `read`."""

    handle: Any
    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        try:
            return self.handle.get_tensor(self.name)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be read ({error}). Copy the file again.") from error


@dataclass
class _Problems:
    """What does not fit, collected over the whole checkpoint, so that one run tells all of it."""

    lists: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, names: Iterable[str]) -> None:
        self.lists.setdefault(kind, []).extend(names)

    def raise_if_any(self, folder: Path, model: nn.Module) -> None:
        parts = []
        for kind, names in self.lists.items():
            if names:
                more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:_MAX_NAMED])}{more}")
        if parts:
            raise CheckpointError(
                f"the tensors in {folder} are not those of {type(model).__name__} as its config.json describes it. "
                + "; ".join(parts)
            )


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, _Stored]:
    """Every tensor of the folder by its stored name; files stay open until `stack` closes."""
    stored: dict[str, _Stored] = {}
    for file, expected in weight_files(folder).items():
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            names = list(handle.keys())
            slices = {name: handle.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file ({error}). Copy it again.") from error
        if expected is not None and set(names) != expected:
            odd = sorted(set(names) ^ expected)
            raise CheckpointError(f"{file} does not hold what {INDEX} says: {', '.join(odd[:_MAX_NAMED])}")
        for name, part in slices.items():
            stored[name] = _Stored(handle, name, file, tuple(part.get_shape()), part.get_dtype())
    return stored


def _bare(name: str) -> str:
    return re.sub(r"^(new|gte)\.", "", name)


def _targets(name: str) -> tuple[str, ...]:
    """Native names without prefix that the rows of one stored tensor fill, in order."""
    name = _bare(name)
    for original, native in _RENAMES:
        name = name.replace(original, native)
    for packed, parts in _PACKED.items():
        if packed in name:
            return tuple(name.replace(packed, part) for part in parts)
    return (name,)


def _original_name(name: str) -> str:
    """The original tensor, packed, that holds the rows of a native one; both without prefix."""
    for packed, parts in _PACKED.items():
        for part in parts:
            name = name.replace(part, packed)
    for original, native in _RENAMES:
        name = name.replace(native, original)
    return name


def _without_head(stored: dict[str, _Stored], folder: Path) -> dict[str, _Stored]:
    """Leave out a masked-LM head, or a token classifier; a pooler shows a sequence classifier, which stays an error."""
    names = [name for name in stored if name.startswith("lm_head.")]
    if not any(_bare(name).startswith("pooler.") for name in stored):
        names += [name for name in stored if name.startswith("classifier.")]
    if names:
        logger.info("%s: the encoder alone is loaded; left out: %s", folder, ", ".join(sorted(names)))
    return {name: tensor for name, tensor in stored.items() if name not in names}


def _model_without_weights(config: GteConfig, task: Task, *, with_pooler: bool) -> PreTrainedModel:
    """The module with parameters on the meta device: initialising them takes 20 s for the large model, for nothing."""
    with torch.device("meta"):
        model = GteModel(config, add_pooling_layer=with_pooler) if task == "embed" else MODEL_CLASSES[task](config)
    # RoPE frequencies are buffers outside the state dict: made on the meta device they would never get values.
    encoder: Any = model.base_model
    encoder.rotary_emb = type(encoder.rotary_emb)(config)
    return model


def _read_state(stored: Mapping[str, _Stored], model: nn.Module, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A complete state dict for `model`. Raises CheckpointError before reading any data if names or shapes differ."""
    wanted = {_bare(name): name for name in model.state_dict()}
    shapes = {_bare(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = wanted.pop(_DECODER, None)
    plan, decoder = _plan(stored, wanted, shapes, has_decoder=tied is not None, problems=(problems := _Problems()))
    problems.raise_if_any(folder, model)

    state: dict[str, Tensor] = {}
    for source, targets in plan:
        tensor = source.read()
        if decoder is not None and targets == (_EMBEDDING,) and not torch.equal(tensor, decoder.read()):
            raise CheckpointError(
                f"{decoder.file}: {decoder.name} differs from {source.name}; the model ties them, and loading one "
                "of the two would change its predictions"
            )
        # A copy, because safetensors maps the file: a file shortened later would kill the process.
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            state[wanted[target]] = part.to(dtype, copy=True)
    if tied is not None:
        state[tied] = state[wanted[_EMBEDDING]]
    return state


def _plan(
    stored: Mapping[str, _Stored],
    wanted: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    has_decoder: bool,
    problems: _Problems,
) -> tuple[list[tuple[_Stored, tuple[str, ...]]], _Stored | None]:
    """Which stored tensor fills which parameters, and the stored tied decoder if there is one."""
    plan: list[tuple[_Stored, tuple[str, ...]]] = []
    decoder = None
    filled: set[str] = set()
    for name, tensor in stored.items():
        targets = _targets(name)
        if _DERIVED.search(name):
            continue
        if has_decoder and targets == (_DECODER,):
            decoder = tensor
        elif not all(target in wanted for target in targets):
            problems.add("unexpected", [name])
            continue
        elif filled.intersection(targets):
            problems.add("stored twice", [name])
        else:
            filled.update(targets)
            plan.append((tensor, targets))
        expected = (len(targets) * shapes[targets[0]][0], *shapes[targets[0]][1:])
        if tensor.shape != expected:
            problems.add("misshapen", [f"{name} is {list(tensor.shape)}, expected {list(expected)}"])
        if tensor.dtype not in ("F16", "BF16", "F32", "F64"):
            problems.add("of an unknown precision", [f"{name} is {tensor.dtype}"])
    problems.add("missing", dict.fromkeys(_missing_name(name) for name in wanted if name not in filled))
    return plan, decoder


def _missing_name(native: str) -> str:
    original = _original_name(native)
    return native if original == native else f"{native} ({original} in the original layout)"


def _require_materialised(model: nn.Module) -> None:
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise CheckpointError(f"this version of transformers adds {', '.join(left)}, which no checkpoint fills")


def _original_state(state: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    bare = {_bare(name): tensor for name, tensor in state.items()}
    packed: dict[str, Tensor] = {}
    for name in dict.fromkeys(_original_name(name) for name in bare):
        parts = [bare[target] for target in _targets(name)]
        head = name.startswith(("lm_head.", "classifier."))
        packed[name if head else prefix + name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return packed


def _write_weights(state: Mapping[str, Tensor], folder: Path, max_shard_size: int | str | None) -> None:
    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size or 1 << 62)
    for name, members in split.filename_to_tensors.items():
        tensors = {member: state[member].contiguous() for member in members}
        write_with(folder / name, partial(_save_tensors, tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    # Weights of an earlier save in the same folder would be read instead of these.
    kept = {*split.filename_to_tensors, *([INDEX] if split.is_sharded else [])}
    for file in folder.glob("model*.safetensors*"):
        if file.name not in kept:
            file.unlink()


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file(dict(tensors), file, metadata={"format": "pt"})
