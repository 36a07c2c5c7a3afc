import json

import numpy as np
import pytest
import torch

from factories import make_checkpoint
from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.config import build_config, read_config, task_of
from gte_deploy.models.families.gte import native_config, original_config
from gte_deploy.models.presets import PRESETS

# config.json of Alibaba-NLP/gte-base-en-v1.5 as published, its auto_map left out.
PUBLISHED_BASE_EN = {
    "architectures": ["NewModel"],
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "max_position_embeddings": 8192,
    "model_type": "new",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pack_qkv": True,
    "pad_token_id": 0,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 2.0, "type": "ntk"},
    "rope_theta": 500000,
    "torch_dtype": "float32",
    "type_vocab_size": 0,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "vocab_size": 30528,
}
NATIVE = {
    **{k: PUBLISHED_BASE_EN[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{k: PUBLISHED_BASE_EN[k] for k in ("vocab_size", "intermediate_size", "pad_token_id", "type_vocab_size")},
    "model_type": "gte",
    "architectures": ["GteForMaskedLM"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 160000.0},
}


def _read(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder)


def _function_fields(config):
    fields = config.to_dict()
    return {
        key: value for key, value in fields.items() if key not in ("architectures", "dtype", "transformers_version")
    }


def test_published_config_is_the_preset(tmp_path):
    config = _read(tmp_path, PUBLISHED_BASE_EN)
    assert _function_fields(config) == _function_fields(build_config("gte-base-en-v1.5"))
    assert config.architectures == ["GteModel"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("write", [original_config, native_config])
def test_either_layout_reads_back_exactly(name, write, tmp_path):
    config = build_config(name)
    again = _read(tmp_path, write(config, task=PRESETS[name]["task"]))
    assert _function_fields(again) == _function_fields(config)


@pytest.mark.parametrize(
    ("theta", "factor", "heads"),
    [(500_000, 2.0, 12), (160_000, 2.0, 8), (20_000, 8.0, 12), (10_000, 1.7, 24), (3e5, 3, 4)],
)
def test_original_ntk_is_recovered_exactly(theta, factor, heads, tmp_path):
    scaling = {"type": "ntk", "factor": factor}
    fields = {**PUBLISHED_BASE_EN, "num_attention_heads": heads, "rope_theta": theta, "rope_scaling": scaling}
    written = original_config(_read(tmp_path, fields), task="embed")
    assert (written["rope_theta"], written["rope_scaling"]) == (theta, scaling)


def _inv_freq(config):
    from transformers import GteModel

    config.num_hidden_layers = 1
    return GteModel(config).rotary_emb.inv_freq


@pytest.mark.parametrize(("theta", "factor"), [(500_000, 2.0), (160_000, 2.0), (20_000, 8.0)])
def test_ntk_frequencies(theta, factor, tmp_path):
    fields = {**PUBLISHED_BASE_EN, "rope_theta": theta, "rope_scaling": {"type": "ntk", "factor": factor}}
    i, d = np.arange(32, dtype=np.float64), 64
    expected = (theta * factor) ** (-2 * i / d) / factor ** (2 / d)
    actual = _inv_freq(_read(tmp_path, fields | {"vocab_size": 8, "intermediate_size": 8}))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("mixed_b", [0.5, 0.625, 1.0])
def test_ntk_frequencies_with_mixed_b(mixed_b, tmp_path):
    theta, factor, d = 10_000, 4.0, 64
    scaling = {"type": "ntk", "factor": factor, "mixed_b": mixed_b}
    fields = {**PUBLISHED_BASE_EN, "rope_theta": theta, "rope_scaling": scaling}
    config = _read(tmp_path, fields | {"vocab_size": 8, "intermediate_size": 8})
    i = np.arange(d // 2, dtype=np.float64)
    a = np.log(factor) / (d / 2) ** mixed_b
    expected = theta ** (-2 * i / d) / np.exp(a * (i + 1) ** mixed_b)
    actual = _inv_freq(config)
    # The last frequency is slowed by the whole factor, and the rest by less: the two formulas differ.
    assert actual[-1].item() == pytest.approx(theta ** (-62 / 64) / factor, rel=1e-6)
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-7)
    assert original_config(config, task="embed")["rope_scaling"] == scaling


def test_mixed_b_in_the_native_layout_is_read_by_transformers_alone(tmp_path):
    from transformers import AutoConfig

    scaling = {"type": "ntk", "factor": 4.0, "mixed_b": 0.5}
    config = _read(tmp_path, {**PUBLISHED_BASE_EN, "rope_scaling": scaling, "vocab_size": 8, "intermediate_size": 8})
    fields = native_config(config, task="embed")
    assert _function_fields(_read(tmp_path, fields)) == _function_fields(config)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_type"] == "longrope"
    torch.testing.assert_close(_inv_freq(theirs), _inv_freq(config), rtol=1e-6, atol=0)
    fields["rope_parameters"]["long_factor"][3] *= 2
    with pytest.raises(ConfigError, match=r"rope_parameters.long_factor"):
        _read(tmp_path, fields)


def test_booleans_as_strings(tmp_path):
    spelled = {"logn_attention_scale": "false", "unpad_inputs": "true", "pack_qkv": "True"}
    config = _read(tmp_path, {**PUBLISHED_BASE_EN, **spelled})
    assert _function_fields(config) == _function_fields(build_config("gte-base-en-v1.5"))
    with pytest.raises(ConfigError, match="logn_attention_scale"):
        _read(tmp_path, {**PUBLISHED_BASE_EN, "logn_attention_scale": "TRUE"})
    with pytest.raises(ConfigError, match=r"logn_attention_scale is 'yes'; expected false"):
        _read(tmp_path, {**PUBLISHED_BASE_EN, "logn_attention_scale": "yes"})


REFUSED_EVERYWHERE = [
    ("hidden_act", "relu"),
    ("hidden_act", "gelu_new"),
    ("hidden_size", 770),
    ("hidden_size", 12 * 63),
    ("hidden_size", "768"),
    ("hidden_size", None),
    ("vocab_size", 0),
    ("vocab_size", 30528.5),
    ("vocab_size", True),
    ("num_hidden_layers", -1),
    ("num_attention_heads", 0),
    ("intermediate_size", []),
    ("max_position_embeddings", 0),
    ("type_vocab_size", -1),
    ("layer_norm_eps", float("nan")),
    ("layer_norm_eps", "1e-12"),
    ("hidden_dropout_prob", 1.0),
    ("pad_token_id", 30528),
    ("pad_token_id", -1),
    ("head_dim", 32),
    ("partial_rotary_factor", 0.5),
    ("tie_word_embeddings", False),
    ("id2label", ["LABEL_0"]),
    ("id2label", {"0": "a", "2": "b"}),
    ("num_labels", 0),
]
REFUSED_ORIGINAL = [
    ("position_embedding_type", "absolute"),
    ("layer_norm_type", "rms_norm"),
    ("logn_attention_scale", True),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", {"factor": 2.0}),
    ("rope_scaling", {"type": "ntk", "factor": 2.0, "beta_fast": 32}),
    ("rope_scaling", "ntk"),
    ("rope_theta", 0),
    ("rope_theta", "500000"),
]
REFUSED_NATIVE = [
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
    ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "long_factor": [1.0] * 32}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta": 1}),
    ("rope_parameters", [1]),
]


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [(PUBLISHED_BASE_EN, *case) for case in REFUSED_EVERYWHERE + REFUSED_ORIGINAL]
    + [(NATIVE, *case) for case in REFUSED_EVERYWHERE + REFUSED_NATIVE],
)
def test_what_cannot_be_honoured_is_refused_by_name(base, key, value, tmp_path):
    read_config_ok = _read(tmp_path, base)
    assert read_config_ok.hidden_size == 768
    with pytest.raises(ConfigError, match=rf"config\.json: {key} is ") as caught:
        _read(tmp_path, {**base, key: value})
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"type": "ntk"}, "factor"),
        ({"type": "ntk", "factor": 0.5}, "factor"),
        ({"type": "ntk", "factor": "2"}, "factor"),
        ({"type": "ntk", "factor": 2.0, "mixed_b": "0.5"}, "mixed_b"),
    ],
)
def test_a_malformed_scaling_names_its_field(scaling, field, tmp_path):
    with pytest.raises(ConfigError, match=rf"config\.json: {field} is "):
        _read(tmp_path, {**PUBLISHED_BASE_EN, "rope_scaling": scaling})


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "type_vocab_size", "rope_theta"])
def test_a_missing_size_is_not_guessed(key, tmp_path):
    fields = {k: v for k, v in PUBLISHED_BASE_EN.items() if k != key}
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        _read(tmp_path, fields)


