"""config.json of the GTE-v1.5 family, in the original ("new") or the native ("gte") layout, as transformers' GteConfig.

A field that the model cannot honour is refused by name, so the model computes every config that is read.
Legend: theta = RoPE base, s = NTK factor, d = head size, b = mixed_b, i = 0 … d/2 - 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.core.spec import Task
from gte_deploy.models.adapters import Places, places_of
from gte_deploy.models.fields import CONFIG, check_fields
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.presets import USAGE_FIELDS, preset
from gte_deploy.models.sparse_modules import is_sparse_encoder
from gte_deploy.models.weight_files import tensor_names, weight_files
from gte_deploy.tasks import TASKS

if TYPE_CHECKING:
    import torch
    from transformers import GteConfig

# The name under which our RoPE is registered with transformers (see `register_rope`).
NTK_MIXED = "ntk_mixed"

# What the original implementation assumes where its config.json is silent. Sizes, token types and the RoPE base have
# no default here: a wrong guess would give a model that runs and is wrong.
_ORIGINAL_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": None,
    "classifier_dropout": None,
}
_REMOTE_CODE = "Alibaba-NLP/new-impl--"


def task_of(folder: str | Path) -> Task:
    """The task a checkpoint was made for, one of gte_deploy.core.spec.TASKS. Needs no torch.

    A SparseEncoder's modules make it "sparse", where they can be honoured. A sentence-transformers Pooling module
    (modules.json) makes it "embed" whatever head is stored beside the encoder (gte-multilingual-base stores a
    token-weight head); else `architectures` decides, and where that is missing the names of the tensors.

    Raises:
        CheckpointError: the folder holds no checkpoint.
        ConfigError: `architectures` names a head that this package does not know.
    """
    files = CheckpointFiles(folder)
    return task_of_files(files, places_of(files))


def task_of_files(files: CheckpointFiles, places: Places) -> Task:
    """The task of a checkpoint whose parts are known; see `task_of`."""
    file = places.config / "config.json"
    raw = read_json(file)
    if is_sparse_encoder(files):
        return "sparse"
    if any(module.kind == "Pooling" for module in files.modules or ()):
        return "embed"
    names = raw.get("architectures")
    if not names:
        return task_of_tensors(places.weights)
    match = re.fullmatch(r"(?:New|Gte)(\w+)", str(names[0])) if isinstance(names, list) else None
    tasks: dict[str, Task] = {task.architecture: name for name, task in TASKS.items() if task.architecture is not None}
    if match is None or match[1] not in tasks:
        known = ", ".join(f"New{suffix}" for suffix in tasks)
        raise ConfigError(f"{file}: architectures is {names!r}; this package knows {known} and Gte…")
    return tasks[match[1]]


def _architecture(task: Task) -> str:
    """What follows "New" or "Gte" in the architecture of a model for the task."""
    suffix = TASKS[task].architecture
    assert suffix is not None  # no model is made for a task without a head of its own
    return suffix


def read_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> GteConfig:
    """Read `folder`/config.json of either layout; `overrides` replace fields of it.

    Raises:
        CheckpointError: there is no config.json.
        ConfigError: a field is missing, malformed or not supported by the model; the message names it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import GteConfig

    file = Path(folder) / "config.json"
    raw = read_json(file) | dict(overrides or {})
    model_type = raw.get("model_type")
    if model_type not in ("new", "gte"):
        raise ConfigError(f'{file}: model_type is {model_type!r}; expected "new" (original layout) or "gte" (native)')
    check_fields(raw, file, CONFIG)
    native = {f.name: f.default for f in dataclasses.fields(GteConfig)}
    reader = _Reader(raw, file, _ORIGINAL_DEFAULTS if model_type == "new" else native)
    rope = _rope(reader, default_theta=None if model_type == "new" else GteConfig.default_theta)
    register_rope()
    fields = {**_common_fields(reader), **_label_fields(reader), "rope_parameters": rope}
    try:
        return GteConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: transformers' GteConfig refuses it: {error}") from error


def build_config(name: str) -> GteConfig:
    """The GteConfig of a preset, for a model to be trained from scratch."""
    from transformers import GteConfig

    fields = dict(preset(name))
    architecture = "Gte" + _architecture(fields["task"])
    config: dict[str, Any] = {key: value for key, value in fields.items() if key not in USAGE_FIELDS}
    config |= {"rope_parameters": dict(config["rope_parameters"]), "architectures": [architecture]}
    register_rope()
    return GteConfig(**config)


