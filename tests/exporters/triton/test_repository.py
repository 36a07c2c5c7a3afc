"""The files of a repository: which models, which configurations, what is refused, how it gets its name."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import gte_deploy
from gte_deploy.bundle.manifest import PlanEntry
from gte_deploy.core.errors import BundleError, ExportError, InputError, ParityError
from gte_deploy.core.files import sha256_file
from gte_deploy.core.spec import Profile, TensorSpec
from gte_deploy.exporters.triton import repository as triton_repository
from gte_deploy.exporters.triton.checks import check_repository
from gte_deploy.exporters.triton.configs import length_buckets
from gte_deploy.exporters.triton.repository import export_repository
from gte_deploy.tasks import TASKS
from triton_emulation import Repository

EMBEDDING = {"gte_embed", "gte_embed_fast", "gte_embed_ids", "gte_token_embed"}
ENSEMBLES = {
    "fill-mask": EMBEDDING | {"gte_fill_mask", "gte_fill_mask_ids"},
    "embed": EMBEDDING,
    "classify": EMBEDDING | {"gte_rerank", "gte_rerank_ids"},
    "token-classify": EMBEDDING | {"gte_classify_tokens", "gte_sparse", "gte_sparse_ids"},
    "sparse": EMBEDDING | {"gte_sparse", "gte_sparse_ids", "gte_sparse_query"},
    "hybrid": EMBEDDING | {"gte_sparse", "gte_sparse_ids", "gte_hybrid", "gte_hybrid_ids"},
    "multi-vector": {"gte_multi_vector_query", "gte_multi_vector_document", "gte_multi_vector_ids"},
}
STRAIGHT = {"gte_token_embed", "gte_embed_fast", "gte_hybrid"}
"""Ensembles of texts whose answers come straight from the encoder, or from the models of two other ensembles."""
SIDES = {"gte_multi_vector_query", "gte_multi_vector_document"}
"""Ensembles that differ before the encoder, and have one model of answers."""


def output_models(ensembles):
    """The models that compute the answers of ensembles."""
    own = {name for name in ensembles if name not in STRAIGHT | SIDES and not name.endswith("_ids")}
    return {f"{name}_output" for name in own} | ({"gte_multi_vector_output"} if SIDES & ensembles else set())


@pytest.mark.parametrize("task", ENSEMBLES)
def test_models_by_task(task, repository):
    opened = repository(task)
    models = {path.name for path in opened.path.iterdir() if path.is_dir()}
    ensembles = {name for name in models if opened.config(name).platform == "ensemble"}
    assert ensembles == ENSEMBLES[task]
    assert models - ensembles == {"gte_tokenizer", "gte_encoder", *output_models(ensembles)}
    for name in models:
        assert (opened.path / name / "1").is_dir()
        assert opened.config(name).version_policy.latest.num_versions == 1


@pytest.mark.parametrize("task", ENSEMBLES)
def test_tasks_name_the_tensors_of_their_ensembles(task, repository):
    opened = repository(task)
    plain = {"TEXT", "TEXT_PAIR", "TRUNCATION", "MAX_LENGTH", "PROMPT", "PROMPT_NAME"}
    declared = {ensemble.name: (set(), set()) for ensemble in TASKS[task].ensembles}
    for ensemble in TASKS[task].ensembles:
        declared[ensemble.name][0].update(ensemble.options)
        declared[ensemble.name][1].update(ensemble.outputs)
    for name, (options, outputs) in declared.items():
        config = opened.config(name)
        assert {tensor.name for tensor in config.input} - plain == options
        assert {tensor.name for tensor in config.output} == outputs


@pytest.mark.parametrize("task", ENSEMBLES)
def test_the_checks_find_nothing(task, repositories):
    assert check_repository(repositories[task]) == []


def test_every_file_is_in_the_manifest_and_readable(repositories):
    path = repositories["fill-mask"]
    files = json.loads((path / "manifest.json").read_text())["files"]
    there = {
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert there == {*files, "manifest.json"}
    for name, entry in files.items():
        file = path / name
        assert (file.stat().st_size, sha256_file(file)) == (entry["size"], entry["sha256"])
        assert file.stat().st_mode & 0o777 == 0o644


def test_devices(repositories):
    gpu, cpu = (Repository(repositories["fill-mask"], variant) for variant in (None, "cpu"))
    for opened, kind, rows in ((gpu, "KIND_GPU", 32), (cpu, "KIND_CPU", 8)):
        encoder = opened.config("gte_encoder")
        (group,) = encoder.instance_group
        assert (group.Kind.Name(group.kind), group.count, encoder.max_batch_size) == (kind, 1, rows)
        assert encoder.dynamic_batching.max_queue_delay_microseconds == 500
        python = opened.config("gte_tokenizer")
        assert python.instance_group[0].Kind.Name(python.instance_group[0].kind) == "KIND_CPU"
        assert python.dynamic_batching.max_queue_delay_microseconds == 0
    assert cpu.config("gte_encoder").parameters["intra_op_thread_count"].string_value == "1"
    assert list(gpu.config("gte_encoder").dynamic_batching.preferred_batch_size) == [16, 32]


@pytest.mark.parametrize("variant", [None, "cpu"])
def test_every_model_batches_and_no_queue_has_a_policy(repositories, variant):
    """With one, Triton's batcher lets single requests wait for 500 ms: exporters/triton/configs.py, `_batching`."""
    opened = Repository(repositories["fill-mask"], variant)
    for name in ("gte_tokenizer", "gte_encoder", "gte_embed_output", "gte_fill_mask_output"):
        batching = opened.config(name).dynamic_batching
        assert opened.config(name).HasField("dynamic_batching") and not batching.HasField("default_queue_policy")


