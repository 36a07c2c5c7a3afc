"""Exports of multi-vector models: what every target compares, the files for other libraries, and what is refused."""

import dataclasses
import json

import numpy as np
import onnx
import pytest

import gte_deploy
from factories import add_multi_vector_modules, add_stanford_projection, add_tokens
from family_checkpoints import make_family_checkpoint
from gte_deploy.core.errors import ExportError, ParityError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.conversion import convert
from gte_deploy.exporters.export import export
from gte_deploy.exporters.verification.answers import check_answers
from gte_deploy.models.description import describe
from gte_deploy.models.heads import MultiVectorHead
from gte_deploy.tasks.multi_vector import MULTI_VECTOR
from runtime_models import make_word_checkpoint

TEXTS = ["the king, and the queen?", "a", "the old man (and the light) read: it is the house. " * 2]
PYLATE = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 24}


def make(folder, **options):
    options = {"config": PYLATE, **options}
    add_tokens(make_word_checkpoint(folder, task="embed", layers=1, seed=3, layout="original"), ["[Q] ", "[D] "])
    return add_multi_vector_modules(folder, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make(tmp_path_factory.mktemp("late") / "model")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    transformer = {"query_expansion": {"strategy": "min", "length": 9}, "query_length": 16, "document_length": 30}
    mask = {"skiplist_words": ["the", "."], "skiplist_tasks": ["query", "document"]}
    config = {"similarity_fn_name": "meanmaxsim", "prompts": {"query": "find ", "document": ""}}
    folder = tmp_path_factory.mktemp("native") / "model"
    return make(folder, library="sentence-transformers", transformer=transformer, mask=mask, config=config)


def report_of(bundle):
    return json.loads((bundle / "report.json").read_text(encoding="utf-8"))


TARGETS = [
    {"precision": "int8"},
    {"target": "cuda", "precision": "fp16"},
    {"format": "trt", "onnx_only": True},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in ({"target": "openvino"}, {"precision": "bf16"}, {"target": "cuda", "precision": "fp32"})
    ),
]


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_every_target_compares_both_outputs(options, checkpoint, tmp_path):
    bundle = export(checkpoint, tmp_path / "bundle", **options).path
    parity = report_of(bundle)["parity"]
    assert parity["passed"]
    for engine in parity["engines"]:
        assert set.intersection(*(set(case["outputs"]) for case in engine["cases"])) == set(MULTI_VECTOR.outputs)


def test_tokens_without_attention_keep_their_padding(checkpoint, tmp_path):
    for options in ({"target": "cuda", "precision": "fp16"}, {"format": "trt", "onnx_only": True}):
        with pytest.raises(ExportError, match="to which no token attends.*padding='keep'"):
            export(checkpoint, tmp_path / "bundle", padding="remove", **options)
    attended = make(tmp_path / "attended", config={**PYLATE, "attend_to_expansion_tokens": True})
    export(attended, tmp_path / "bundle", target="cuda", precision="fp16", padding="remove")
    assert (
        "packed_attention"
        in json.loads((tmp_path / "bundle/manifest.json").read_text())["graphs"]["onnxruntime"]["fusions"]
    )


@pytest.mark.parametrize("which", ["checkpoint", "native"])
def test_the_answers_are_compared_with_the_library(which, request, bundle_of):
    pytest.importorskip("sentence_transformers", minversion="6.2")
    checks = report_of(bundle_of(request.getfixturevalue(which)))["parity"]["checks"]
    (answers,) = [check for check in checks if check["name"] == "answers"]
    assert answers["compared"]["library"].startswith("MultiVectorEncoder of sentence-transformers")
    assert answers["compared"]["answers"] == 28 and not answers["skipped"]


@pytest.mark.parametrize(
    "changed",
    [
        {"query_prefix": None},
        {"document_prefix": 20},
        {"expansion": None},
        {"skipped_in_documents": ()},
        {"document_length": 20},
    ],
    ids=str,
)
def test_a_misread_setting_fails_the_check(changed, checkpoint):
    pytest.importorskip("sentence_transformers", minversion="6.2")
    with gte_deploy.load(checkpoint, backend="torch") as model:
        assert check_answers(checkpoint, model).passed
        multi_vector = dataclasses.replace(model.spec.multi_vector, **changed)
        model.spec = dataclasses.replace(model.spec, multi_vector=multi_vector)
        found = check_answers(checkpoint, model)
    assert not found.passed and "encode_" in found.failures[0]