def original_config(config: GteConfig, *, task: Task, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json in the original layout; `read_config` of it gives `config` again.

    Raises:
        ConfigError: the RoPE type has no spelling in the original layout.
    """
    suffix = _architecture(task)
    remote = f"{_REMOTE_CODE}modeling.New"
    fields: dict[str, Any] = {
        "architectures": [f"New{suffix}"],
        "auto_map": {
            "AutoConfig": f"{_REMOTE_CODE}configuration.NewConfig",
            **{
                f"AutoModel{known.architecture.removeprefix('Model')}": remote + known.architecture
                for known in TASKS.values()
                if known.architecture is not None
            },
        },
        **{key: getattr(config, key) for key in _COMMON_FIELDS if getattr(config, key, None) is not None},
        "classifier_dropout": config.classifier_dropout,
        **_original_rope_fields(config),
        "layer_norm_type": "layer_norm",
        "position_embedding_type": "rope",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "model_type": "new",
        "pack_qkv": True,
        "torch_dtype": dtype,
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
    }
    # transformers gives every config two nameless labels; without a classifier they say nothing.
    if suffix.endswith("Classification") or config.num_labels != 2:
        fields["num_labels"] = config.num_labels
        fields["id2label"] = {str(index): label for index, label in (config.id2label or {}).items()}
        fields["label2id"] = dict(config.label2id or {})
    return fields


def native_config(config: GteConfig, *, task: Task, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json in the native layout, readable by transformers alone.

    A mixed_b RoPE is written as "longrope" whose short and long factors are both our divisors: the same function
    under a type that transformers knows. `read_config` turns it back, because longrope inspects the positions at
    every forward pass, which a traced graph must not.
    """
    rope = _rope_parameters(config)
    if rope["rope_type"] == NTK_MIXED:
        rope = _longrope(rope, _head_dim(config), config.max_position_embeddings)
    return {
        **json.loads(config.to_json_string()),
        "architectures": [f"Gte{_architecture(task)}"],
        "dtype": dtype,
        "rope_parameters": rope,
    }


def ntk_rope(*, theta: float, factor: float, head_dim: int, mixed_b: float | None = None) -> dict[str, Any]:
    """`rope_parameters` of the family's fixed NTK scaling, which holds at every length.

    Without mixed_b, inv_freq_i = (theta s)^(-2i/d) / s^(2/d): transformers' "linear" type of base theta s and factor
    s^(2/d). With it, inv_freq_i = theta^(-2i/d) / exp(a (i+1)^b), a = ln(s) / (d/2)^b, which has a type of our own.
    """
    if mixed_b is None:
        return {"rope_type": "linear", "rope_theta": float(theta * factor), "factor": factor ** (2 / head_dim)}
    return {"rope_type": NTK_MIXED, "rope_theta": float(theta), "factor": float(factor), "mixed_b": float(mixed_b)}


def register_rope() -> None:
    """Make the RoPE with mixed_b known to transformers, through the table it offers for that; twice does no harm."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS[NTK_MIXED] = _compute_ntk_mixed


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is not there.
        ConfigError: it is not a JSON object.
    """
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); a checkpoint folder has one") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}). Copy the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Typed access to the fields of one config.json; every complaint names the file, the field and the value."""

    raw: Mapping[str, Any]
    file: Path
    defaults: Mapping[str, Any]

    def get(self, key: str) -> Any:
        if key in self.raw:
            return self.raw[key]
        if key not in self.defaults:
            raise ConfigError(f"{self.file}: {key} is missing; the architecture needs it")
        return self.defaults[key]

    def refuse(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.file}: {key} is {value!r}; expected {expected}")

    def integer(self, key: str, *, at_least: int) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise self.refuse(key, value, f"an integer of at least {at_least}")
        return value

    def number(self, key: str, *, at_least: float = 0.0, below: float = math.inf) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value < below:
            raise self.refuse(key, value, f"a number of at least {at_least} and below {below}")
        return value


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_COMMON_FIELDS = (
    *_SIZES,
    "type_vocab_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "problem_type",
)


