"""The facts of a checkpoint folder, in every form that sentence-transformers writes."""

import json
from types import SimpleNamespace

import pytest

from gte_deploy.checkpoint_spec import spec_from_checkpoint
from gte_deploy.errors import CheckpointError, ConfigError

CONFIG = SimpleNamespace(
    vocab_size=100,
    hidden_size=8,
    type_vocab_size=0,
    max_position_embeddings=64,
    pad_token_id=1,
    num_labels=2,
    id2label={"0": "no", 1: "yes"},
)


def write(folder, name, value):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_bare_folder(tmp_path):
    spec = spec_from_checkpoint(tmp_path, CONFIG, "fill-mask")
    assert (spec.max_length, spec.vocab_size, spec.hidden_size, spec.pad_token_id) == (64, 100, 8, 1)
    assert (spec.pooling, spec.normalize, spec.logits, spec.num_labels, spec.id2label) == (
        "mean",
        False,
        "masked",
        0,
        {},
    )
    assert spec_from_checkpoint(tmp_path, CONFIG, "embed").pooling == "cls"
    classifier = spec_from_checkpoint(tmp_path, CONFIG, "classify")
    assert (classifier.num_labels, classifier.id2label) == (2, {0: "no", 1: "yes"})


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": "mean"}, "mean"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
)
def test_pooling_forms(tmp_path, pooling, expected):
    write(tmp_path, "1_Pooling/config.json", pooling)
    assert spec_from_checkpoint(tmp_path, CONFIG, "embed").pooling == expected
    assert spec_from_checkpoint(tmp_path, CONFIG, "embed", "cls").pooling == "cls"


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "joins"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
    ],
)
def test_poolings_that_are_not_honoured(tmp_path, pooling, message):
    write(tmp_path, "1_Pooling/config.json", pooling)
    with pytest.raises(ConfigError, match=message):
        spec_from_checkpoint(tmp_path, CONFIG, "embed")


def test_an_unknown_pooling_argument(tmp_path):
    with pytest.raises(ConfigError, match="'max'"):
        spec_from_checkpoint(tmp_path, CONFIG, "embed", "max")


def test_modules(tmp_path):
    kinds = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    write(tmp_path, "modules.json", [{"idx": i, "type": kind} for i, kind in enumerate(kinds)])
    assert not spec_from_checkpoint(tmp_path, CONFIG, "embed").normalize
    kinds.append("sentence_transformers.base.modules.normalize.Normalize")
    write(tmp_path, "modules.json", [{"idx": i, "type": kind} for i, kind in enumerate(kinds)])
    assert spec_from_checkpoint(tmp_path, CONFIG, "embed").normalize
    kinds[2] = "sentence_transformers.models.Dense"
    write(tmp_path, "modules.json", [{"idx": i, "type": kind} for i, kind in enumerate(kinds)])
    with pytest.raises(ConfigError, match="Dense"):
        spec_from_checkpoint(tmp_path, CONFIG, "embed")


@pytest.mark.parametrize(("limit", "expected"), [(16, 16), (64, 64), (512, 64), (None, 64), (0, 64)])
def test_the_smaller_length_counts(tmp_path, limit, expected):
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": limit})
    assert spec_from_checkpoint(tmp_path, CONFIG, "embed").max_length == expected


def test_prompts(tmp_path):
    write(
        tmp_path,
        "config_sentence_transformers.json",
        {"prompts": {"query": "q: ", "document": None}, "default_prompt_name": "query"},
    )
    spec = spec_from_checkpoint(tmp_path, CONFIG, "embed")
    assert (spec.prompts, spec.default_prompt_name) == ({"query": "q: ", "document": ""}, "query")
    write(tmp_path, "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": "query"})
    with pytest.raises(ConfigError, match="default prompt 'query'"):
        spec_from_checkpoint(tmp_path, CONFIG, "embed")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules.json", "[[["),
        ("modules.json", {"a": 1}),
        ("modules.json", ["Transformer"]),
        ("1_Pooling/config.json", "[1]"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}),
    ],
)
def test_broken_files(tmp_path, name, value):
    write(tmp_path, name, value)
    with pytest.raises(CheckpointError, match=name.rpartition("/")[2]):
        spec_from_checkpoint(tmp_path, CONFIG, "embed")