def test_warm_up_is_the_shortest_and_the_longest(repository):
    opened = repository("fill-mask")
    samples = opened.config("gte_encoder").model_warmup
    lengths = {sample.name: list(sample.inputs["input_ids"].dims) for sample in samples}
    assert lengths == {"shortest": [16], "longest": [128]}
    for sample in samples:
        rows = {}
        for name, value in sample.inputs.items():
            data = (opened.path / "gte_encoder" / "warmup" / value.input_data_file).read_bytes()
            rows[name] = np.frombuffer(data, np.int64).reshape([1, *value.dims])
        assert (rows["attention_mask"] == 1).all()
        opened._run("gte_encoder", [rows])


def test_options_reach_the_configurations(bundles, tmp_path):
    result = export_repository(
        bundles["embed"],
        tmp_path / "r",
        max_batch_size=4,
        max_queue_size=7,
        queue_timeout_s=0.5,
        threads=3,
        response_cache=True,
        model_version=5,
    )
    assert result.checked and result.devices == ("gpu", "cpu") and set(result.ensembles) == ENSEMBLES["embed"]
    opened = Repository(result.path)
    encoder = opened.config("gte_encoder")
    assert encoder.max_batch_size == 4
    for name in ("gte_tokenizer", "gte_encoder", "gte_embed_output"):
        policy = opened.config(name).dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 7 and policy.allow_timeout_override
        assert policy.default_timeout_microseconds == 500_000 and policy.timeout_action == policy.REJECT
    assert encoder.parameters["intra_op_thread_count"].string_value == "3"
    # The key of Triton's cache is made of the inputs' bytes, without their shapes: only texts are told apart by it.
    models = [path.name for path in result.path.iterdir() if path.is_dir()]
    cached = {name for name in models if opened.config(name).response_cache.enable}
    assert cached == {"gte_embed", "gte_token_embed"}
    assert (result.path / "gte_encoder" / "5" / "model.onnx").is_file()
    assert "--cache-config=local" in (result.path / "README.md").read_text()


def test_the_spec_reaches_clients_and_python_models(repository, bundles):
    from gte_deploy.bundle.manifest import read_manifest
    from gte_deploy.core.spec_json import spec_from_json

    opened = repository("embed")
    expected = read_manifest(bundles["embed"]).spec
    for name in ("gte_embed", "gte_token_embed", "gte_tokenizer"):
        assert spec_from_json(json.loads(opened.config(name).parameters["gte_deploy_spec"].string_value)) == expected
    facts = json.loads(repository("fill-mask").config("gte_fill_mask").parameters["gte_deploy"].string_value)
    assert facts["mask_token"] == "[MASK]" and facts["max_batch_size"] == 8


