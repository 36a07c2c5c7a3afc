"""Makes a checkpoint loadable by its own library, and reads its rotation angles, without the rest of this package.

The published layouts (model_type "new"; "nomic_bert" with GPT-2's names of fields, in `nomic_source`) need remote code
in transformers, which never runs here. The weights and config.json are therefore converted a second time, by other code
than that of `models/`: an error of shared code would be on both sides of a comparison and would not show. Every other
file is a link to the checkpoint's own.

For a family without a class in transformers, the libraries run the class of this package, on weights that are converted
here (`SourceFiles.network`). They read the tokenizer, modules, prompts and limits for themselves all the same.
Legend: theta = RoPE base, s = NTK factor, d = head size, b = mixed_b, i = 0 … d/2 - 1.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.errors import CheckpointError
from gte_deploy.exporters.verification.answers.nomic_source import (
    is_published_nomic,
    loadable_tensors,
    nomic_fields,
    nomic_frequencies,
)
from gte_deploy.models.families import family_of_fields

# Fields of the original config.json that have another name in the native one, or that change no answer.
_ORIGINAL_ONLY = frozenset(
    "auto_map logn_attention_clip1 logn_attention_scale layer_norm_type model_type pack_qkv position_embedding_type "
    "rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype dtype unpad_inputs "
    "use_memory_efficient_attention architectures".split()
)
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_ADAPTER = "adapter_config.json"
_HEADS = ("lm_head.", "classifier.")
_DERIVED = ("position_ids", "inv_freq", "cos_cached", "sin_cached")
_SPLIT = {
    "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
}
_RENAMED = {
    "encoder.layer.": "layers.",
    "attention.": "self_attn.",
    "attn_ln.": "post_attention_layernorm.",
    "mlp_ln.": "post_mlp_layernorm.",
}


@dataclass(frozen=True)
class SourceFiles:
    """The content of a checkpoint's JSON files, as its own library reads them.

    Args:
        checkpoint: the checkpoint's folder.
        model: the folder of config.json and the tokenizer: the checkpoint's folder, or that of the first module that
            sentence-transformers lists.
        config: the content of config.json; {} if there is none.
        tokenizer_arguments: the arguments that the library passes to AutoTokenizer besides the folder.
        lowercases: whether the library lower-cases texts, whatever the tokenizer does.
    """

    checkpoint: Path
    model: Path
    config: Mapping[str, Any]
    tokenizer_arguments: Mapping[str, Any]
    lowercases: bool

    @property
    def is_original(self) -> bool:
        """Whether config.json is in the layout that transformers reads only with remote code."""
        return self.config.get("model_type") == "new" or is_published_nomic(self.config)

    @property
    def network(self) -> str | None:
        """The `model_type` of the network of this package that stands in for remote code, or None."""
        if not self.config:
            return None
        family = family_of_fields(self.config, self.model)
        return None if family.module == "transformers" else family.model_types[0]

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter changes the weights."""
        return (self.model / _ADAPTER).is_file()


def read_source(checkpoint: Path, *, by_sentence_transformers: bool) -> SourceFiles:
    """Read the files of a checkpoint.

    Args:
        checkpoint: a folder of either layout.
        by_sentence_transformers: whether sentence-transformers is the library that loads the checkpoint.

    Raises:
        CheckpointError: a file cannot be read.
    """
    model, modules = checkpoint, checkpoint / "modules.json"
    if not any((checkpoint / name).is_file() for name in ("config.json", _ADAPTER)) and modules.is_file():
        model = checkpoint / str((_load(modules) or [{}])[0].get("path", ""))
    settings: dict[str, Any] = {}
    if by_sentence_transformers and modules.is_file():
        settings = _read_if_there(model / "sentence_bert_config.json")
    arguments = {**(settings.get("tokenizer_args") or {}), **(settings.get("processor_kwargs") or {})}
    return SourceFiles(
        checkpoint=checkpoint,
        model=model,
        config=_read_if_there(model / "config.json"),
        tokenizer_arguments={name: value for name, value in arguments.items() if name != "trust_remote_code"},
        lowercases=settings.get("do_lower_case") is True,
    )


