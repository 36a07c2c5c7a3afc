"""sentence-transformers' files beside a checkpoint, in every form that its versions write."""

import json

import pytest

from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.modules import model_folder, read_settings, reranker_activation

KIND = "sentence_transformers.models."
IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"


def write(folder, name, value):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))


def write_modules(folder, *kinds, **paths):
    entries = [{"idx": i, "name": str(i), "path": paths.get(kind, ""), "type": kind} for i, kind in enumerate(kinds)]
    for entry in entries:
        entry["type"] = entry["type"] if "." in entry["type"] else KIND + entry["type"]
    write(folder, "modules.json", entries)


def test_a_bare_folder(tmp_path):
    for task in ("embed", "classify", "fill-mask"):
        settings = read_settings(CheckpointFiles(tmp_path), task)
        assert (settings.pooling, settings.max_length, settings.activation) == (None, None, None)
        assert (settings.normalize, settings.dense, settings.prompts, settings.lowercase) == (False, (), {}, False)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": ["cls"]}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": "mean"}, "mean"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
)
@pytest.mark.parametrize("folder", ["1_Pooling", "pool"])
def test_pooling_forms(tmp_path, pooling, expected, folder):
    write(tmp_path, f"{folder}/config.json", pooling)
    write_modules(tmp_path, "Transformer", "Pooling", Pooling=folder)
    assert read_settings(CheckpointFiles(tmp_path), "embed").pooling == expected


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "joins"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
        ({"pooling_mode": "mean", "pool_twice": True}, "pool_twice"),
    ],
)
def test_poolings_that_are_not_honoured(tmp_path, pooling, message):
    write(tmp_path, "1_Pooling/config.json", pooling)
    with pytest.raises(ConfigError, match=message):
        read_settings(CheckpointFiles(tmp_path), "embed")


@pytest.mark.parametrize(
    "kinds",
    [
        ["Transformer", "Pooling", "WordWeights"],
        ["Transformer", "Pooling", "LSTM", "Normalize"],
        ["Transformer", "Pooling", "Normalize", "Dense"],
        ["Transformer", "Normalize", "Pooling"],
        ["Transformer", "Pooling", "LayerNorm"],
        ["custom_code.Transformer", "Pooling"],
    ],
)
def test_modules_matter_for_their_task_alone(tmp_path, kinds):
    write_modules(tmp_path, *kinds)
    with pytest.raises(ConfigError, match=r"modules\.json"):
        read_settings(CheckpointFiles(tmp_path), "embed")
    for task in ("fill-mask", "token-classify", "classify"):
        assert read_settings(CheckpointFiles(tmp_path), task).dense == ()


@pytest.mark.parametrize("prefix", [KIND, "sentence_transformers.base.modules.normalize."])
def test_normalize(tmp_path, prefix):
    write_modules(tmp_path, "Transformer", "Pooling")
    assert not read_settings(CheckpointFiles(tmp_path), "embed").normalize
    write_modules(tmp_path, "Transformer", "Pooling", "Dropout", prefix + "Normalize")
    assert read_settings(CheckpointFiles(tmp_path), "embed").normalize


def test_dense(tmp_path):
    write_modules(tmp_path, "Transformer", "Pooling", "Dense", Dense="2_Dense")
    write(tmp_path, "2_Dense/config.json", {"in_features": 8, "out_features": 4, "activation_function": IDENTITY})
    (dense,) = read_settings(CheckpointFiles(tmp_path), "embed").dense
    assert (dense.path, dense.in_features, dense.out_features, dense.bias) == ("2_Dense", 8, 4, True)
    assert (dense.activation, dense.residual) == ("Identity", False)
    for change, message in (
        ({"out_features": None}, "out_features"),
        ({"in_features": "8"}, "in_features"),
        ({"activation_function": "torch.nn.modules.activation.RReLU"}, "activation_function"),
        ({"activation_function": "my_code.Swish"}, "activation_function"),
        ({"module_input_name": "token_embeddings"}, "module_input_name"),
        ({"bias": "no"}, "bias"),
    ):
        write(tmp_path, "2_Dense/config.json", {"in_features": 8, "out_features": 4, **change})
        with pytest.raises(ConfigError, match=message):
            read_settings(CheckpointFiles(tmp_path), "embed")


@pytest.mark.parametrize(("limit", "expected"), [(16, 16), (512, 512), (None, None), (0, None), (True, None)])
def test_max_seq_length(tmp_path, limit, expected):
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": limit})
    assert read_settings(CheckpointFiles(tmp_path), "embed").max_length == expected
    assert read_settings(CheckpointFiles(tmp_path), "fill-mask").max_length is None


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_settings_of_the_transformer(tmp_path, name):
    fields = {
        "do_lower_case": True,
        "tokenizer_args": {"model_max_length": 99, "trust_remote_code": True},
        "config_kwargs": {"layer_norm_eps": 1e-6},
        "model_args": {"torch_dtype": "float16", "attn_implementation": "eager"},
        "transformer_task": "feature-extraction",
        "unpad_inputs": True,
    }
    write(tmp_path, name, fields)
    settings = read_settings(CheckpointFiles(tmp_path), "embed")
    assert settings.lowercase
    assert settings.tokenizer_arguments == {"model_max_length": 99}
    assert settings.config_overrides == {"layer_norm_eps": 1e-6}


