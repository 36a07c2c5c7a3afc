"""The settings for late interaction in the three layouts: each field changes the description, or is refused by name."""

import json
import string

import pytest

from factories import add_multi_vector_modules, add_stanford_projection, add_tokens
from family_checkpoints import make_family_checkpoint
from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.core.spec import MultiVectorSpec, QueryExpansion
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.config import task_of
from gte_deploy.models.description import describe
from runtime_models import MAX_LENGTH, PIECES, make_word_checkpoint

MASK, QUERY, DOCUMENT = PIECES.index("[MASK]"), len(PIECES), len(PIECES) + 1
PUNCTUATION = tuple(sorted(PIECES.index(mark) for mark in string.punctuation if mark in PIECES))
KING, THE = PIECES.index("king"), PIECES.index("the")


@pytest.fixture
def folder(tmp_path):
    return add_tokens(make_word_checkpoint(tmp_path / "model", task="embed", layers=1), ["[Q] ", "[D] "])


def change(folder, name, **fields):
    """Change fields of a JSON file; None removes a field."""
    file = folder / name
    found = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


PYLATE_DEFAULTS = MultiVectorSpec(
    query_length=32,
    document_length=100,
    query_prefix=QUERY,
    document_prefix=DOCUMENT,
    expansion=QueryExpansion(MASK, 32, attended=False, fixed=True),
    skipped_in_documents=PUNCTUATION,
)


def test_pylate_with_its_defaults(folder):
    add_multi_vector_modules(folder, config={"document_length": 100}, widths=(16, 8))
    found = describe(folder)
    assert (found.task, found.spec.multi_vector) == ("multi-vector", PYLATE_DEFAULTS)
    assert (found.spec.max_length, found.spec.embedding_size, found.spec.normalize) == (100, 8, True)
    assert found.spec.similarity == "maxsim"
    assert [(dense.in_features, dense.out_features, dense.activation) for dense in found.dense] == [
        (32, 16, "Identity"),
        (16, 8, "Identity"),
    ]
    assert len(found.weight_files) == 3
    # PyLate sets max_seq_length before every text, and stores that of its last text.
    change(folder, "sentence_bert_config.json", max_seq_length=7)
    assert describe(folder).spec == found.spec


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("query_length", 12, {"query_length": 12, "expansion": QueryExpansion(MASK, 12, False, True)}),
        ("document_length", 50, {"document_length": 50}),
        ("query_prefix", "[D] ", {"query_prefix": DOCUMENT}),
        ("query_prefix", "", {"query_prefix": None}),
        ("document_prefix", "king", {"document_prefix": KING}),
        ("do_query_expansion", False, {"expansion": None}),
        ("attend_to_expansion_tokens", True, {"expansion": QueryExpansion(MASK, 32, True, True)}),
        ("skiplist_words", ["king", "nowhere", "the"], {"skipped_in_documents": tuple(sorted((KING, THE)))}),
        ("skiplist_words", [], {"skipped_in_documents": ()}),
    ],
)
def test_a_field_of_pylate(folder, field, value, expected):
    add_multi_vector_modules(folder, config={"document_length": 100})
    change(folder, "config_sentence_transformers.json", **{field: value})
    found = describe(folder).spec.multi_vector
    assert found == MultiVectorSpec(**{**vars(PYLATE_DEFAULTS), **expected})


def test_prompts_lose_the_prefix_that_multi_vector_encoder_puts_before_them(folder):
    prompts = {"query": "[Q] find: ", "document": "", "other": "[Q] x"}
    add_multi_vector_modules(folder, config={"document_length": 100, "prompts": prompts})
    assert describe(folder).spec.prompts == {"query": "find: ", "document": "", "other": "[Q] x"}


def test_the_projection_of_pylate_has_no_activation_of_its_own(folder):
    add_multi_vector_modules(folder, config={"document_length": 100})
    change(folder, "1_Dense/config.json", activation_function=None)
    assert describe(folder).dense[0].activation == "Identity"
    file = folder / "modules.json"
    file.write_text(file.read_text().replace("pylate.models.Dense.Dense", "sentence_transformers.models.Dense"))
    assert describe(folder).dense[0].activation == "Tanh"
    change(folder, "1_Dense/config.json", activation_function="torch.nn.ReLU", use_residual=True, bias=True)
    found = describe(folder).dense[0]
    assert (found.activation, found.residual, found.bias) == ("ReLU", True, True)


NATIVE = MultiVectorSpec(query_length=MAX_LENGTH, document_length=MAX_LENGTH)