def test_a_wrong_head_fails_the_export(checkpoint, tmp_path, monkeypatch):
    call = MultiVectorHead.__call__
    traced = []

    def wrong(self, states):
        # The trace comes first; the reference of the comparison follows.
        traced.append(self)
        return call(self, states) * (1.01 if len(traced) == 1 else 1)

    monkeypatch.setattr(MultiVectorHead, "__call__", wrong)
    with pytest.raises(ParityError, match="token_vectors"):
        export(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("which", ["checkpoint", "native", "stanford"])
def test_the_library_reads_the_files_of_the_bundle(which, request, bundle_of, tmp_path):
    """MultiVectorEncoder gets the encoder's weights, which a bundle lacks, and answers from the bundle's own files."""
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.2")
    from shutil import copytree

    from gte_deploy.models.checkpoint import load_model

    if which == "stanford":
        words = {"query_token_id": "[SEP]", "doc_token_id": "[CLS]"}  # as [unused0]: one token wherever it is written
        folder = make_family_checkpoint(tmp_path / "stanford", "bert", "embed")
        source = add_stanford_projection(folder, query_maxlen=12, doc_maxlen=20, **words)
    else:
        source = request.getfixturevalue(which)
    bundle = copytree(bundle_of(source), tmp_path / "bundle")
    model = load_model(source)
    del model.token_projection
    model.save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(bundle / "model.safetensors")
    library = sentence_transformers.MultiVectorEncoder(str(bundle), device="cpu")
    with gte_deploy.load(bundle_of(source)) as opened:
        assert opened.similarity_fn_name == library.similarity_fn_name
        for method in ("encode_query", "encode_document"):
            found = getattr(opened, method)(TEXTS, truncation=True)
            for ours, theirs in zip(found, getattr(library, method)(TEXTS), strict=True):
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


def test_a_limit_of_the_export(checkpoint, tmp_path):
    spec = export(checkpoint, tmp_path / "bundle", max_length=16).manifest.spec
    assert (spec.max_length, spec.multi_vector.query_length, spec.multi_vector.document_length) == (16, 12, 16)
    longer = export(checkpoint, tmp_path / "longer", max_length=64).manifest.spec
    assert (longer.max_length, longer.multi_vector.document_length) == (64, 24)
    with gte_deploy.load(tmp_path / "longer") as model:
        assert len(model.encode_document(TEXTS[2] * 3, truncation=True, max_length=64, skip_words=())) == 64
    with pytest.raises(
        gte_deploy.ConfigError, match="lengthened to 12 tokens; expected a max_length of no less, not 8"
    ):
        export(checkpoint, tmp_path / "short", max_length=8)


def test_without_a_projection(tmp_path):
    folder = make(tmp_path / "model", library="sentence-transformers", widths=(), mask={}, config={})
    export(folder, tmp_path / "bundle")
    for graph in (tmp_path / "bundle" / "onnx").glob("*.onnx"):
        names = [output.name for output in onnx.load(graph, load_external_data=False).graph.output]
        assert names in (["last_hidden_state", "token_vectors"], ["token_vectors"])
    with gte_deploy.load(folder, backend="torch") as model, gte_deploy.load(tmp_path / "bundle") as exported:
        assert model.get_embedding_dimension() == model.spec.hidden_size
        for ours, theirs in zip(exported.encode_document(TEXTS), model.encode_document(TEXTS), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_int8_scores_stay_near(checkpoint, bundle_of):
    with (
        gte_deploy.load(checkpoint, backend="torch") as model,
        gte_deploy.load(bundle_of(checkpoint, precision="int8")) as exported,
    ):
        for method in ("encode_query", "encode_document"):
            found, wanted = (getattr(each, method)(TEXTS, truncation=True) for each in (exported, model))
            sides = zip(found, wanted, strict=True)
            assert all((ours * theirs).sum(1).mean() > 0.999 for ours, theirs in sides)


def test_a_conversion_keeps_the_projection(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "converted", layout="native")
    with gte_deploy.load(checkpoint, backend="torch") as model, gte_deploy.load(tmp_path / "converted") as other:
        assert isinstance(other.spec, ModelSpec) and other.spec == model.spec == describe(checkpoint).spec
        np.testing.assert_array_equal(other.encode_query(TEXTS[0]), model.encode_query(TEXTS[0]))