@contextlib.contextmanager
def loadable(source: SourceFiles, *, tokenizer_class: str, pad_token_id: int | None, pooling: str) -> Iterator[Path]:
    """Yield the folder that the libraries load: the checkpoint, or a temporary folder in its place.

    Args:
        source: the checkpoint.
        tokenizer_class: the class that AutoTokenizer chose for the checkpoint. The temporary folder names this class if
            the checkpoint names none: for another `model_type`, AutoTokenizer could choose another class.
        pad_token_id: the tokenizer's padding id, for a config.json without one.
        pooling: "mean" or "cls" in place of the checkpoint's own, or "auto".

    Raises:
        CheckpointError: a file of the checkpoint cannot be converted.
    """
    checkpoint, original, network = source.checkpoint, source.is_original, source.network
    is_converted = original or network is not None
    if not is_converted and pooling == "auto":
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="gte-source-") as folder:
        view = Path(folder)
        _link(checkpoint, view, without=("config.json", *_WEIGHTS) if is_converted else ())
        if is_converted:
            native = native_fields(source.config, pad_token_id) if network is None else _fields_for(network, source)
            (view / "config.json").write_text(json.dumps(native))
            convert = _native_tensors if network is None else _tensors_of_network
            if is_published_nomic(source.config):
                convert = loadable_tensors
            _convert_weights(_weight_files(checkpoint), view, convert)
            _name_tokenizer(view, tokenizer_class)
        if pooling != "auto":
            _set_pooling(view, pooling)
        yield view


def native_fields(raw: Mapping[str, Any], pad_token_id: int | None = None) -> dict[str, Any]:
    """Return the native config.json that is equivalent to the original one, `raw`."""
    if is_published_nomic(raw):
        return nomic_fields(raw, pad_token_id)
    fields = {key: value for key, value in raw.items() if key not in _ORIGINAL_ONLY}
    if fields.get("pad_token_id") is None:
        fields["pad_token_id"] = pad_token_id
    names = [str(name) for name in raw.get("architectures") or []]
    if names:
        fields["architectures"] = ["Gte" + name.removeprefix("New") for name in names]
    return {"layer_norm_eps": 1e-12, **fields, "model_type": "gte", "rope_parameters": _rope_parameters(raw)}


