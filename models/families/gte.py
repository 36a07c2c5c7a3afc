"""The GTE-v1.5 family: config.json in the original ("new") or the native ("gte") layout, tensor names, fusion sites.

A field that the model cannot honour is refused by name, so the model computes every config that is read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import TaskName
from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.fields import TRANSFORMERS_FIELDS, FileFields, fixed, honoured, ignored
from gte_deploy.models.presets import USAGE_FIELDS, preset
from gte_deploy.models.reading import (
    SIZES,
    Reader,
    encoder_fields,
    label_fields,
    require_rotated_heads,
    without_warnings_of_types,
)
from gte_deploy.models.rope import (
    LONGROPE_FIELDS,
    NTK_MIXED,
    head_size,
    longrope,
    ntk_of_linear,
    ntk_rope,
    register_rope,
    rope_parameters,
)
from gte_deploy.tasks import TASKS

if TYPE_CHECKING:
    from transformers import GteConfig

# The defaults of the original implementation for fields that config.json lacks. Sizes, token types and the RoPE base
# have no default here: with a wrong guess the model would run and give wrong answers.
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
# Task -> the part of its architecture that follows "New" or "Gte".
_ARCHITECTURES: dict[TaskName, str] = {
    name: task.architecture for name, task in TASKS.items() if task.architecture is not None
}

_COMMON_FIELDS = (
    *SIZES,
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

_SIZE = honoured("It is checked against the shapes of the tensors.")

FIELDS = FileFields(
    name="config.json of GTE-v1.5",
    reads='The same rules apply to both layouts, `model_type` "new" and "gte".',
    fields={
        "model_type": honoured('"new" is the original layout, "gte" is transformers\' own; another is refused.'),
        **TRANSFORMERS_FIELDS,
        "num_attention_heads": _SIZE,
        "type_vocab_size": honoured("0 means no token types; with 2 or more the model gets those of the tokenizer."),
        "max_position_embeddings": honoured("No text may have more tokens."),
        "rope_theta": honoured("Base of the rotary embedding."),
        "rope_scaling": honoured("null, default, ntk (with mixed_b), and linear in the native layout; else refused."),
        "rope_parameters": honoured("Has rope_theta and rope_scaling in the form of transformers 5, in both layouts."),
        "hidden_act": fixed("Only the exact GELU is computed.", "gelu"),
        "layer_norm_type": fixed("Only LayerNorm is computed.", "layer_norm"),
        "position_embedding_type": fixed("Only rotary positions are computed.", "rope"),
        "logn_attention_scale": fixed("Scores are not scaled by the logarithm of the length.", False),
        "partial_rotary_factor": fixed("The whole head is rotated.", 1, 1.0),
        "head_dim": honoured("It must be hidden_size over num_attention_heads; else it is refused."),
        "logn_attention_clip1": ignored("It belongs to logn_attention_scale, which is refused."),
        "pack_qkv": ignored("The names of the tensors show it."),
        "unpad_inputs": ignored("It changes the speed."),
        "use_memory_efficient_attention": ignored("It changes the speed."),
    },
    unknown="ignored",
)


def read_config(raw: Mapping[str, Any], file: Path) -> GteConfig:
    """Make the config of either layout from the contents of `file`.

    Raises:
        ConfigError: a field is missing, malformed or not supported by the model; the message names it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import GteConfig

    is_original = raw["model_type"] == "new"
    native = {f.name: f.default for f in dataclasses.fields(GteConfig)}
    reader = Reader(raw, file, _ORIGINAL_DEFAULTS if is_original else native)
    rope = _rope(reader, default_theta=None if is_original else GteConfig.default_theta)
    register_rope()
    fields = {**_common_fields(reader), **label_fields(reader), "rope_parameters": rope}
    try:
        with without_warnings_of_types():
            return GteConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: transformers' GteConfig refuses it: {error}") from error


def preset_config(name: str) -> GteConfig:
    """The GteConfig of a preset, for a model to be trained from scratch."""
    from transformers import GteConfig

    fields = dict(preset(name))
    architecture = GTE.classes[fields["task"]]
    config: dict[str, Any] = {key: value for key, value in fields.items() if key not in USAGE_FIELDS}
    config |= {"rope_parameters": dict(config["rope_parameters"]), "architectures": [architecture]}
    register_rope()
    with without_warnings_of_types():
        return GteConfig(**config)