@pytest.mark.parametrize(
    ("transformer", "mask", "expected"),
    [
        ({}, {}, {}),
        ({"query_length": 20, "document_length": 40}, {}, {"query_length": 20, "document_length": 40}),
        ({"max_seq_length": 60}, None, {"query_length": 60, "document_length": 60}),
        (
            {"query_expansion": {"strategy": "fixed", "length": 16}},
            {},
            {"query_length": 16, "expansion": QueryExpansion(MASK, 16, False, True)},
        ),
        (
            {"query_length": 30, "query_expansion": {"strategy": "min", "length": 16, "attend": True, "token": "king"}},
            {},
            {"query_length": 30, "expansion": QueryExpansion(KING, 16, True, False)},
        ),
        ({}, {"skiplist_words": ["king"]}, {"skipped_in_documents": (KING,)}),
        ({}, {"skiplist_words": ["king"], "skiplist_tasks": "query"}, {"skipped_in_queries": (KING,)}),
        (
            {},
            {"skiplist_words": ["the"], "skiplist_tasks": ["query", "document"]},
            {"skipped_in_queries": (THE,), "skipped_in_documents": (THE,)},
        ),
    ],
)
def test_multi_vector_encoder(folder, transformer, mask, expected):
    add_multi_vector_modules(folder, library="sentence-transformers", transformer=transformer, mask=mask)
    found = describe(folder)
    assert found.spec.multi_vector == MultiVectorSpec(**{**vars(NATIVE), **expected})
    assert found.spec.normalize and found.task == "multi-vector"


def test_the_similarity_and_a_model_without_normalization(folder):
    config = {"similarity_fn_name": "meanmaxsim"}
    add_multi_vector_modules(folder, library="sentence-transformers", config=config, normalize=False, mask={})
    found = describe(folder).spec
    assert (found.similarity, found.normalize) == ("meanmaxsim", False)
    change(folder, "config_sentence_transformers.json", similarity_fn_name="cosine")
    assert describe(folder).spec.similarity == "maxsim"  # as the library, which ignores those of single vectors


def test_stanford(tmp_path):
    folder = make_family_checkpoint(tmp_path / "model", "bert", "embed")
    add_stanford_projection(
        folder, query_maxlen=16, doc_maxlen=40, query_token_id="old", doc_token_id="river", mask_punctuation=True
    )
    found = describe(folder)
    vocabulary = found.tokenizer.theirs.get_vocab()
    assert found.spec.multi_vector == MultiVectorSpec(
        query_length=16,
        document_length=40,
        query_prefix=vocabulary["old"],
        document_prefix=vocabulary["river"],
        expansion=QueryExpansion(vocabulary["[MASK]"], 16, attended=False, fixed=True),
        skipped_in_documents=tuple(sorted(vocabulary[mark] for mark in ".,!?")),
    )
    assert found.spec.embedding_size == 8
    model = load_model(folder)
    assert model.token_projection[0].linear.weight.shape == (8, 32)
    change(folder, "artifact.metadata", mask_punctuation=False, attend_to_mask_tokens=True)
    other = describe(folder).spec.multi_vector
    assert other.skipped_in_documents == () and other.expansion.attended
    change(folder, "artifact.metadata", dim=9)
    with pytest.raises(CheckpointError, match=r"linear.weight has shape \[8, 32\]; expected \[9, 32\]"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("artifact.metadata", {"doc_maxlen": None}, "doc_maxlen is missing"),
        ("artifact.metadata", {"similarity": "l2"}, "similarity is 'l2'; expected 'cosine'"),
        ("artifact.metadata", {"interaction": "flipr"}, "interaction is 'flipr'; expected 'colbert'"),
        ("artifact.metadata", {"query_maxlen": "16"}, "query_maxlen is '16'; expected a positive integer"),
        ("artifact.metadata", {"doc_token_id": "[D]"}, r"document_prefix is '\[D\]'; expected a token"),
    ],
)
def test_stanford_refuses(tmp_path, file, fields, message):
    folder = make_family_checkpoint(tmp_path / "model", "bert", "embed")
    add_stanford_projection(folder, query_maxlen=16, doc_maxlen=40, query_token_id="old", doc_token_id="river")
    change(folder, file, **fields)
    with pytest.raises(ConfigError, match=message):
        describe(folder)
    (folder / "artifact.metadata").unlink()
    with pytest.raises(ConfigError, match="artifact.metadata is missing"):
        describe(folder)