@pytest.mark.parametrize("model_type", ["distilbert", "deberta", None, 3])
def test_another_model_type_is_refused(model_type, tmp_path):
    with pytest.raises(ConfigError, match=f"model_type is {model_type!r}"):
        _read(tmp_path, {**PUBLISHED_BASE_EN, "model_type": model_type})


def test_labels(tmp_path):
    labels = {"id2label": {"1": "good", "0": "bad"}, "num_labels": 2}
    config = _read(tmp_path, {**PUBLISHED_BASE_EN, **labels})
    assert (config.num_labels, config.id2label, config.label2id) == (2, {0: "bad", 1: "good"}, {"bad": 0, "good": 1})
    assert _read(tmp_path, {**PUBLISHED_BASE_EN, "num_labels": 3}).num_labels == 3
    with pytest.raises(ConfigError, match=r"num_labels is 3; expected 2"):
        _read(tmp_path, {**PUBLISHED_BASE_EN, **labels, "num_labels": 3})


def test_older_native_spelling_of_the_rope(tmp_path):
    fields = {k: v for k, v in NATIVE.items() if k != "rope_parameters"}
    config = _read(tmp_path, {**fields, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    for text in ("{", "[]", "\xff", "[" * 100_000):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(tmp_path)


@pytest.mark.parametrize("task", ["fill-mask", "embed", "classify", "token-classify"])
@pytest.mark.parametrize("layout", ["original", "native"])
@pytest.mark.parametrize("shards", [1, 2])
def test_task_from_architectures_and_without_them(task, layout, shards, tmp_path):
    folder = make_checkpoint(tmp_path, task=task, layout=layout, shards=shards, layers=1)
    assert task_of(folder) == task
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert task_of(folder) == task


def test_a_pooling_module_makes_an_embedding_model(tmp_path):
    # gte-multilingual-base: dense vectors by default, and a token-weight head stored beside the encoder.
    folder = make_checkpoint(tmp_path, task="token-classify", pooling="cls")
    assert task_of(folder) == "embed"
    assert type(load_model(folder)).__name__ == "GteModel"
    assert type(load_model(folder, task="token-classify")).__name__ == "GteForTokenClassification"
    (folder / "modules.json").write_text('{"type": 3}')
    with pytest.raises(ConfigError, match=r"modules\.json"):
        task_of(folder)


@pytest.mark.parametrize("names", [["NewForQuestionAnswering"], ["BertModel"], "NewModel", [3]])
def test_an_unknown_head_is_refused(names, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED_BASE_EN, "architectures": names}))
    with pytest.raises(ConfigError, match="architectures"):
        task_of(tmp_path)