@pytest.mark.parametrize(
    "fields",
    [
        {"query_length": 32},
        {"document_length": 32},
        {"query_expansion": {"strategy": "fixed", "length": 32}},
        {"processing_kwargs": {"text": {"max_length": 32}}},
        {"transformer_task": "text-generation"},
        {"modality_config": {"text": {"method": "get_text_features", "method_output_name": "pooler_output"}}},
        {"module_output_name": "sentence_embedding"},
        {"tokenizer_name_or_path": "bert-base-uncased"},
        {"model_args": {"variant": "fp16"}},
        {"do_lower_case": "yes"},
        {"reverse_texts": True},
    ],
)
def test_settings_that_are_refused_by_name(tmp_path, fields):
    write(tmp_path, "sentence_bert_config.json", fields)
    with pytest.raises(ConfigError, match=next(iter(fields))):
        read_settings(CheckpointFiles(tmp_path), "embed")
    assert not read_settings(CheckpointFiles(tmp_path), "fill-mask").lowercase


def test_the_whole(tmp_path):
    write(
        tmp_path,
        "config_sentence_transformers.json",
        {
            "prompts": {"query": "q: ", "document": None},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
            "truncate_dim": 4,
            "__version__": {"sentence_transformers": "5.0.0"},
        },
    )
    settings = read_settings(CheckpointFiles(tmp_path), "embed")
    assert (settings.prompts, settings.default_prompt_name) == ({"query": "q: ", "document": ""}, "query")
    assert (settings.similarity, settings.truncate_dim) == ("dot", 4)
    write(tmp_path, "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": "query"})
    with pytest.raises(ConfigError, match="default prompt 'query'"):
        read_settings(CheckpointFiles(tmp_path), "embed")
    write(tmp_path, "config_sentence_transformers.json", {"truncate_dim": 0})
    with pytest.raises(ConfigError, match="truncate_dim"):
        read_settings(CheckpointFiles(tmp_path), "embed")


def test_a_file_of_another_kind_of_model_is_passed_over(tmp_path):
    reranker = {"model_type": "CrossEncoder", "prompts": {"query": "q: "}, "activation_fn": IDENTITY}
    write(tmp_path, "config_sentence_transformers.json", reranker)
    assert read_settings(CheckpointFiles(tmp_path), "embed").prompts == {}
    assert (
        read_settings(CheckpointFiles(tmp_path), "classify").activation is None
    )  # the library reads it with a modules.json alone
    write_modules(tmp_path, "Transformer")
    settings = read_settings(CheckpointFiles(tmp_path), "classify")
    assert (settings.prompts, settings.activation) == ({"query": "q: "}, "identity")
    write(tmp_path, "config_sentence_transformers.json", {**reranker, "model_type": "SentenceTransformer"})
    assert read_settings(CheckpointFiles(tmp_path), "classify").activation is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"sentence_transformers": {"version": "4.1.0"}}, None),
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, "identity"),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, "sigmoid"),
        ({"sbert_ce_default_activation_function": IDENTITY}, "identity"),
        ({"sbert_ce_default_activation_function": None}, None),
        ({"sentence_transformers": {"activation_fn": "my_code.Odd"}}, None),  # as the library: never run
        (
            {
                "sentence_transformers": {"activation_fn": "torch.nn.Tanh"},
                "sbert_ce_default_activation_function": IDENTITY,
            },
            "tanh",
        ),
    ],
)
def test_activation_in_the_config(tmp_path, fields, expected):
    write(tmp_path, "config.json", fields)
    assert reranker_activation(tmp_path) == expected


def test_an_activation_of_torch_that_is_not_computed(tmp_path):
    write(tmp_path, "config.json", {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.RReLU"}})
    with pytest.raises(ConfigError, match="RReLU"):
        reranker_activation(tmp_path)


def test_the_transformer_may_have_a_folder_of_its_own(tmp_path):
    write_modules(tmp_path, "Transformer", "Pooling", Transformer="0_Transformer", Pooling="1_Pooling")
    write(tmp_path, "0_Transformer/config.json", {})
    assert model_folder(CheckpointFiles(tmp_path)) == tmp_path / "0_Transformer"
    write(tmp_path, "config.json", {})
    assert model_folder(CheckpointFiles(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "..\\other"])
def test_a_module_stays_in_its_folder(tmp_path, path):
    write_modules(tmp_path, "Transformer", "Pooling", Pooling=path)
    for task in ("embed", "token-classify"):
        with pytest.raises(ConfigError, match="path is"):
            read_settings(CheckpointFiles(tmp_path), task)
    write_modules(tmp_path, "Transformer", Transformer=path)
    with pytest.raises(ConfigError, match="path is"):
        model_folder(CheckpointFiles(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("modules.json", "[[[", CheckpointError),
        ("modules.json", {"a": 1}, ConfigError),
        ("modules.json", ["Transformer"], ConfigError),
        ("1_Pooling/config.json", "[1]", CheckpointError),
        ("sentence_bert_config.json", "[1]", CheckpointError),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, CheckpointError),
    ],
)
def test_broken_files(tmp_path, name, value, error):
    write(tmp_path, name, value)
    with pytest.raises(error, match=name.rpartition("/")[2]):
        read_settings(CheckpointFiles(tmp_path), "embed")


def test_both_views_of_a_file_share_one_reading(tmp_path):
    (tmp_path / "a.json").write_text('{"b": 1}')
    files = CheckpointFiles(tmp_path)
    assert files.json["a.json"] is files.objects["a.json"]
    (tmp_path / "list.json").write_text("[1]")
    assert files.json["list.json"] == [1] and files.json["missing.json"] is None and files.objects["missing.json"] == {}
    with pytest.raises(CheckpointError, match=r"list\.json must hold a JSON object; it holds list"):
        files.objects["list.json"]