WHOLE, SETTINGS = "config_sentence_transformers.json", "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("library", "file", "fields", "message"),
    [
        ("pylate", WHOLE, {"query_length": 0}, "query_length is 0; expected a positive integer"),
        ("pylate", WHOLE, {"document_length": 500}, "document_length is 500; expected at most 128"),
        ("pylate", WHOLE, {"query_prefix": "[X] "}, r"query_prefix is '\[X\] '; expected a token of the tokenizer"),
        ("pylate", WHOLE, {"query_prefix": 3}, "query_prefix is 3; expected a text"),
        ("pylate", WHOLE, {"do_query_expansion": "yes"}, "do_query_expansion is 'yes'; expected true or false"),
        ("pylate", WHOLE, {"skiplist_words": "!"}, "skiplist_words is '!'; expected a list of texts"),
        ("pylate", WHOLE, {"similarity_fn_name": "xtr"}, "similarity_fn_name is 'xtr'; expected maxsim or meanmaxsim"),
        ("pylate", WHOLE, {"truncate_dim": 4}, "truncate_dim is 4; expected none"),
        ("pylate", "1_Dense/config.json", {"module_input_name": "sentence_embedding"}, "expected 'token_embeddings'"),
        ("native", WHOLE, {"query_prefix": "[Q] "}, "query_prefix is .* expected no field of PyLate"),
        ("native", WHOLE, {"truncate_dim": 4}, "truncate_dim is 4; expected null"),
        ("native", SETTINGS, {"query_expansion": {"strategy": "max", "length": 9}}, "expected 'fixed' or 'min'"),
        ("native", SETTINGS, {"query_expansion": {"strategy": "min"}}, "length is missing"),
        ("native", SETTINGS, {"query_expansion": {"width": 9}}, "expected an object with strategy"),
        ("native", SETTINGS, {"query_expansion": {"strategy": "min", "length": 9, "token": "x"}}, "the token 'x'"),
        (
            "native",
            SETTINGS,
            {"query_length": 8, "query_expansion": {"strategy": "min", "length": 9}},
            "lengthened to 9 tokens, and query_length is 8",
        ),
        ("native", "2_MultiVectorMask/config.json", {"keep_only_token_ids": [3]}, r"keep_only_token_ids is \[3\]"),
        ("native", "2_MultiVectorMask/config.json", {"skiplist_tasks": ["image"]}, "expected query, document or both"),
        ("native", "2_MultiVectorMask/config.json", {"other": 1}, "other is 1; expected no such field"),
        (
            "native",
            "3_Normalize/config.json",
            {"module_input_name": None},
            "module_input_name is 'sentence_embedding'; expected 'token_embeddings'",
        ),
    ],
)
def test_what_is_refused(folder, library, file, fields, message):
    library = "sentence-transformers" if library == "native" else library
    add_multi_vector_modules(
        folder, library=library, config={"document_length": 100} if library == "pylate" else {}, mask={}
    )
    change(folder, file, **fields)
    with pytest.raises(ConfigError, match=message):
        describe(folder)


def test_modules_that_are_refused(folder):
    expansion = {"query_expansion": {"strategy": "fixed", "length": 8}}
    add_multi_vector_modules(folder, library="sentence-transformers", transformer=expansion)
    with pytest.raises(ConfigError, match="has no MultiVectorMask; expected one"):
        describe(folder)
    file = folder / "modules.json"
    modules = json.loads(file.read_text())
    for changed, message in (
        ([modules[0], modules[2], modules[1]], "lists Transformer, Normalize, Dense; expected Transformer, Dense"),
        ([*modules, {**modules[2]}], "lists Transformer, Dense, Normalize, Normalize"),
        ([*modules, {"type": "sentence_transformers.models.HierarchicalTokenPooling"}], "HierarchicalTokenPooling"),
        ([*modules, {"type": "custom.Module"}], "custom.Module"),
        ([{**modules[0], "path": "../other"}, *modules[1:]], "leaves the checkpoint's folder"),
        ([{**modules[0], "kwargs": ["task"]}, *modules[1:]], "kwargs of Transformer"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=message):
            describe(folder)


def test_other_tasks_and_other_checkpoints(folder, tmp_path):
    add_multi_vector_modules(folder, config={"document_length": 100})
    assert task_of(folder) == "multi-vector"
    with pytest.raises(ConfigError, match="pylate.models.Dense.Dense"):
        describe(folder, task="embed")
    plain = make_word_checkpoint(tmp_path / "plain", task="embed", layers=1, pooling="cls")
    with pytest.raises(ConfigError, match="is no multi-vector model: expected modules.json and"):
        describe(plain, task="multi-vector")
    for field, value in (("query_length", 8), ("document_length", 8), ("query_expansion", {"strategy": "min"})):
        (plain / "sentence_bert_config.json").write_text(json.dumps({field: value}))
        with pytest.raises(ConfigError, match=f"{field} is .*; expected null for task embed"):
            describe(plain)


def test_the_padding_that_pylate_saves_does_not_move_positions(tmp_path):
    # PyLate makes the mask token the tokenizer's padding; XLM-R counts positions from the padding of config.json.
    folder = make_family_checkpoint(tmp_path / "model", "xlm-roberta", "embed")
    change(folder, "tokenizer_config.json", pad_token="<mask>")
    config = {"query_length": 8, "document_length": 20, "query_prefix": "", "document_prefix": ""}
    add_multi_vector_modules(folder, config=config)
    found = describe(folder)
    mask = found.tokenizer.theirs.mask_token_id
    assert (found.config.pad_token_id, found.spec.pad_token_id) == (1, mask) and mask != 1
    assert found.spec.multi_vector.expansion.token == mask


def test_names_of_the_first_checkpoints_in_every_family(tmp_path):
    # transformers 5.3 writes LayerNorm.gamma and .beta, and all of its versions read them.
    from safetensors.torch import load_file, save_file

    folder = make_family_checkpoint(tmp_path / "model", "xlm-roberta", "embed")
    wanted = load_model(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, first in old.items():
            name = name.replace(new, first)
        renamed[name] = tensor
    assert sum("gamma" in name for name in renamed) == 5
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_model(folder).state_dict()
    assert found.keys() == wanted.keys() and all(bool((found[name] == wanted[name]).all()) for name in wanted)
