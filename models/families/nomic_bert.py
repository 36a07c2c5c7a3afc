"""The Nomic BERT family (nomic-bert-2048, nomic-embed-text-v1 and -v1.5): config.json in two layouts, and tensor names.

The original layout is that of the published code: GPT-2's names of fields, queries, keys and values in one matrix, no
biases beside those of the LayerNorms. The native one is that of transformers. Both have the `model_type` "nomic_bert";
the names of the fields tell them apart. The published files of 2026 have both sets of names, and both must agree.

Sources: "Nomic Embed: Training a Reproducible Long Context Text Embedder" (https://arxiv.org/abs/2402.01613), and its
code in https://github.com/nomic-ai/contrastors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import TaskName
from gte_deploy.models.families.base import Family, TensorNames
from gte_deploy.models.families.bert import class_names, plain_config
from gte_deploy.models.fields import TRAINING, TRANSFORMERS_FIELDS, FileFields, fixed, honoured, ignored
from gte_deploy.models.reading import (
    Reader,
    encoder_fields,
    label_fields,
    require_rotated_heads,
    without_warnings_of_types,
)
from gte_deploy.models.rope import rope_parameters

if TYPE_CHECKING:
    from transformers import NomicBertConfig

_ACTIVATIONS: Mapping[str, str] = {"swiglu": "silu", "geglu": "gelu"}
"""`activation_function` -> `hidden_act`: the function of the gate, which the head of fill-mask applies as well."""

_BIASES = ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")

# The defaults of the published code for fields that config.json lacks. Sizes have none.
_ORIGINAL_DEFAULTS: Mapping[str, Any] = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "type_vocab_size": 2,
    "pad_vocab_size_multiple": 1,
    "pad_token_id": None,
    "classifier_dropout": None,
    "rotary_emb_base": 10_000,
    "rotary_emb_fraction": 0.0,
    "rotary_scaling_factor": None,
    "max_trained_positions": 2048,
    **dict.fromkeys(_BIASES, True),
}
_MULTIPLE_OF_INNER = 256
"""The published code rounds n_inner up to a multiple of this number."""
_POSITIONS = 2048
"""The positions of the published code where n_positions is 0 or less."""
_ORIGINAL_SIZES = ("n_embd", "n_layer", "n_head")
"""Fields that only a file with the names of the original layout has."""
_CODE = "nomic-ai/nomic-bert-2048--"
# Task -> the class of the published code.
_ORIGINAL_CLASSES: Mapping[TaskName, str] = {
    "fill-mask": "NomicBertForPreTraining",
    "embed": "NomicBertModel",
    "classify": "NomicBertForSequenceClassification",
}

_SIZE = honoured("It is checked against the shapes of the tensors.")
_SPEED = ignored("It changes the speed.")
_NOT_READ = ignored("GPT-2's; the published code does not read it.")
_EXPERTS = fixed("Mixtures of experts are not computed, such as nomic-embed-text-v2-moe.", 0)
_OF_EXPERTS = ignored("It belongs to num_experts, which is refused.")

NOMIC_BERT_FIELDS = FileFields(
    name="config.json of Nomic BERT",
    reads=(
        '`model_type` "nomic_bert". A file has the names of the original layout (GPT-2\'s, such as `n_embd`), those of '
        "transformers (`hidden_size`), or both, which must then agree."
    ),
    fields={
        "model_type": honoured("It names the family."),
        **TRANSFORMERS_FIELDS,
        "num_attention_heads": _SIZE,
        "type_vocab_size": honoured("With 2 or more the model gets the token types of the tokenizer."),
        "max_position_embeddings": honoured("No text may have more tokens, unless the file has n_positions."),
        "hidden_act": honoured("The function of the gate, silu or gelu; another is refused."),
        "rope_parameters": honoured("It has rope_theta, the base of the rotary embedding; scaling is refused."),
        "rope_theta": honoured("The base of the rotary embedding in files of older versions."),
        "rope_scaling": fixed("The rotary embedding has no scaling."),
        "head_dim": honoured("It must be hidden_size over num_attention_heads; else it is refused."),
        "n_embd": honoured("hidden_size."),
        "n_layer": honoured("num_hidden_layers."),
        "n_head": honoured("num_attention_heads."),
        "n_inner": honoured("intermediate_size, rounded up to a multiple of 256; without it, 8/3 of n_embd."),
        "n_positions": honoured("No text may have more tokens."),
        "layer_norm_epsilon": honoured("layer_norm_eps."),
        "activation_function": honoured("swiglu or geglu, whose gates are silu and gelu; another is refused."),
        "pad_vocab_size_multiple": honoured("vocab_size is rounded up to a multiple of it."),
        "rotary_emb_base": honoured("The base of the rotary embedding."),
        "rotary_emb_fraction": honoured("It must be 1: the whole head is rotated. A file without it is refused."),
        "rotary_emb_interleaved": fixed("The two halves of a head are rotated, not even and odd places.", False),
        "rotary_emb_scale_base": fixed("The rotary embedding does not decay (xPos)."),
        "rotary_head_dim": fixed("Heads are rotated by the positions of their tokens.", False),
        "rotary_scaling_factor": honoured(
            "With a factor, the frequencies of texts above max_trained_positions tokens change with the length of the "
            "text and with earlier texts. Such texts are refused; shorter ones are computed as published."
        ),
        "max_trained_positions": honoured("With rotary_scaling_factor, no text may have more tokens."),
        **dict.fromkeys(
            _BIASES, honoured("It must be false: linear layers have no bias. A file without it is refused.")
        ),
        "num_heads_kv": honoured("It must be n_head: every head has keys and values of its own."),
        "prenorm": fixed("LayerNorm comes after the residual sum.", False),
        "parallel_block": fixed("Attention comes before the MLP.", False),
        "parallel_block_tied_norm": ignored("It belongs to parallel_block, which is refused."),
        "use_rms_norm": fixed("Only LayerNorm is computed.", False),
        "norm_mlp": fixed("The MLP has no LayerNorm of its own.", False),
        "causal": fixed("Attention sees both sides.", False),
        **dict.fromkeys(("num_experts", "moe_every_n_layers"), _EXPERTS),
        **dict.fromkeys(("moe_*", "num_shared_experts", "expert_choice_router", "ffn_div"), _OF_EXPERTS),
        "add_pooling_layer": ignored("The names of the tensors show it."),
        **dict.fromkeys(("fused_bias_fc", "fused_dropout_add_ln", "use_flash_attn", "use_xentropy"), _SPEED),
        "dense_seq_output": TRAINING,
        **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), TRAINING),
        **dict.fromkeys(
            ("n_ctx", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "summary_*"),
            _NOT_READ,
        ),
    },
    unknown="ignored",
)


def _read_config(raw: Mapping[str, Any], file: Path) -> NomicBertConfig:
    """Make the config from the contents of `file` in either layout, or with the fields of both.

    Raises:
        ConfigError: a field is missing, malformed or not supported by the model, or the two layouts contradict each
            other; the message names the field.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import NomicBertConfig

    defaults = {f.name: f.default for f in dataclasses.fields(NomicBertConfig)}
    is_original = not raw.keys().isdisjoint(_ORIGINAL_SIZES)
    original = _original_fields(Reader(raw, file, _ORIGINAL_DEFAULTS)) if is_original else {}
    for name in set(original) & set(raw) - {"vocab_size", "max_position_embeddings"}:
        if raw[name] != original[name]:
            raise Reader(raw, file, {}).refuse(name, raw[name], f"{original[name]!r}, as the original layout says")
    reader = Reader({**raw, **original}, file, defaults)
    require_rotated_heads(reader)
    if (activation := reader.get("hidden_act")) not in (*_ACTIVATIONS.values(), "swish"):
        raise reader.refuse("hidden_act", activation, f"one of {', '.join(_ACTIVATIONS.values())}, the gate's function")
    fields = {**encoder_fields(reader, fewest_types=1), "hidden_act": activation, **label_fields(reader)}
    fields["pad_token_id"] = fields["pad_token_id"] or 0  # the class wants a number, and the tokenizer's replaces it
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": _theta(reader, NomicBertConfig.default_theta)}
    try:
        with without_warnings_of_types():
            return NomicBertConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: transformers' NomicBertConfig refuses it: {error}") from error