def test_a_checkpoint_is_exported_first(word_checkpoints, trace_once, tmp_path):
    result = export_repository(word_checkpoints["embed"], tmp_path / "r", max_length=64)
    assert json.loads((result.path / "manifest.json").read_text())["spec"]["max_length"] == 64
    assert (result.path / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_python_models_need_nothing_but_themselves(repositories, tmp_path):
    """Imported from the repository in a fresh interpreter: the copies are found before any installed gte_deploy."""
    (tmp_path / "triton_python_backend_utils.py").write_text("class TritonError: pass\n")
    program = (
        "import importlib.util, pathlib, sys\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "spec = importlib.util.spec_from_file_location('model', file)\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "ours = {n: m for n, m in sys.modules.items() if n.split('.')[0] == 'gte_deploy'}\n"
        "assert ours and all(m.__file__.startswith(str(file.parent)) for m in ours.values()), ours\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    models = sorted(
        {path.parents[1].name: path for r in repositories.values() for path in r.glob("*/1/model.py")}.values()
    )
    outputs = output_models(set().union(*ENSEMBLES.values()))
    assert {path.parents[1].name for path in models} == {"gte_tokenizer", *outputs}
    for file in models:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run([sys.executable, "-c", program, file], check=True, env=environment, timeout=60)


def test_replacing(bundles, tmp_path):
    path = export_repository(bundles["embed"], tmp_path / "r").path
    (path / "gte_tokenizer" / "1" / "__pycache__").mkdir()
    (path / "gte_tokenizer" / "1" / "__pycache__" / "model.cpython-312.pyc").touch()  # what a server leaves
    with pytest.raises(ExportError, match="--force"):
        export_repository(bundles["embed"], path)
    export_repository(bundles["fill-mask"], path, force=True)
    assert (path / "gte_fill_mask").is_dir()
    assert not (path / "gte_tokenizer" / "1" / "__pycache__").exists()
    (path / "mine.txt").touch()
    with pytest.raises(ExportError, match=r"no export wrote: mine\.txt"):
        export_repository(bundles["embed"], path, force=True)


def test_a_target_is_refused_before_anything_is_exported(word_checkpoints, tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").touch()
    monkeypatch.setattr(triton_repository, "export", lambda *args, **options: pytest.fail("exported"))
    with pytest.raises(ExportError, match="is not a bundle, so it is not replaced"):
        export_repository(word_checkpoints["embed"], tmp_path / "r")


def test_a_failed_export_leaves_nothing(word_checkpoints, tmp_path, monkeypatch):
    def fail(model, output, **options):
        output.mkdir()
        raise ParityError("differs")

    monkeypatch.setattr(triton_repository, "export", fail)
    with pytest.raises(ParityError):
        export_repository(word_checkpoints["embed"], tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        (None, {}, "gte-en-mlm-tiny-triton-fp32"),
        ("Alibaba-NLP/gte-large-en-v1.5", {"precision": "int8"}, "gte-large-en-v1.5-triton-int8"),
        ("somewhere/my-model", {"target": "cuda"}, "my-model-triton-fp16"),
    ],
)
def test_names(model, options, name):
    assert str(triton_repository._default_output(model, None, options)) == name


def test_a_bundle_is_not_replaced_by_a_repository(altered_bundle, bundles):
    target = altered_bundle("embed")
    with pytest.raises(ExportError, match="is not the manifest of a gte-deploy-triton-repository"):
        export_repository(bundles["embed"], target, force=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be an integer from 1 to 1,024"),
        ({"max_queue_size": -1}, "max_queue_size"),
        ({"queue_timeout_s": 0}, "queue_timeout_s is 0"),
        ({"threads": 0}, "threads"),
        ({"model_version": 0}, "model_version"),
        ({"accelerator": "tensorrt"}, "accelerator is 'tensorrt', and .* --format triton --engine BUNDLE"),
        ({"precision": "int8"}, "is a bundle already; precision"),
        ({"engine": "somewhere"}, "give engine or a model"),
    ],
)
def test_arguments_out_of_range(options, message, bundles, tmp_path):
    with pytest.raises(InputError, match=message):
        export_repository(bundles["embed"], tmp_path / "r", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_computes_something_else_is_not_written(bundles, tmp_path, monkeypatch):
    from gte_deploy.exporters.triton import graph

    write = graph.write_graph

    def wrong(source, target, spec):
        write(source, target, spec)
        model = graph.onnx.load(target, load_external_data=False)
        next(node for node in model.graph.node if node.output[0] == "embedding_cls").op_type = "Neg"
        wrong_input = next(node for node in model.graph.node if node.output[0] == "embedding_cls")
        del wrong_input.attribute[:], wrong_input.input[:]
        wrong_input.input.append("embedding_mean")
        graph.onnx.save(model, target)

    monkeypatch.setattr(graph, "write_graph", wrong)
    with pytest.raises(ParityError, match="in embedding_cls"):
        export_repository(bundles["fill-mask"], tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_pass_the_checks_is_not_written(bundles, tmp_path, monkeypatch):
    configs = triton_repository.all_configs

    def broken(serving, device):
        made = configs(serving, device)
        made["gte_encoder"]["instance_group"][0]["count"] = 0
        return made

    monkeypatch.setattr(triton_repository, "all_configs", broken)
    with pytest.raises(ExportError, match="count of 0"):
        export_repository(bundles["embed"], tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_logits_of_every_token_are_not_served(word_checkpoints, bundle_of, tmp_path):
    bundle = bundle_of(word_checkpoints["fill-mask"], logits="all")
    with pytest.raises(ExportError, match="--logits masked"):
        export_repository(bundle, tmp_path / "r")


@pytest.mark.parametrize(
    ("task", "missing", "message"),
    [
        ("fill-mask", "mask_positions", "logits of every token"),
        ("classify", "logits", "for task classify, but its encoder has no output logits"),
    ],
)
def test_a_plan_without_its_head_is_refused(task, missing, message, altered_bundle, tmp_path):
    plan = plan_entry(task, SHORT)
    without = {name: tuple(t for t in getattr(plan, name) if t.name != missing) for name in ("inputs", "outputs")}
    plan = dataclasses.replace(plan, **without)
    bundle = altered_bundle(task, {"tensorrt/model.plan": b"plan"}, plan=plan)
    with pytest.raises(ExportError, match=message):
        export_repository(engine=bundle, output=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_integer_graphs_are_for_cpus(altered_bundle, tmp_path):
    result = export_repository(altered_bundle("embed", precision="int8"), tmp_path / "r")
    assert result.devices == ("cpu",)
    for variant in (None, "cpu"):
        (group,) = Repository(result.path, variant).config("gte_encoder").instance_group
        assert group.kind == group.KIND_CPU
    assert "--gpus" not in (result.path / "README.md").read_text()


def test_graphs_for_cuda_are_for_gpus(altered_bundle, tmp_path):
    result = export_repository(altered_bundle("embed", target="cuda"), tmp_path / "r")
    assert result.devices == ("gpu",)
    assert not (result.path / "gte_encoder" / "configs").exists()


def plan_entry(task, *profiles, variant="tensorrt", ids="int32", states=True):
    tokens = [TensorSpec(name, ids, ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
    masks = [TensorSpec("mask_positions", "int64", ("masks", 2))] if task == "fill-mask" else []
    outputs = [TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 32))] if states else []
    if task == "classify":
        outputs.append(TensorSpec("logits", "float32", ("batch", 1)))
    if task == "fill-mask":
        outputs.append(TensorSpec("logits", "float32", ("masks", 128)))
    if task == "embed":
        outputs.append(TensorSpec("sentence_embedding", "float16", ("batch", 32)))
    if task == "multi-vector":
        outputs.append(TensorSpec("token_vectors", "float16", ("batch", "sequence", 8)))
    return PlanEntry(
        path="tensorrt/model.plan",
        variant=variant,
        version="10.9.0.34",
        compute_capabilities=("8.9",),
        profiles=tuple(Profile(*profile) for profile in profiles),
        inputs=(*tokens, *masks),
        outputs=tuple(outputs),
        layers={},
    )


SHORT, LONG = ((1, 1), (8, 16), (64, 32)), ((1, 33), (2, 100), (4, 128))


@pytest.mark.parametrize(("wanted", "rows"), [(None, 64), (16, 16), (4, 4)])
def test_a_plan_serves_all_its_lengths_with_its_largest_batch(wanted, rows, altered_bundle, tmp_path):
    bundle = altered_bundle("embed", {"tensorrt/model.plan": b"plan"}, plan=plan_entry("embed", SHORT, LONG))
    result = export_repository(engine=bundle, output=tmp_path / "r", max_batch_size=wanted)
    assert result.devices == ("gpu",) and result.checked
    opened = Repository(result.path, None)
    encoder = opened.config("gte_encoder")
    assert (encoder.backend, encoder.max_batch_size) == ("python", rows)
    assert all(tensor.allow_ragged_batch for tensor in encoder.input)
    assert json.loads(encoder.parameters["profiles"].string_value) == [[1, 32, 64], [33, 128, 4]]
    plan = opened.config("gte_plan")
    assert (plan.backend, plan.max_batch_size) == ("tensorrt", 0)
    assert list(plan.instance_group[0].profile) == ["0", "1"]
    assert plan.parameters["execution_context_allocation_strategy"].string_value == "ON_PROFILE_CHANGE"
    assert [list(sample.inputs["input_ids"].dims) for sample in plan.model_warmup] == [[64, 32], [4, 128]]
    assert (result.path / "gte_plan" / "1" / "model.plan").read_bytes() == b"plan"
    # Hidden states are large: few rows of them are joined.
    for name in ("gte_token_encoder", "gte_token_embed"):
        assert opened.config(name).max_batch_size == 4
    assert json.loads(opened.config("gte_embed").parameters["gte_deploy_spec"].string_value)["max_length"] == 128
    buckets = opened.config("gte_tokenizer").parameters["length_buckets"].string_value
    assert buckets.split(",")[-1] == "128"
    assert {t.name: t.data_type for t in opened.config("gte_tokenizer").output} == {
        t.name: t.data_type for t in encoder.input
    }


@pytest.fixture
def served_plan(altered_bundle, bundles, tmp_path, monkeypatch):
    """`served_plan(task, **options)`: a repository of a plan, the model of its graph, and the shapes of its runs.

    ONNX Runtime runs the graph of the bundle in place of the plan, which has the same inputs and outputs.
    """
    models = []

    def make(task, states=True, **options):
        plan = plan_entry(task, SHORT, LONG, states=states)
        bundle = altered_bundle(task, {"tensorrt/model.plan": b"plan"}, plan=plan)
        opened = Repository(export_repository(engine=bundle, output=tmp_path / "r", **options).path, None)
        models.append(gte_deploy.load(bundles[task], backend="onnx", num_threads=1))
        run, shapes, profiles = opened._run, [], (Profile(*SHORT), Profile(*LONG))

        def run_plan(name, inputs):
            if name != "gte_plan":
                return run(name, inputs)
            (feed,) = inputs
            assert feed["input_ids"].dtype == feed["attention_mask"].dtype == np.int32
            assert any(profile.takes(*feed["input_ids"].shape) for profile in profiles)
            shapes.append(feed["input_ids"].shape)
            ids, mask = (feed[name].astype(np.int64) for name in ("input_ids", "attention_mask"))
            batch = gte_deploy.backends.base.Batch(ids, mask, feed.get("mask_positions"))
            return [models[-1]._backend.run(batch, feed.requested_output_names())]

        monkeypatch.setattr(opened, "_run", run_plan)
        return opened, models[-1], shapes

    yield make
    for model in models:
        model.close()


def test_answers_of_a_plan(served_plan):
    """A plan takes 32-bit ids and (row, token) pairs of masks, and pools in no way of its own."""
    opened, model, shapes = served_plan("fill-mask")
    texts = ["the [MASK] of [MASK]", "a king", "[MASK]", "river " * 50]
    first, second = opened.ask("gte_embed", {"TEXT": texts[:3], "POOLING": ["cls"] * 3}, {"TEXT": texts})
    np.testing.assert_allclose(first["EMBEDDING"], model.encode(texts[:3], pooling="cls"), atol=1e-5)
    np.testing.assert_allclose(second["EMBEDDING"], model.encode(texts), atol=1e-5)
    assert shapes == [(4, 56), (3, 16)]  # together they would be more than the 4 rows of a long run
    masked = [{"TEXT": [texts[0], texts[2]], "TOP_K": [2, 2]}, {"TEXT": [texts[2]], "TOP_K": [2]}]
    for request, answer in zip(masked, opened.ask("gte_fill_mask", *masked), strict=True):
        for row, text in enumerate(request["TEXT"]):
            expected = model.fill_mask(text, top_k=2)
            expected = expected if isinstance(expected[0], list) else [expected]
            found = answer["TOKEN_ID"][row, : len(expected)].tolist()
            assert found == [[item["token"] for item in best] for best in expected]


def test_a_plan_serves_queries_and_documents(served_plan):
    opened, model, shapes = served_plan("multi-vector")
    assert check_repository(opened.path) == []
    assert [tensor.name for tensor in opened.config("gte_encoder").output] == ["token_vectors"]
    texts = ["a king", "the king of paris is a man. " * 4]
    documents = [{"TEXT": [text]} for text in (*texts, "the river", "water")]
    for ensemble, requests, encode in (
        ("gte_multi_vector_document", documents, model.encode_document),
        ("gte_multi_vector_query", documents[:1], model.encode_query),
    ):
        for request, answer in zip(requests, opened.ask(ensemble, *requests), strict=True):
            expected = encode(request["TEXT"][0])
            assert answer["TOKENS"].tolist() == [[len(expected)]]
            np.testing.assert_allclose(answer["TOKEN_EMBEDDINGS"][0], expected, atol=1e-5)
    assert shapes == [(4, 40), (1, 16)]  # padding to 40 tokens costs less than another run


def test_a_plan_for_shorter_texts_than_queries(altered_bundle, tmp_path):
    short = ((1, 1), (8, 8), (64, 8))
    bundle = altered_bundle("multi-vector", {"tensorrt/model.plan": b"plan"}, plan=plan_entry("multi-vector", short))
    with pytest.raises(ExportError, match="the plan take 8 tokens; queries are lengthened to 12 tokens"):
        export_repository(engine=bundle, output=tmp_path / "r")


@pytest.mark.parametrize("task", ["embed", "classify", "fill-mask"])
def test_a_plan_of_answers_serves_only_these(served_plan, task):
    opened, model, _ = served_plan(task, states=False)
    assert check_repository(opened.path) == []
    ensembles = {
        path.name for path in opened.path.iterdir() if path.is_dir() and opened.config(path.name).platform == "ensemble"
    }
    assert ensembles == ENSEMBLES[task] - (EMBEDDING if task != "embed" else {"gte_token_embed"})
    assert not (opened.path / "gte_token_encoder").exists()
    outputs = {tensor.name for tensor in opened.config("gte_encoder").output}
    assert outputs == (
        {"embedding_cls", "embedding_finished", "embedding_normalized"} if task == "embed" else {"logits"}
    )
    assert [tensor.name for tensor in opened.config("gte_plan").output] == [
        name for name in model._backend.outputs if name != "last_hidden_state"
    ]
    text = (opened.path / "README.md").read_text()
    assert "gives only the answer of its task" in text and "gte_token_embed" not in text
    first = {"embed": "gte_embed", "classify": "gte_rerank", "fill-mask": "gte_fill_mask"}[task]
    assert f"/v2/models/{first}/infer" in text
    if task == "embed":
        texts = ["a king", "river " * 50]
        (answer,) = opened.ask("gte_embed", {"TEXT": texts})
        np.testing.assert_allclose(answer["EMBEDDING"], model.encode(texts), atol=1e-5)
        (error,) = opened.ask("gte_embed", {"TEXT": texts, "POOLING": ["mean"] * 2})
        assert "pools by 'cls'" in str(error) and "--outputs answer do not have" in str(error)
    elif task == "classify":
        (answer,) = opened.ask("gte_rerank", {"TEXT": ["a king", "a"], "TEXT_PAIR": ["the river", "b"]})
        expected = model.predict([("a king", "the river"), ("a", "b")])
        np.testing.assert_allclose(answer["SCORE"][:, 0], expected, atol=1e-5)
    else:
        (answer,) = opened.ask("gte_fill_mask", {"TEXT": ["the [MASK]"], "TOP_K": [2]})
        assert answer["TOKEN_ID"][0, 0].tolist() == [item["token"] for item in model.fill_mask("the [MASK]", top_k=2)]


def test_requests_of_a_plan_are_joined_up_to_the_rows_of_their_length(served_plan):
    """Short texts run in batches of 64 rows, long ones in batches of 4: the profiles are 64x32 and 4x128."""
    opened, model, shapes = served_plan("embed")
    short, long = [f"the king {number}" for number in range(70)], ["river " * 60, "queen " * 61, "the " * 63] * 2
    texts = [*short, *long]
    answers = opened.ask("gte_embed_fast", *({"TEXT": [text]} for text in texts))
    assert shapes == [(2, 80), (4, 64), (64, 16), (6, 16)]
    expected = model.encode(texts)
    np.testing.assert_allclose([answer["EMBEDDING"][0] for answer in answers], expected, atol=1e-5)
    scaled = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose([answer["NORMALIZED_EMBEDDING"][0] for answer in answers], scaled, atol=1e-5)
    shapes.clear()
    (answer,) = opened.ask("gte_token_embed", {"TEXT": long[:4]})
    assert shapes == [(4, 80)] and answer["TOKEN_EMBEDDINGS"].shape == (4, 80, 32)


def test_masks_of_a_plan_are_joined_up_to_its_most(served_plan):
    """Two requests have four rows, and eight masks each as the longest row has: a run takes at most 16 of the 32."""
    opened, model, shapes = served_plan("fill-mask")
    opened.model("gte_encoder")._max_masks = 16
    requests = [{"TEXT": ["[MASK] " * 7, "a [MASK]"]}, {"TEXT": ["the [MASK]", "[MASK] [MASK] " * 4]}]
    answers = opened.ask("gte_fill_mask", *requests)
    assert shapes == [(2, 16), (2, 16)]
    for request, answer in zip(requests, answers, strict=True):
        for row, text in enumerate(request["TEXT"]):
            expected = model.fill_mask(text)
            best = expected[-1] if isinstance(expected[0], list) else expected
            count = answer["MASKS"][row, 0]
            assert answer["TOKEN_ID"][row, count - 1].tolist() == [item["token"] for item in best]


def test_wrong_token_ids_of_a_plan_fail_alone(served_plan):
    opened, model, shapes = served_plan("embed")
    ids = np.array([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    requests = [{"INPUT_IDS": ids, "ATTENTION_MASK": mask}]
    for changed in (ids + 1000, -ids):
        requests.append({"INPUT_IDS": changed, "ATTENTION_MASK": mask})
    requests.append({"INPUT_IDS": np.ones((1, 129), np.int64), "ATTENTION_MASK": np.ones((1, 129), np.int64)})
    requests.append({"INPUT_IDS": ids, "ATTENTION_MASK": mask[:, :3]})
    good, *wrong = opened.ask("gte_embed_ids", *requests)
    batch = gte_deploy.backends.base.Batch(ids, mask)
    expected = model._backend.run(batch, ["sentence_embedding"])["sentence_embedding"]
    np.testing.assert_allclose(good["EMBEDDING"], expected, atol=1e-5)
    for error, message in zip(
        wrong,
        [
            "the inputs 0, 1 have token ids outside the vocabulary of 128",
            "the inputs 0, 1 have token ids outside the vocabulary",
            "rows of 129 tokens fit no profile of the plan; the lengths are 1 to 32, 33 to 128",
            "attention_mask has the shape [2, 3], and input_ids [2, 4]",
        ],
        strict=True,
    ):
        assert f"InputError: {message}" in str(error)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "holds no TensorRT plan"),
        (plan_entry("embed", SHORT, variant="tensorrt-rtx"), "holds a tensorrt-rtx engine"),
    ],
)
def test_plans_that_triton_cannot_run(plan, message, altered_bundle, tmp_path):
    files = {"tensorrt/model.plan": b"plan"} if plan else None
    with pytest.raises(BundleError, match=message):
        export_repository(engine=altered_bundle("embed", files, plan=plan), output=tmp_path / "r")


def test_a_plan_that_takes_no_single_text(altered_bundle, tmp_path):
    plan = plan_entry("embed", ((2, 1), (8, 16), (64, 32)))
    bundle = altered_bundle("embed", {"tensorrt/model.plan": b"plan"}, plan=plan)
    with pytest.raises(InputError, match="no profile of the plan takes a single text: 2x1:8x16:64x32"):
        export_repository(engine=bundle, output=tmp_path / "r")


def test_lengths_between_two_profiles_are_no_buckets(altered_bundle, tmp_path):
    plan = plan_entry("embed", ((1, 1), (8, 16), (64, 32)), ((1, 60), (2, 100), (4, 128)))
    bundle = altered_bundle("embed", {"tensorrt/model.plan": b"plan"}, plan=plan)
    opened = Repository(export_repository(engine=bundle, output=tmp_path / "r").path, None)
    buckets = opened.config("gte_tokenizer").parameters["length_buckets"].string_value
    assert buckets == "16,24,32,64,80,96,112,128"


@pytest.mark.parametrize("longest", [8, 16, 20, 128, 8192])
def test_buckets_waste_little(longest):
    buckets = length_buckets(longest)
    assert buckets[-1] == longest and buckets == sorted(set(buckets))
    for length in range(17, longest + 1):
        bucket = next(b for b in buckets if b >= length)
        assert bucket <= max(length + 8, 1.25 * length)
