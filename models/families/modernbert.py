"""The ModernBERT family: rotary positions with two bases, gated linear units, and local attention in most layers.

config.json and tensors have the one layout of transformers. Two forms of config.json are in use: the published files
name a base for each kind of attention and count the layers from one global attention to the next; transformers 5 writes
`rope_parameters` and `layer_types`. Both are read, and must agree where a file has both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import Pooling
from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.families.bert import HIDDEN_ACTIVATIONS, class_names, plain_config
from gte_deploy.models.fields import TRAINING, TRANSFORMERS_FIELDS, FileFields, fixed, honoured, ignored
from gte_deploy.models.reading import (
    SIZES,
    Reader,
    label_fields,
    pad_token_id,
    require_rotated_heads,
    without_warnings_of_types,
)

if TYPE_CHECKING:
    from transformers import ModernBertConfig, PreTrainedConfig

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""The kinds of attention in `layer_types`: to all tokens, or to those within half a window on both sides."""

# Kind of attention -> the field of the published files that has the base of its rotation.
_BASES = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}
# The published files count from one global layer to the next; transformers' class has no field for it.
_GLOBAL_EVERY = 3
_BIASES = ("norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias")
_DROPOUTS = ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
_SPEED = ignored("It changes the speed.")
_HAS_BIAS = honoured("Whether these layers have a bias, which the tensors must show.")
_ACTIVATION = honoured(f"One of {', '.join(HIDDEN_ACTIVATIONS)}; another is refused.")

MODERNBERT_FIELDS = FileFields(
    name="config.json of ModernBERT",
    reads='`model_type` "modernbert".',
    fields={
        "model_type": honoured("It names the family."),
        **TRANSFORMERS_FIELDS,
        "num_attention_heads": honoured("hidden_size must be a multiple of it, and the heads have an even size."),
        "max_position_embeddings": honoured("No text may have more tokens."),
        "norm_eps": honoured("Epsilon of every LayerNorm."),
        "layer_norm_eps": ignored("norm_eps has it; transformers does not read this one."),
        "global_attn_every_n_layers": honoured("Layers 0, n, 2n, … have global attention; the others local."),
        "layer_types": honoured("The kind of attention of each layer, in the form of transformers 5."),
        "local_attention": honoured("A token of a local layer sees this many tokens divided by 2 on both sides."),
        "sliding_window": fixed("local_attention has it."),
        "global_rope_theta": honoured("Base of the rotation in layers with global attention."),
        "local_rope_theta": honoured("Base of the rotation in layers with local attention."),
        "rope_parameters": honoured("Both bases in the form of transformers 5; other types than default are refused."),
        "rope_scaling": fixed("The angles of rotation are not scaled."),
        "hidden_activation": _ACTIVATION,
        "classifier_activation": _ACTIVATION,
        "classifier_pooling": honoured('"cls" or "mean": the states that a classifier of texts reads.'),
        **dict.fromkeys(_BIASES, _HAS_BIAS),
        "head_dim": honoured("It must be hidden_size over num_attention_heads; else it is refused."),
        "position_embedding_type": ignored('The class does not read it; the published files say "absolute".'),
        **dict.fromkeys((*_DROPOUTS, "initializer_cutoff_factor"), TRAINING),
        "sparse_prediction": ignored("It selects the tokens of which a loss is computed."),
        "sparse_pred_ignore_index": ignored("It selects the tokens of which a loss is computed."),
        **dict.fromkeys(("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"), _SPEED),
    },
    unknown="ignored",
)