def _original_config(config: NomicBertConfig, *, task: TaskName, dtype: str = "float32") -> dict[str, Any]:
    """The fields of config.json in the original layout; reading it gives `config` again.

    Raises:
        ConfigError: the published code computes no such model.
    """
    if task not in _ORIGINAL_CLASSES:
        known = ", ".join(_ORIGINAL_CLASSES)
        raise ConfigError(f"the original layout of Nomic BERT has no class for {task}; it has those for {known}")
    if config.intermediate_size % _MULTIPLE_OF_INNER:
        raise ConfigError(
            f"intermediate_size is {config.intermediate_size}, and the original layout of Nomic BERT expresses "
            f"multiples of {_MULTIPLE_OF_INNER} alone. Keep the native layout."
        )
    activations = {native: original for original, native in _ACTIVATIONS.items()}
    fields = {
        "architectures": [_ORIGINAL_CLASSES[task]],
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_hf_nomic_bert.NomicBertConfig",
            "AutoModel": f"{_CODE}modeling_hf_nomic_bert.NomicBertModel",
            "AutoModelForMaskedLM": f"{_CODE}modeling_hf_nomic_bert.NomicBertForPreTraining",
            "AutoModelForSequenceClassification": f"{_CODE}modeling_hf_nomic_bert.NomicBertForSequenceClassification",
        },
        "model_type": "nomic_bert",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "max_trained_positions": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "activation_function": activations["silu" if config.hidden_act == "swish" else config.hidden_act],
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "resid_pdrop": config.hidden_dropout_prob,
        "embd_pdrop": config.hidden_dropout_prob,
        "attn_pdrop": config.attention_probs_dropout_prob,
        "rotary_emb_base": rope_parameters(config)["rope_theta"],
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        **dict.fromkeys(_BIASES, False),
        **dict.fromkeys(("prenorm", "parallel_block", "use_rms_norm", "causal"), False),
        "pad_vocab_size_multiple": 1,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    kept = ("pad_token_id", "bos_token_id", "eos_token_id", "classifier_dropout", "problem_type")
    fields |= {name: value for name in kept if (value := getattr(config, name, None)) is not None}
    if task == "classify" or config.num_labels != 2:
        fields["id2label"] = {str(index): label for index, label in (config.id2label or {}).items()}
        fields["label2id"] = dict(config.label2id or {})
    return fields


