"""The table of fields against the libraries that own the files: a field that they know and it does not is found."""

import inspect
import json
import re

import pytest
from transformers import GteConfig

from factories import make_checkpoint
from gte_deploy.core.errors import ConfigError
from gte_deploy.models.config import read_config
from gte_deploy.models.description import describe
from gte_deploy.models.families.gte import FIELDS as CONFIG
from gte_deploy.models.field_tables import tables
from gte_deploy.models.fields import (
    DENSE,
    POOLING,
    SENTENCE_BERT,
    SENTENCE_TRANSFORMERS,
    SPLADE,
    STATIC,
    TOKENIZER,
    check_fields,
)


def known(table, names):
    return [name for name in names if table.field(name) is None]


def test_every_field_that_the_model_reads_is_in_the_table():
    from transformers.models.gte import modeling_gte

    read = set(re.findall(r"config\.([a-z]\w*)", inspect.getsource(modeling_gte)))
    assert {"rope_parameters", "type_vocab_size", "layer_norm_eps"} <= read
    assert known(CONFIG, read) == []
    assert known(CONFIG, [name for name in GteConfig.__dataclass_fields__ if name in vars(GteConfig)]) == []


def test_every_field_that_sentence_transformers_reads_is_in_the_table():
    from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    arguments = set(inspect.signature(Transformer.__init__).parameters) - {"self", "model_name_or_path", "backend"}
    assert known(SENTENCE_BERT, arguments | set(Transformer.config_keys)) == []
    assert known(POOLING, [*Pooling.config_keys, *Pooling.config_key_renames]) == []
    assert known(DENSE, Dense.config_keys) == []
    arguments = {*SpladePooling.config_keys, *inspect.signature(SpladePooling.__init__).parameters}
    assert known(SPLADE, arguments - {"self", "args", "kwargs"}) == []
    assert known(STATIC, SparseStaticEmbedding.config_keys) == []
    written = set()
    for model in (SentenceTransformer, CrossEncoder, SparseEncoder):
        for method in (model._get_model_config, model._parse_model_config):
            for line in (inspect.getsource(method), inspect.getsource(super(model, model)._get_model_config)):
                written |= set(re.findall(r'"(\w+)":|(?:get\(|config\[|")(\w+)"(?: in model_config|,|\))', line))
    names = {name for pair in written for name in pair if name} - {
        "sentence_transformers",
        "transformers",
        "pytorch",
        "maxsim",
    }
    assert {"prompts", "activation_fn", "similarity_fn_name", "truncate_dim", "max_active_dims"} <= names
    assert known(SENTENCE_TRANSFORMERS, names) == []


def test_every_argument_of_a_tokenizer_is_in_the_table():
    from transformers import BertTokenizer

    listed = {part for name in TOKENIZER.fields for part in name.split(", ")}
    arguments = set(inspect.signature(BertTokenizer.__init__).parameters) - {"self", "vocab", "kwargs"}
    assert arguments <= listed


def test_each_table_has_a_heading_of_its_own():
    names = [table.name for table in tables()]
    assert "config.json of GTE-v1.5" in names and len(set(names)) == len(names)


FIXED = [
    (table, name, value)
    for table in tables()
    for name, field in table.fields.items()
    if field.effect == "fixed"
    for value in ("something else", True, False, 7, [3], {"a": 1})
    if value not in field.allowed
]


@pytest.mark.parametrize(("table", "name", "value"), FIXED)
def test_a_fixed_field_is_refused_with_any_other_value(table, name, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"{name} is .*expected"):
        check_fields({name: value}, tmp_path / "file.json", table)
    check_fields({name: None}, tmp_path / "file.json", table)
    for allowed in table.fields[name].allowed:
        check_fields({name: allowed}, tmp_path / "file.json", table)


@pytest.mark.parametrize("layout", ["original", "native"])
@pytest.mark.parametrize("name", [name for name, field in CONFIG.fields.items() if field.effect == "fixed"])
def test_both_layouts_refuse_alike(name, layout, tmp_path):
    folder = make_checkpoint(tmp_path, layout=layout, layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: "something else"}))
    with pytest.raises(ConfigError, match=name):
        read_config(folder)


# Honoured field of config.json -> another value, and what it changes in the description.
CHANGES = {
    "layer_norm_eps": (0.5, lambda found: found.config.layer_norm_eps),
    "rope_theta": (7e4, lambda found: found.config.rope_parameters),
    "rope_scaling": ({"type": "ntk", "factor": 4.0}, lambda found: found.config.rope_parameters),
    "max_position_embeddings": (64, lambda found: found.spec.max_length),
    "type_vocab_size": (2, lambda found: found.spec.token_types),
    "id2label": ({"0": "no", "1": "yes"}, lambda found: dict(found.spec.id2label)),
    "sentence_transformers": ({"activation_fn": "torch.nn.Identity"}, lambda found: found.spec.activation),
    "sbert_ce_default_activation_function": ("torch.nn.Tanh", lambda found: found.spec.activation),
    "vocab_size": (300, lambda found: found.spec.vocab_size),
    "hidden_size": (64, lambda found: found.spec.hidden_size),
    "num_hidden_layers": (3, lambda found: found.config.num_hidden_layers),
    "num_attention_heads": (2, lambda found: found.config.num_attention_heads),
    "intermediate_size": (99, lambda found: found.config.intermediate_size),
    "num_labels": (3, lambda found: found.spec.num_labels),
    "architectures": (["NewForMaskedLM"], lambda found: found.task),
}
# Each is tested where the name says: by refusal, by its other spelling, or since it names the layout.
ELSEWHERE = {"model_type", "rope_parameters", "pad_token_id", "label2id", "head_dim"}


def test_every_honoured_field_is_tested():
    honoured = {name for name, field in CONFIG.fields.items() if field.effect == "honoured"}
    assert honoured == set(CHANGES) | ELSEWHERE


@pytest.mark.parametrize("name", CHANGES)
def test_an_honoured_field_changes_the_description(name, tmp_path):
    value, seen = CHANGES[name]
    folder = make_checkpoint(tmp_path, task="classify", num_labels=2, layers=1, type_vocab_size=1)
    before = seen(describe(folder))
    config = json.loads((folder / "config.json").read_text())
    if name == "num_labels":
        del config["id2label"], config["label2id"]
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    assert seen(describe(folder)) != before


def test_the_files_of_a_field_without_effect_describe_the_same(tmp_path):
    folder = make_checkpoint(tmp_path, task="classify", num_labels=2, layers=1)
    before = describe(folder)
    config = json.loads((folder / "config.json").read_text())
    others = {"torch_dtype": "float16", "dtype": "float16", "auto_map": {}, "tokenizer_class": None}
    others["problem_type"] = "regression"
    odd = {
        name: 3 if name.endswith("_token_id") else others.get(name, 0.5)
        for name, field in CONFIG.fields.items()
        if field.effect == "without effect"
    }
    (folder / "config.json").write_text(json.dumps({**config, **odd}))
    assert describe(folder).spec == before.spec
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": "x"}))
    with pytest.raises(ConfigError, match="bos_token_id"):
        describe(folder)