def rotation_frequencies(raw: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return inv_freq [d/2] of an original config.json, from the formulas of the family's paper and code.

    Raises:
        CheckpointError: config.json has a scaling that the family does not have.
    """
    if is_published_nomic(raw):
        return nomic_frequencies(raw)
    theta, scaling = _theta_and_scaling(raw)
    head = _head_size(raw)
    i = np.arange(head // 2, dtype=np.float64)
    if scaling is None:
        return theta ** (-2 * i / head)
    factor, mixed_b = scaling
    if mixed_b is None:
        return (theta * factor) ** (-2 * i / head) / factor ** (2 / head)
    return theta ** (-2 * i / head) / np.exp(math.log(factor) / (head / 2) ** mixed_b * (i + 1) ** mixed_b)


def _theta_and_scaling(raw: Mapping[str, Any]) -> tuple[float, tuple[float, float | None] | None]:
    """Return the base theta and, if there is NTK scaling, (s, b).

    transformers 5 moves both fields into `rope_parameters` whenever it saves a config.
    """
    fields = {**(raw.get("rope_parameters") or {}), **(raw.get("rope_scaling") or {})}
    theta = fields.get("rope_theta", raw.get("rope_theta"))
    kind = fields.get("type") or fields.get("rope_type") or "default"
    if not isinstance(theta, int | float) or kind not in ("default", "ntk"):
        raise CheckpointError(f"config.json has rope_theta {theta!r} and RoPE type {kind!r}; expected default or ntk")
    if kind == "default":
        return float(theta), None
    mixed_b = fields.get("mixed_b")
    return float(theta), (float(fields["factor"]), None if mixed_b is None else float(mixed_b))


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    theta, scaling = _theta_and_scaling(raw)
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    factor, mixed_b = scaling
    head = _head_size(raw)
    if mixed_b is None:
        return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head)}
    # The only RoPE type of transformers with a divisor for each frequency.
    plain = theta ** (-2 * np.arange(head // 2) / head)
    divisors = (plain / rotation_frequencies(raw)).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": raw["max_position_embeddings"],
    }


def _head_size(raw: Mapping[str, Any]) -> int:
    return int(raw["hidden_size"]) // int(raw["num_attention_heads"])


def _link(source: Path, view: Path, *, without: Sequence[str]) -> None:
    for path in source.iterdir():
        if not any(path.match(pattern) for pattern in without):
            _link_or_copy(path.resolve(), view / path.name)


def _link_or_copy(target: Path, link: Path) -> None:
    try:
        os.symlink(target, link)
    except OSError:  # Windows allows links to administrators and developers alone
        (shutil.copytree if target.is_dir() else shutil.copy2)(target, link)


def _weight_files(checkpoint: Path) -> list[Path]:
    if (checkpoint / "model.safetensors").exists():
        return [checkpoint / "model.safetensors"]
    index = _read(checkpoint / "model.safetensors.index.json")
    return [checkpoint / name for name in sorted(set(index["weight_map"].values()))]


def _convert_weights(files: list[Path], view: Path, convert: Callable[[str, Any], dict[str, Any]]) -> None:
    """Write each file with the native names; tensors are views of the mapped file, so none is in memory twice."""
    from safetensors import safe_open

    from gte_deploy.models.stored_tensors import save_tensors

    file_of: dict[str, str] = {}
    for number, file in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, Any] = {}
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - not a mapping
                tensors.update(convert(key, stored.get_tensor(key)))
            save_tensors(tensors, view / name)
        file_of.update(dict.fromkeys(tensors, name))
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": file_of}
        (view / "model.safetensors.index.json").write_text(json.dumps(index))


def _native_tensors(key: str, tensor: Any) -> dict[str, Any]:
    name = key.removeprefix("new.")
    if name.endswith(_DERIVED) or name == "lm_head.decoder.weight":  # the last is tied to the word embedding
        return {}
    if name.startswith(_HEADS):
        return {name.replace("lm_head.norm.", "lm_head.layer_norm."): tensor}
    for merged, parts in _SPLIT.items():
        if merged in name:
            names = [_native_name(name.replace(merged, part)) for part in parts]
            return dict(zip(names, tensor.chunk(len(parts)), strict=True))
    return {_native_name(name): tensor}


def _fields_for(network: str, source: SourceFiles) -> dict[str, Any]:
    """Return config.json for a network of this package, whose classes the libraries then find."""
    from gte_deploy.models.networks.alibi_bert import register_with_transformers

    register_with_transformers()
    fields = {key: value for key, value in source.config.items() if key not in ("architectures", "auto_map")}
    if fields.get("alibi_starting_size", 0) > fields.get("max_position_embeddings", 512):
        fields["max_position_embeddings"] = fields["alibi_starting_size"]  # its own code takes texts of both lengths
    return {**fields, "model_type": network}


def _tensors_of_network(key: str, tensor: Any) -> dict[str, Any]:
    """MosaicBERT has queries, keys and values in one matrix, and the bias of the vocabulary in the decoder alone."""
    if key.endswith(_DERIVED) or key == "cls.predictions.decoder.weight":  # the last is tied to the word embedding
        return {}
    if ".Wqkv." in key:
        names = [key.replace("Wqkv", part) for part in ("query", "key", "value")]
        return dict(zip(names, tensor.chunk(3), strict=True))
    return {key.replace("predictions.decoder.bias", "predictions.bias"): tensor}


def _native_name(name: str) -> str:
    for original, native in _RENAMED.items():
        name = name.replace(original, native)
    # "self_attn." contains "attn." but not "attention.", so no name is converted twice.
    return f"gte.{name}"


def _name_tokenizer(view: Path, tokenizer_class: str) -> None:
    file = view / "tokenizer_config.json"
    config = _read(file) if file.exists() else {}
    if "tokenizer_class" not in config:
        file.unlink(missing_ok=True)  # a link to the checkpoint's
        file.write_text(json.dumps({**config, "tokenizer_class": tokenizer_class}))


def _set_pooling(view: Path, pooling: str) -> None:
    """Set the pooling of the export in every Pooling module."""
    modules = json.loads((view / "modules.json").read_bytes()) if (view / "modules.json").exists() else []
    for module in modules:
        if not str(module["type"]).endswith(".Pooling"):
            continue
        file = view / module["path"] / "config.json"
        config = {key: value for key, value in _read(file).items() if not key.startswith("pooling_mode")}
        config |= {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
        _own_copy(view / Path(module["path"]).parts[0])
        file.write_text(json.dumps(config))


def _own_copy(link: Path) -> None:
    """Replace a link to a folder by a copy, so that nothing is written into the checkpoint."""
    if link.is_symlink():
        target = link.resolve()
        link.unlink()
        shutil.copytree(target, link)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error


def _read_if_there(file: Path) -> dict[str, Any]:
    return _read(file) if file.is_file() else {}


def _read(file: Path) -> dict[str, Any]:
    value = _load(file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value