def _original_fields(reader: Reader) -> dict[str, Any]:
    """The fields of the original layout under the names of transformers."""
    width, heads = (reader.integer(name, at_least=1) for name in ("n_embd", "n_head"))
    if reader.get("rotary_emb_fraction") != 1:
        raise reader.refuse("rotary_emb_fraction", reader.get("rotary_emb_fraction"), "1: the whole head is rotated")
    for name in _BIASES:
        if reader.get(name) is not False:
            raise reader.refuse(name, reader.get(name), "false: linear layers have no bias")
    if reader.raw.get("num_heads_kv") not in (None, heads):
        raise reader.refuse("num_heads_kv", reader.raw["num_heads_kv"], f"{heads}, as n_head")
    if (activation := reader.get("activation_function")) not in _ACTIVATIONS:
        raise reader.refuse("activation_function", activation, f"one of {', '.join(_ACTIVATIONS)}")
    has_inner = reader.get("n_inner") is not None
    inner = reader.integer("n_inner", at_least=1) if has_inner else int(8 * width / 3)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": reader.integer("n_layer", at_least=1),
        "num_attention_heads": heads,
        "intermediate_size": _rounded_up(inner, _MULTIPLE_OF_INNER),
        "vocab_size": _rounded_up(
            reader.integer("vocab_size", at_least=1), reader.integer("pad_vocab_size_multiple", at_least=1)
        ),
        "max_position_embeddings": _limit(reader),
        "hidden_act": _ACTIVATIONS[activation],
        "layer_norm_eps": float(reader.number("layer_norm_epsilon")),
    }
    defaults = {
        "hidden_dropout_prob": reader.number("resid_pdrop", below=1.0),
        "attention_probs_dropout_prob": reader.number("attn_pdrop", below=1.0),
        "type_vocab_size": reader.get("type_vocab_size"),
    }
    return fields | {name: value for name, value in defaults.items() if name not in reader.raw}


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _limit(reader: Reader) -> int:
    """The longest text in tokens. A factor for longer texts than those of the training has no effect up to these."""
    trained = reader.integer("max_trained_positions", at_least=1)
    longest = next((key for key in ("n_positions", "max_position_embeddings") if reader.raw.get(key) is not None), None)
    limit = trained if longest is None else reader.integer(longest, at_least=-1)
    limit = limit if limit > 0 else _POSITIONS
    if reader.get("rotary_scaling_factor") is None:
        return limit
    reader.number("rotary_scaling_factor")
    return min(limit, trained)