def read_config(raw: Mapping[str, Any], file: Path) -> PreTrainedConfig:
    """Make the config of transformers from the contents of `file`.

    Raises:
        ConfigError: a field is missing, malformed or not supported by the model; the message names it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import ModernBertConfig

    reader = Reader(raw, file, {field.name: field.default for field in dataclasses.fields(ModernBertConfig)})
    fields = {**_common_fields(reader), **label_fields(reader), "rope_parameters": _rope_parameters(reader)}
    try:
        with without_warnings_of_types():
            return ModernBertConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: transformers' ModernBertConfig refuses it: {error}") from error


def _common_fields(reader: Reader) -> dict[str, Any]:
    fields: dict[str, Any] = {name: reader.integer(name, at_least=1) for name in SIZES}
    require_rotated_heads(reader)
    fields["local_attention"] = reader.integer("local_attention", at_least=1)
    fields["layer_types"] = _layer_types(reader, fields["num_hidden_layers"])
    fields["norm_eps"] = float(reader.number("norm_eps"))
    fields["initializer_range"] = float(reader.number("initializer_range"))
    fields["initializer_cutoff_factor"] = float(reader.number("initializer_cutoff_factor"))
    fields |= {name: reader.number(name, below=1.0) for name in _DROPOUTS}
    fields |= {name: reader.boolean(name) for name in _BIASES}
    for name in ("hidden_activation", "classifier_activation"):
        fields[name] = reader.one_of(name, HIDDEN_ACTIVATIONS)
    fields["classifier_pooling"] = reader.one_of("classifier_pooling", ("cls", "mean"))
    fields["pad_token_id"] = pad_token_id(reader, fields["vocab_size"])
    passed_on = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "problem_type", "architectures")
    return fields | {name: reader.raw[name] for name in passed_on if name in reader.raw}


def _layer_types(reader: Reader, layers: int) -> list[str]:
    """The kind of attention of each layer, from whichever of its two spellings the file has."""
    every = Reader(reader.raw, reader.file, {"global_attn_every_n_layers": _GLOBAL_EVERY})
    interval = every.integer("global_attn_every_n_layers", at_least=1)
    counted = [LOCAL if i % interval else GLOBAL for i in range(layers)]
    named = reader.get("layer_types")
    if named is None:
        return counted
    if not isinstance(named, list) or len(named) != layers or not set(named) <= {GLOBAL, LOCAL}:
        raise reader.refuse("layer_types", named, f"a list of num_hidden_layers ({layers}) times {GLOBAL} or {LOCAL}")
    if "global_attn_every_n_layers" in reader.raw and named != counted:
        raise reader.refuse("layer_types", named, f"what global_attn_every_n_layers ({interval}) says")
    return named


def _rope_parameters(reader: Reader) -> dict[str, dict[str, Any]]:
    """`rope_parameters` of the config, from whichever of its spellings the file has."""
    from transformers import ModernBertConfig

    thetas = ModernBertConfig.default_theta
    defaults = {_BASES[GLOBAL]: thetas["global"], _BASES[LOCAL]: thetas["local"]}
    known = Reader(reader.raw, reader.file, defaults)
    bases = {kind: float(known.number(name, at_least=1.0)) for kind, name in _BASES.items()}
    stored = reader.get("rope_parameters")
    for kind, rope in _checked_kinds(reader, stored).items():
        inner = Reader(rope, reader.file, {"rope_theta": bases[kind]})
        base = float(inner.number("rope_theta", at_least=1.0))
        if _BASES[kind] in reader.raw and base != bases[kind]:
            raise reader.refuse(f"rope_parameters.{kind}", rope, f"the base of {_BASES[kind]}, or one of the two")
        bases[kind] = base
    return {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}


def _checked_kinds(reader: Reader, stored: Any) -> dict[str, dict[str, Any]]:
    if stored is None:
        return {}
    if not isinstance(stored, dict) or not set(stored) <= set(_BASES):
        raise reader.refuse("rope_parameters", stored, f"an object with {GLOBAL} and {LOCAL}")
    found = {kind: rope for kind, rope in stored.items() if rope is not None}
    for kind, rope in found.items():
        is_plain = isinstance(rope, dict) and set(rope) <= {"rope_type", "rope_theta"}
        if not is_plain or rope.get("rope_type", "default") != "default":
            expected = 'rope_theta and the rope_type "default" alone: the angles are not scaled'
            raise reader.refuse(f"rope_parameters.{kind}", rope, expected)
    return found


def _sites(config: Any) -> dict[str, int]:
    """How often each fusion pass must fire; see `Family.sites`. On GPUs local layers stay as traced."""
    layers, whole = len(config.layer_types), config.layer_types.count(GLOBAL)
    gated = layers if config.hidden_activation in ("gelu", "silu", "swish") else 0
    return {
        "rope": 2 * layers,
        "local_attention": layers - whole,
        **dict.fromkeys(("attention", "projections", "qkv", "flash"), whole),
        **dict.fromkeys(("up_gate", "glu"), gated),
        "skip_layer_norm": 2 * layers,
    }


def _classifier_pooling(config: ModernBertConfig) -> Pooling:
    return config.classifier_pooling


MODERNBERT = Family(
    model_types=("modernbert",),
    fields=MODERNBERT_FIELDS,
    read_config=read_config,
    native_config=plain_config,
    classes=class_names("ModernBert"),
    architecture_prefixes=("ModernBert",),
    heads={"fill-mask": "decoder", "classify": "classifier", "token-classify": "classifier"},
    head_transform="head",
    classifier_pooling=_classifier_pooling,
    positions="rotary",
    position_module="rotary_emb",
    sites=_sites,
    tensors=TensorNames(
        prefixes=("model.",),
        tied={"decoder.weight": "embeddings.tok_embeddings.weight"},
        derived=re.compile(r"(^|\.)rotary_emb\.(\w+_)?inv_freq$"),
    ),
)