def _common_fields(reader: _Reader) -> dict[str, Any]:
    fields: dict[str, Any] = {key: reader.integer(key, at_least=1) for key in _SIZES}
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if hidden % heads or hidden // heads % 2:
        raise reader.refuse("hidden_size", hidden, f"num_attention_heads ({heads}) times an even head size")
    fields["type_vocab_size"] = reader.integer("type_vocab_size", at_least=0)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        fields[key] = reader.number(key, below=1.0)
    if reader.get("classifier_dropout") is not None:
        fields["classifier_dropout"] = reader.number("classifier_dropout", below=1.0)
    fields["initializer_range"] = float(reader.number("initializer_range"))
    fields["layer_norm_eps"] = float(reader.number("layer_norm_eps"))
    fields["pad_token_id"] = _pad_token_id(reader, fields["vocab_size"])
    passed_on = ("bos_token_id", "eos_token_id", "problem_type")
    fields.update({key: reader.raw[key] for key in passed_on if key in reader.raw})
    if reader.raw.get("head_dim", hidden // heads) != hidden // heads:
        raise reader.refuse("head_dim", reader.raw["head_dim"], f"{hidden // heads}: hidden_size over the heads")
    return {**fields, "architectures": _native_architectures(reader.raw.get("architectures"))}


def _pad_token_id(reader: _Reader, vocab_size: int) -> int | None:
    if reader.get("pad_token_id") is None:
        return None
    value = reader.integer("pad_token_id", at_least=0)
    if value >= vocab_size:
        raise reader.refuse("pad_token_id", value, f"an id below vocab_size ({vocab_size})")
    return value


def _native_architectures(names: Any) -> list[str] | None:
    return [re.sub("^New", "Gte", str(name)) for name in names] if isinstance(names, list) else None


def _label_fields(reader: _Reader) -> dict[str, Any]:
    labels = reader.raw.get("id2label")
    fields: dict[str, Any] = {}
    if labels is not None:
        if not isinstance(labels, dict) or sorted(labels) != sorted(str(i) for i in range(len(labels))):
            raise reader.refuse("id2label", labels, "an object with the keys 0, 1, …")
        fields["id2label"] = {int(index): str(label) for index, label in labels.items()}
        fields["label2id"] = {label: index for index, label in fields["id2label"].items()}
    if "num_labels" in reader.raw:
        count = reader.integer("num_labels", at_least=1)
        if labels is not None and count != len(labels):
            raise reader.refuse("num_labels", count, f"{len(labels)}, as id2label has")
        if labels is None:
            fields["num_labels"] = count
    return fields


def _rope(reader: _Reader, *, default_theta: float | None) -> dict[str, Any]:
    """`rope_parameters` of the config, from whichever of its spellings the file has.

    The published files say `rope_theta` and `rope_scaling`; transformers 5 writes both into `rope_parameters`, also for
    a config class of remote code that it knows nothing of.
    """
    spelled = {key: reader.raw[key] for key in ("rope_scaling", "rope_parameters") if reader.raw.get(key)}
    found = [_rope_of(reader, key, value, default_theta) for key, value in spelled.items()]
    if not found:
        return {"rope_type": "default", "rope_theta": _theta(reader, _outer_theta(reader, default_theta))}
    if found[0] != found[-1]:
        raise reader.refuse("rope_scaling", spelled["rope_scaling"], "what rope_parameters says, or one of the two")
    return found[0]


def _outer_theta(reader: _Reader, default: float | None) -> Any:
    return reader.get("rope_theta") if default is None else reader.raw.get("rope_theta", default)


def _rope_of(reader: _Reader, key: str, rope: Any, default_theta: float | None) -> dict[str, Any]:
    if not isinstance(rope, dict):
        raise reader.refuse(key, rope, 'null or an object such as {"type": "ntk", "factor": …}')
    kind = rope.get("rope_type", rope.get("type", None if reader.raw["model_type"] == "new" else "default"))
    if rope.get("type", kind) != kind:
        raise reader.refuse(key, rope, "a type and a rope_type that agree")
    # The implementation that the original layout comes with computes no linear scaling.
    linear = () if reader.raw["model_type"] == "new" else ("linear",)
    mixed = kind in (NTK_MIXED, "longrope") and {"factor", "mixed_b"} <= set(rope)
    if kind not in ("default", "ntk", *linear) and not mixed:
        raise reader.refuse(key, rope, f"a type of {', '.join(('default', 'ntk', *linear))}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    known |= set() if kind == "default" else {"factor"}
    known |= {"mixed_b"} if mixed or kind == "ntk" else set()
    unknown = sorted(set(rope) - known - (set(_LONGROPE_FIELDS) if mixed else set()))
    if unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise reader.refuse(key, rope, f"no field {', '.join(unknown) or 'partial_rotary_factor other than 1'}")
    inner = _Reader(rope, reader.file, {"rope_theta": default_theta})
    theta = _theta(reader, rope["rope_theta"] if "rope_theta" in rope else _outer_theta(reader, default_theta))
    if kind == "default":
        return {"rope_type": kind, "rope_theta": theta}
    factor = inner.number("factor", at_least=1.0)
    if kind == "linear":
        return {"rope_type": kind, "rope_theta": theta, "factor": factor}
    mixed_b = inner.number("mixed_b") if rope.get("mixed_b") is not None else None
    if kind == "longrope":
        _check_longrope(reader, rope, {"factor": factor, "mixed_b": inner.number("mixed_b")})
    head_dim = reader.integer("hidden_size", at_least=1) // reader.integer("num_attention_heads", at_least=1)
    return ntk_rope(theta=theta, factor=factor, head_dim=head_dim, mixed_b=mixed_b)


def _theta(reader: _Reader, value: Any) -> float:
    return float(_Reader({"rope_theta": value}, reader.file, {}).number("rope_theta", at_least=1.0))


_LONGROPE_FIELDS = ("short_factor", "long_factor", "attention_factor", "original_max_position_embeddings")


def _longrope(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> dict[str, Any]:
    divisors = _ntk_mixed_divisors(rope["factor"], rope["mixed_b"], head_dim)
    return {
        **rope,
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": list(divisors),
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_positions,
    }


def _check_longrope(reader: _Reader, rope: Mapping[str, Any], fields: Mapping[str, float]) -> None:
    head_dim = reader.integer("hidden_size", at_least=1) // reader.integer("num_attention_heads", at_least=1)
    expected = _longrope({**rope, **fields}, head_dim, 0)
    for key in _LONGROPE_FIELDS[:3]:
        if rope.get(key) != expected[key]:
            raise reader.refuse(f"rope_parameters.{key}", rope.get(key), "what factor and mixed_b give")


def _original_rope_fields(config: GteConfig) -> dict[str, Any]:
    rope = _rope_parameters(config)
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind == NTK_MIXED:
        scaling = {"type": "ntk", "factor": rope["factor"], "mixed_b": rope["mixed_b"]}
        return {"rope_theta": theta, "rope_scaling": scaling}
    if kind == "linear":
        theta, factor = _ntk_of_linear(theta, rope["factor"], _head_dim(config))
        return {"rope_theta": theta, "rope_scaling": {"type": "ntk", "factor": factor}}
    raise ConfigError(f"rope_type {kind!r} has no spelling in the original layout; it knows default and ntk")


def _ntk_of_linear(base: float, linear_factor: float, head_dim: int) -> tuple[float, float]:
    """(theta, s) of a linear RoPE. Every linear RoPE is one: s = factor^(d/2), theta = base / s."""
    factor = linear_factor ** (head_dim / 2)
    # The power amplifies the last bit; the published factors are short decimals, so a rounded one that gives exactly
    # the same linear RoPE is the one that was meant.
    rounded = float(f"{factor:.10g}")
    theta = float(f"{base / rounded:.10g}")
    exact = ntk_rope(theta=theta, factor=rounded, head_dim=head_dim)
    if exact["rope_theta"] == base and exact["factor"] == linear_factor:
        return theta, rounded
    return base / factor, factor


def _rope_parameters(config: GteConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def _head_dim(config: GteConfig) -> int:
    return config.hidden_size // config.num_attention_heads


def _ntk_mixed_divisors(factor: float, mixed_b: float, head_dim: int) -> list[float]:
    half = head_dim // 2
    a = math.log(factor) / half**mixed_b
    return [math.exp(a * (i + 1) ** mixed_b) for i in range(half)]


def _compute_ntk_mixed(
    config: GteConfig, device: torch.device | None = None, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[torch.Tensor, float]:
    """inv_freq [d/2] float32 and the attention factor, in the signature of transformers' ROPE_INIT_FUNCTIONS."""
    import torch

    rope, head_dim = _rope_parameters(config), _head_dim(config)
    divisors = _ntk_mixed_divisors(rope["factor"], rope["mixed_b"], head_dim)
    inv_freq = [rope["rope_theta"] ** (-2 * i / head_dim) / divisor for i, divisor in enumerate(divisors)]
    return torch.tensor(inv_freq, dtype=torch.float32, device=device), 1.0


def task_of_tensors(weights: Path) -> Task:
    """The task of the head whose tensors are in the folder `weights`, whatever modules are listed beside it."""
    names = [name for file in weight_files(weights) for name in tensor_names(file)]
    if any(name.startswith("lm_head.") for name in names):
        return "fill-mask"
    if not any(name.startswith("classifier.") for name in names):
        return "embed"
    return "classify" if any("pooler." in name for name in names) else "token-classify"
