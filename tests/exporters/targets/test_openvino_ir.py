"""OpenVINO's own format in a bundle: the output that other libraries take, the tokenizer, and refusals."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

torch = pytest.importorskip("torch")
openvino = pytest.importorskip("openvino")

from transformers import AutoTokenizer, GteForMaskedLM, GteModel  # noqa: E402

from factories import make_checkpoint  # noqa: E402
from gte_deploy.core.errors import InputError, MissingDependencyError  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.verification.results import BoundMissedError  # noqa: E402

TEXTS = ["w20 w30 w40", "w25", "w20 " * 50]
LIMIT = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ir"), task="fill-mask", layout="native", layers=1)


@pytest.fixture
def export_ir(checkpoint, tmp_path, trace_once):
    """`export_ir(kind, …)`: the bundle of the small checkpoint with OpenVINO's own format."""

    def get(kind, **options):
        return export(checkpoint, tmp_path / "bundle", max_length=LIMIT, openvino_ir=kind, **options).path

    return get


def compiled(bundle):
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(bundle / "openvino" / "openvino_model.xml", "CPU", hint)


@pytest.mark.parametrize("task", ["embed", "fill-mask"])
def test_it_has_the_one_output_that_libraries_take(export_ir, checkpoint, task):
    bundle = export_ir("model", task=task, target="openvino", **({"pooling": "mean"} if task == "embed" else {}))
    model = compiled(bundle)
    (output,) = model.outputs
    assert {value.any_name for value in model.inputs} == {"input_ids", "attention_mask"}
    tokens = AutoTokenizer.from_pretrained(bundle)(TEXTS, padding=True, truncation=True, return_tensors="np")
    feed = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    theirs = (GteModel if task == "embed" else GteForMaskedLM).from_pretrained(checkpoint).eval()
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(value) for name, value in feed.items()})
    assert output.any_name == ("last_hidden_state" if task == "embed" else "logits")
    real = feed["attention_mask"] == 1
    np.testing.assert_allclose(model(feed)[output][real], expected[output.any_name].numpy()[real], atol=2e-4)
    assert feed["input_ids"].shape[1] == LIMIT, "tokenizer_config.json has the limit of the bundle"


def test_the_tokenizer_is_that_of_transformers_and_truncates(export_ir):
    pytest.importorskip("openvino_tokenizers", reason="needs openvino-tokenizers: pip install '.[genai]'")
    bundle = export_ir("genai", task="embed", pooling="mean", precision="int8")
    compiled_tokenizer = openvino.compile_model(bundle / "openvino" / "openvino_tokenizer.xml", "CPU")
    found = compiled_tokenizer(TEXTS)
    expected = AutoTokenizer.from_pretrained(bundle)(TEXTS, padding=True, truncation=True, return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert compiled(bundle)({name: found[name] for name in ("input_ids", "attention_mask")})[0].shape == (3, LIMIT, 32)


def test_other_numbers_than_those_of_the_graph_are_refused(export_ir, monkeypatch, tmp_path):
    save = openvino.save_model

    def save_wrong(model, path, **options):
        """Save the hidden states times 1.001."""
        (result,) = model.results
        hidden = result.input_value(0)
        scaled = openvino.opset13.multiply(hidden, openvino.opset13.constant(np.float32(1.001)))
        scaled.output(0).set_names({"last_hidden_state"})
        save(openvino.Model([scaled], model.get_parameters()), path, **options)

    monkeypatch.setattr(openvino, "save_model", save_wrong)
    with pytest.raises(BoundMissedError, match=r"differs by .* from the ONNX graph"):
        export_ir("model", task="embed", pooling="mean")
    assert not (tmp_path / "bundle").exists()


def test_a_missing_library_is_named_before_anything_is_built(export_ir, monkeypatch):
    find = importlib.util.find_spec
    for module, extra in (("openvino_tokenizers", "genai"), ("openvino", "openvino")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, hidden=module: None if name == hidden else find(name)
        )
        with pytest.raises(MissingDependencyError, match=rf"\[{extra}\]"):
            export_ir("genai")


def test_a_task_and_a_precision_without_such_a_graph_are_refused(export_ir):
    with pytest.raises(InputError, match="not for task sparse.*--task fill-mask"):
        export_ir("model", task="sparse")
    with pytest.raises(InputError, match="openvino_ir is for precision fp32 and bf16 and int8"):
        export_ir("model", precision="int4-weight")
