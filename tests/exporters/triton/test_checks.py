"""Each mistake that one can make by hand in a repository is found, and told with its file."""

import shutil

import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.exporters.triton.checks import check_repository
from gte_deploy.exporters.triton.repository import export_repository

ENCODER, TOKENIZER, EMBED = "gte_encoder/config.pbtxt", "gte_tokenizer/config.pbtxt", "gte_embed/config.pbtxt"
CPU = "gte_encoder/configs/cpu.pbtxt"

MISTAKES = {
    "syntax": (ENCODER, "max_batch_size: 32", "max_batch_size 32", "Expected"),
    "unknown field": (ENCODER, "max_batch_size:", "max_batch_sizes:", 'no field named "max_batch_sizes"'),
    "unknown enum": (ENCODER, "KIND_GPU", "KIND_TPU", "KIND_TPU"),
    "name": (ENCODER, 'name: "gte_encoder"', 'name: "encoder"', "is not that of the folder"),
    "backend": (ENCODER, 'backend: "onnxruntime"', 'backend: "onnxrt"', "expected one of"),
    "file": (ENCODER, '"model.onnx"', '"encoder.onnx"', "1/encoder.onnx is missing"),
    "dtype": (ENCODER, "data_type: TYPE_FP32", "data_type: TYPE_FP16", "is TYPE_FP16, but float32 in model.onnx"),
    "dims": (ENCODER, "dims: [ 32 ]", "dims: [ 33 ]", "has the shape [-1, 33], but [-1, 32] in model.onnx"),
    "zero dims": (ENCODER, "dims: [ 32 ]", "dims: [ 0 ]", "sizes are positive, or -1 for any"),
    "rank": (ENCODER, "dims: [ 32 ]", "dims: [ 32, 1 ]", "has the shape [-1, 32, 1]"),
    "input": (ENCODER, 'name: "input_ids"', 'name: "ids"', "input ids is not in model.onnx"),
    "unfed": (ENCODER, 'name: "attention_mask"', 'name: "mask"', "model.onnx needs attention_mask"),
    "count": (ENCODER, "count: 1", "count: 0", "instance_group has a count of 0"),
    "negative count": (ENCODER, "count: 1", "count: -1", "instance_group has a count of -1"),
    "kind": (CPU, "kind: KIND_CPU", "kind: KIND_GPU", "which a machine without a GPU refuses"),
    "parameter": (CPU, "intra_op_thread_count", "intra_op_threads", "reads no parameter intra_op_threads"),
    "preferred": (ENCODER, "preferred_batch_size: 32", "preferred_batch_size: 64", "outside 1 to 32"),
    "warm-up file": (ENCODER, '"input_ids_16"', '"input_ids_17"', "warmup/input_ids_17 is missing"),
    "warm-up shape": (ENCODER, "dims: [ 16 ]", "dims: [ 17 ]", "has 128 bytes, and its shape 136"),
    "warm-up input": (ENCODER, 'key: "input_ids"', 'key: "ids"', "has ids, which is no input"),
    "warm-up rows": (ENCODER, "  batch_size: 32", "  batch_size: 33", "has 33 rows"),
    "no step": (EMBED, 'model_name: "gte_encoder"', 'model_name: "encoder"', "step encoder is no model"),
    "step input": (EMBED, 'key: "input_ids"', 'key: "ids"', "has no output ids"),
    "step wire": (EMBED, 'value: "input_ids"', 'value: "ids"', "takes input_ids, which no step gives"),
    "ensemble dtype": (EMBED, "data_type: TYPE_BOOL", "data_type: TYPE_INT32", "TYPE_INT32 is given, but TYPE_BOOL"),
    "ensemble dims": (EMBED, "dims: [ 1 ]", "dims: [ 2 ]", "[-1, 2] is given, but [-1, 1] is expected"),
    "ensemble rows": (EMBED, "max_batch_size: 32", "max_batch_size: 64", "is above that of gte_encoder, 32"),
    "ensemble output": (EMBED, 'name: "EMBEDDING"', 'name: "VECTOR"', "output VECTOR comes from no step"),
    "optional": (
        TOKENIZER,
        'name: "PROMPT"\n  data_type: TYPE_STRING\n  dims: [ 1 ]\n  optional: true\n',
        'name: "PROMPT"\n  data_type: TYPE_STRING\n  dims: [ 1 ]\n',
        "PROMPT as gte_tokenizer's PROMPT: an optional tensor feeds a required input",
    ),
    "unknown to python": (TOKENIZER, '"spare_tokens"', '"spare_token"', "python reads no parameter spare_token"),
}


@pytest.fixture(scope="module")
def sound(bundles, tmp_path_factory):
    return export_repository(bundles["embed"], tmp_path_factory.mktemp("sound") / "repository").path


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "repository")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, copy):
    file, old, new, message = MISTAKES[name]
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    problems = check_repository(copy)
    assert any(message in problem for problem in problems), problems
    # What is wrong with a model may show in the ensembles that are made of it, too.
    assert any(problem.startswith((file, EMBED)) for problem in problems), problems


def test_a_missing_configuration(copy):
    (copy / ENCODER).unlink()
    assert f"{ENCODER} is missing" in check_repository(copy)


def test_missing_weights(copy):
    (copy / "gte_encoder" / "1" / "model.onnx_data").unlink()
    problems = check_repository(copy)
    assert any("reads its weights from model.onnx_data, which is missing" in problem for problem in problems)


def test_a_broken_graph(copy):
    (copy / "gte_encoder" / "1" / "model.onnx").write_bytes(b"no graph")
    assert any("model.onnx is no graph" in problem for problem in check_repository(copy))


@pytest.mark.parametrize(
    ("code", "message"), [("class Broken(:", "is not Python"), ("x = 1", "no class TritonPythonModel")]
)
def test_a_broken_python_model(copy, code, message):
    (copy / "gte_tokenizer" / "1" / "model.py").write_text(code)
    assert any(message in problem for problem in check_repository(copy))


def test_no_version(copy):
    shutil.rmtree(copy / "gte_embed" / "1")
    assert any("there is no version folder" in problem for problem in check_repository(copy))


def test_labels(bundles, tmp_path):
    path = export_repository(bundles["classify"], tmp_path / "r").path
    (path / "gte_rerank_output" / "labels.txt").write_text("one\ntwo\n")
    (path / "gte_rerank" / "labels.txt").unlink()
    problems = check_repository(path)
    assert any("SCORE has 1 values, and labels.txt 2 labels" in problem for problem in problems)
    assert any("takes its labels from labels.txt, which is missing" in problem for problem in problems)


def test_the_tensorrt_accelerator_is_named_with_its_replacement(copy):
    file = copy / ENCODER
    accelerator = 'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }'
    file.write_text(f"{file.read_text()}{accelerator}\n")
    (problem,) = check_repository(copy)
    assert problem.startswith(ENCODER) and "--format triton --engine BUNDLE" in problem


def test_not_a_repository(tmp_path):
    with pytest.raises(InputError, match="is no model repository"):
        check_repository(tmp_path)