def original_config(config: GteConfig, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json in the original layout; `read_config` of it gives `config` again.

    Raises:
        ConfigError: the RoPE type has no spelling in the original layout.
    """
    suffix = _ARCHITECTURES[task]
    remote = f"{_REMOTE_CODE}modeling.New"
    fields: dict[str, Any] = {
        "architectures": [f"New{suffix}"],
        "auto_map": {
            "AutoConfig": f"{_REMOTE_CODE}configuration.NewConfig",
            **{f"AutoModel{known.removeprefix('Model')}": remote + known for known in _ARCHITECTURES.values()},
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
    # transformers gives every config two nameless labels; without a classifier they have no meaning.
    if suffix.endswith("Classification") or config.num_labels != 2:
        fields["num_labels"] = config.num_labels
        fields["id2label"] = {str(index): label for index, label in (config.id2label or {}).items()}
        fields["label2id"] = dict(config.label2id or {})
    return fields


def native_config(config: GteConfig, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json in the native layout, readable by transformers alone.

    A mixed_b RoPE is written as "longrope" whose short and long factors are both our divisors: the same function
    under a type that transformers knows. `read_config` turns it back, because longrope inspects the positions at
    every forward pass, which a traced graph must not.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] == NTK_MIXED:
        rope = longrope(rope, head_size(config), config.max_position_embeddings)
    return {
        **json.loads(config.to_json_string()),
        "architectures": [GTE.classes[task]],
        "dtype": dtype,
        "rope_parameters": rope,
    }


def _common_fields(reader: Reader) -> dict[str, Any]:
    require_rotated_heads(reader)
    architectures = _native_architectures(reader.raw.get("architectures"))
    return {**encoder_fields(reader, fewest_types=0), "architectures": architectures}


def _native_architectures(names: Any) -> list[str] | None:
    return [re.sub("^New", "Gte", str(name)) for name in names] if isinstance(names, list) else None


def _rope(reader: Reader, *, default_theta: float | None) -> dict[str, Any]:
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


def _outer_theta(reader: Reader, default: float | None) -> Any:
    return reader.get("rope_theta") if default is None else reader.raw.get("rope_theta", default)


def _rope_of(reader: Reader, key: str, rope: Any, default_theta: float | None) -> dict[str, Any]:
    if not isinstance(rope, dict):
        raise reader.refuse(key, rope, 'null or an object such as {"type": "ntk", "factor": …}')
    kind = rope.get("rope_type", rope.get("type", None if reader.raw["model_type"] == "new" else "default"))
    if rope.get("type", kind) != kind:
        raise reader.refuse(key, rope, "a type and a rope_type that agree")
    # The original layout's implementation has no linear scaling.
    linear = () if reader.raw["model_type"] == "new" else ("linear",)
    mixed = kind in (NTK_MIXED, "longrope") and {"factor", "mixed_b"} <= set(rope)
    if kind not in ("default", "ntk", *linear) and not mixed:
        raise reader.refuse(key, rope, f"a type of {', '.join(('default', 'ntk', *linear))}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    known |= set() if kind == "default" else {"factor"}
    known |= {"mixed_b"} if mixed or kind == "ntk" else set()
    unknown = sorted(set(rope) - known - (set(LONGROPE_FIELDS) if mixed else set()))
    if unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise reader.refuse(key, rope, f"no field {', '.join(unknown) or 'partial_rotary_factor other than 1'}")
    inner = Reader(rope, reader.file, {"rope_theta": default_theta})
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


def _theta(reader: Reader, value: Any) -> float:
    return float(Reader({"rope_theta": value}, reader.file, {}).number("rope_theta", at_least=1.0))


def _check_longrope(reader: Reader, rope: Mapping[str, Any], fields: Mapping[str, float]) -> None:
    head_dim = reader.integer("hidden_size", at_least=1) // reader.integer("num_attention_heads", at_least=1)
    expected = longrope({**rope, **fields}, head_dim, 0)
    for key in LONGROPE_FIELDS[:3]:
        if rope.get(key) != expected[key]:
            raise reader.refuse(f"rope_parameters.{key}", rope.get(key), "what factor and mixed_b give")


def _original_rope_fields(config: GteConfig) -> dict[str, Any]:
    rope = rope_parameters(config)
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind == NTK_MIXED:
        scaling = {"type": "ntk", "factor": rope["factor"], "mixed_b": rope["mixed_b"]}
        return {"rope_theta": theta, "rope_scaling": scaling}
    if kind == "linear":
        theta, factor = ntk_of_linear(theta, rope["factor"], head_size(config))
        return {"rope_theta": theta, "rope_scaling": {"type": "ntk", "factor": factor}}
    raise ConfigError(f"rope_type {kind!r} has no spelling in the original layout; it knows default and ntk")


def _sites(config: GteConfig) -> dict[str, int]:
    layers = config.num_hidden_layers
    each = dict.fromkeys(("attention", "projections", "qkv", "up_gate", "glu", "flash", "packed_attention"), layers)
    return {"rope": 2 * layers, **each, "skip_layer_norm": 2 * layers}


GTE = Family(
    model_types=("gte", "new"),
    fields=FIELDS,
    read_config=read_config,
    native_config=native_config,
    original_config=original_config,
    classes={task: f"Gte{suffix}" for task, suffix in _ARCHITECTURES.items()},
    architecture_prefixes=("New", "Gte"),
    heads={"fill-mask": "lm_head", "classify": "classifier", "token-classify": "classifier"},
    positions="rotary",
    position_module="rotary_emb",
    sites=_sites,
    tensors=TensorNames(
        prefixes=("new.", "gte."),
        original_prefix="new.",
        renames=(
            ("encoder.layer.", "layers."),
            (".attention.", ".self_attn."),
            (".attn_ln.", ".post_attention_layernorm."),
            (".mlp_ln.", ".post_mlp_layernorm."),
            ("lm_head.norm.", "lm_head.layer_norm."),
        ),
        merged={
            ".self_attn.qkv_proj.": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
            ".mlp.up_gate_proj.": (".mlp.up_proj.", ".mlp.gate_proj."),  # up stands before gate
        },
        tied={"lm_head.decoder.weight": "embeddings.word_embeddings.weight"},
        # Older versions stored them.
        derived=re.compile(r"(^|\.)(position_ids|rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached))$"),
    ),
)