def _theta(reader: Reader, default: float) -> float:
    """The base of the rotary embedding, from whichever of its spellings the file has."""
    rope = reader.raw.get("rope_parameters") or {}
    known = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    if not isinstance(rope, dict) or any(rope[name] != known.get(name, rope[name]) for name in rope):
        raise reader.refuse("rope_parameters", rope, 'an object such as {"rope_type": "default", "rope_theta": 1000}')
    if unknown := sorted(set(rope) - {*known, "rope_theta"}):
        raise reader.refuse("rope_parameters", rope, f"no field {', '.join(unknown)}")
    spelled = {
        "rope_parameters.rope_theta": rope.get("rope_theta"),
        "rope_theta": reader.raw.get("rope_theta"),
        "rotary_emb_base": reader.raw.get("rotary_emb_base"),
    }
    given = {name: value for name, value in spelled.items() if value is not None}
    if not given and not reader.raw.keys().isdisjoint(_ORIGINAL_SIZES):
        given = {"rotary_emb_base": _ORIGINAL_DEFAULTS["rotary_emb_base"]}
    found = [Reader({name: value}, reader.file, {}).number(name, at_least=1.0) for name, value in given.items()]
    if len(set(found)) > 1:
        raise reader.refuse(list(given)[1], found[1], f"{found[0]}, as {list(given)[0]} says, or one of the two")
    return float(found[0] if found else default)


def _sites(config: NomicBertConfig) -> dict[str, int]:
    layers = config.num_hidden_layers
    each = dict.fromkeys(("attention", "projections", "qkv", "up_gate", "glu", "flash", "packed_attention"), layers)
    return {"rope": 2 * layers, **each, "skip_layer_norm": 2 * layers}


NOMIC_BERT = Family(
    model_types=("nomic_bert",),
    fields=NOMIC_BERT_FIELDS,
    read_config=_read_config,
    native_config=plain_config,
    original_config=_original_config,
    classes=class_names("NomicBert"),
    architecture_prefixes=("NomicBert",),
    other_architectures={"NomicBertForPreTraining": "fill-mask"},
    heads={"fill-mask": "cls", "classify": "classifier", "token-classify": "classifier"},
    positions="rotary",
    position_module="rotary_emb",
    sites=_sites,
    tensors=TensorNames(
        prefixes=("nomic_bert.", "bert."),
        original_prefix="bert.",
        renames=(
            ("encoder.layers.", "layers."),
            ("emb_ln.", "embeddings.LayerNorm."),
            (".attn.out_proj.", ".self_attn.o_proj."),
            (".mlp.fc11.", ".mlp.up_proj."),
            (".mlp.fc12.", ".mlp.gate_proj."),
            (".mlp.fc2.", ".mlp.down_proj."),
            (".norm1.", ".post_attention_layernorm."),
            (".norm2.", ".post_mlp_layernorm."),
        ),
        merged={".attn.Wqkv.": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")},
        tied={
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        zeros=("cls.predictions.bias", "cls.predictions.transform.dense.bias"),
        derived=re.compile(r"(^|\.)(position_ids|token_type_ids|rotary_emb\.(original_inv_freq|inv_freq))$"),
    ),
)
