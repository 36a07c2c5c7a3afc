"""`--bounds report`: what misses its bounds is written and says so everywhere; what is broken never is."""

import dataclasses
import json
import logging
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

import gte_deploy  # noqa: E402
from factories import make_checkpoint  # noqa: E402
from gte_deploy import cli as runtime_cli  # noqa: E402
from gte_deploy.backends.choice import choose_engine  # noqa: E402
from gte_deploy.backends.onnxruntime import OnnxBackend  # noqa: E402
from gte_deploy.bundle.manifest import read_manifest  # noqa: E402
from gte_deploy.core.errors import BackendError, InputError, ParityError  # noqa: E402
from gte_deploy.core.exit_codes import FAILURE, OK  # noqa: E402
from gte_deploy.exporters.cli import main  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.triton.repository import export_repository  # noqa: E402
from gte_deploy.exporters.verification import bounds  # noqa: E402
from gte_deploy.exporters.verification.checks import Check  # noqa: E402
from gte_deploy.exporters.verification.report import format_table  # noqa: E402
from gte_deploy.exporters.verification.report_page import ReportPage  # noqa: E402
from gte_deploy.exporters.verification.results import BoundMissedError  # noqa: E402

LENGTH = 32


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("gte_deploy.exporters.export.EVALUATION_TOKENS", 400)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("small") / "small", layers=1)


def shift(values):
    return values + 0.01


@pytest.mark.parametrize(("engine", "other"), [("onnxruntime", "openvino"), ("openvino", "onnxruntime")])
def test_a_miss_is_stamped_everywhere(trace_once, small, tmp_path, spoil, caplog, capsys, engine, other):
    spoil(engine, shift)
    result = export(small, tmp_path / "out", max_length=LENGTH, bounds="report")
    assert not result.parity.passed
    manifest = read_manifest(tmp_path / "out")
    assert manifest == result.manifest and manifest.missed_bounds == tuple(result.parity.failures())
    assert all(line.startswith(f"{engine} fp32: length ") for line in manifest.missed_bounds)
    assert "fp32" not in manifest.graphs[engine].computes and "fp32" in manifest.graphs[other].computes
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["parity"]["passed"] is False
    assert 'class="verdict failed"' in (tmp_path / "out" / "report.html").read_text()
    choice = choose_engine(manifest)
    assert choice.backend == {"onnxruntime": "onnx", "openvino": "openvino"}[other] and "missed" in choice.reason
    with caplog.at_level(logging.WARNING), gte_deploy.load(tmp_path / "out"):
        pass
    assert f"misses its bounds in {len(manifest.missed_bounds)} respects" in caplog.text
    assert runtime_cli.main(["info", str(tmp_path / "out")]) == OK
    shown = capsys.readouterr().out
    assert manifest.missed_bounds and all(miss in shown for miss in manifest.missed_bounds)


def test_the_command_does_what_was_asked_and_says_what_is_missed(trace_once, small, tmp_path, spoil, capsys):
    spoil("onnxruntime", shift)
    arguments = [str(small), str(tmp_path / "out"), "--max-len", str(LENGTH), "--quiet"]
    assert main(arguments) == FAILURE
    out, err = capsys.readouterr()
    assert "--bounds report writes the bundle" in err and not list(tmp_path.iterdir())
    assert main([*arguments, "--bounds", "report"]) == OK
    assert "MISSES ITS BOUNDS" in capsys.readouterr().out
    assert main([*arguments, "--bounds", "report", "--json", "--force"]) == OK
    result = json.loads(capsys.readouterr().out)
    assert result["missed_bounds"] and result["parity"]["passed"] is False


def test_a_bundle_within_its_bounds_is_the_same_either_way(trace_once, small, tmp_path, caplog):
    manifests = [export(small, tmp_path / how, max_length=LENGTH, bounds=how).manifest for how in ("strict", "report")]
    assert [manifest.missed_bounds for manifest in manifests] == [(), ()]
    assert manifests[0].graphs == manifests[1].graphs
    with caplog.at_level(logging.WARNING), gte_deploy.load(tmp_path / "report"):
        pass
    # torch's own tracing may log while the bundles are made.
    assert [record for record in caplog.records if record.name.startswith("gte_deploy")] == []


def not_a_number(values):
    values = values.copy()
    values.flat[:] = math.nan
    return values


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_numbers_that_are_not_finite_are_never_written(trace_once, small, tmp_path, spoil, engine):
    spoil(engine, not_a_number)
    with pytest.raises(BoundMissedError, match=r"(?s)a number is not finite.*No bundle was written") as error:
        export(small, tmp_path / "out", max_length=LENGTH, bounds="report")
    assert "--bounds report" not in str(error.value), "which would not help"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "error"),
    [(lambda found: {**found, "logits": found["logits"][:, :7]}, ParityError), (None, BackendError)],
)
def test_other_shapes_and_what_does_not_run_are_never_written(trace_once, small, tmp_path, monkeypatch, answer, error):
    run = OnnxBackend.run

    def wrong(self, batch, outputs):
        if answer is None:
            raise BackendError("the graph does not run")
        return answer(run(self, batch, outputs))

    monkeypatch.setattr(OnnxBackend, "run", wrong)
    with pytest.raises(error):
        export(small, tmp_path / "out", max_length=LENGTH, bounds="report")
    assert not list(tmp_path.iterdir())


def test_bounds_are_strict_or_report(small, tmp_path):
    with pytest.raises(InputError, match="bounds is 'none'; expected one of strict, report"):
        export(small, tmp_path / "out", bounds="none")


def tighten(monkeypatch, precision):
    monkeypatch.setitem(bounds.TOLERANCES, precision, dataclasses.replace(bounds.TOLERANCES[precision], cosine_min=1.5))


@pytest.mark.parametrize(
    ("options", "precision"),
    [({"target": "cuda", "precision": "fp16"}, "fp16"), ({"format": "trt", "precision": "bf16"}, "bf16")],
)
def test_formats_for_gpus(small, tmp_path, monkeypatch, options, precision):
    from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions

    tighten(monkeypatch, precision)
    if options.get("format") == "trt":
        options = {**options, "tensorrt": TensorRTOptions(onnx_only=True)}
    manifest = export(small, tmp_path / "out", max_length=LENGTH, bounds="report", **options).manifest
    assert manifest.missed_bounds and read_manifest(tmp_path / "out") == manifest
    assert all(graph.computes == () for graph in manifest.graphs.values())


def test_a_triton_repository_says_so_first(trace_once, small, tmp_path, spoil):
    spoil("onnxruntime", shift)
    with pytest.raises(BoundMissedError):
        export_repository(small, tmp_path / "strict", max_length=LENGTH)
    export_repository(small, tmp_path / "out", max_length=LENGTH, bounds="report")
    start, _, _ = (tmp_path / "out" / "README.md").read_text().partition("## Start")
    assert "**This model misses its bounds**" in start and "- onnxruntime fp32: length 1, batch 1: " in start
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["missed_bounds"]


@pytest.fixture(scope="module")
def sound(small, tmp_path_factory):
    return export(small, tmp_path_factory.mktemp("sound") / "out", max_length=LENGTH)


@pytest.mark.parametrize("broken", [False, True])
def test_a_check_counts_like_a_bound(sound, broken):
    line = "'Größe' gives 0.1 and not 0.9"
    check = Check(
        "words",
        failures=() if broken else (line,),
        broken=(line,) if broken else (),
        compared={"texts": 3},
        skipped=("sentence-transformers is not installed",),
    )
    report = sound.parity.with_checks(check)
    assert not report.passed and report.failures() == [f"words: {line}"]
    assert [entry["name"] for entry in report.to_json()["checks"]] == ["answers", "words"]
    with pytest.raises(BoundMissedError, match="the words differ from the checkpoint's own:\n  'Größe'"):
        report.require()
    table = format_table(report)
    assert "words: FAILED, texts 3" in table and line in table and "skipped: sentence-transformers" in table
    page = ReportPage(report, json.loads((sound.path / "report.json").read_text()), sound.manifest).render()
    assert 'words: <span class="failed-word">MISSED' in page and 'class="verdict failed"' in page
    assert "sentence-transformers is not installed" in page and "gives 0.1 and not 0.9" in page
    if broken:
        with pytest.raises(BoundMissedError):
            report.require("report")
    else:
        report.require("report")
    passed = sound.parity.with_checks(dataclasses.replace(check, failures=(), broken=()))
    assert passed.passed and "words: passed, texts 3" in format_table(passed)


ADVICE = [
    ("fp32", {"onnxruntime": 0.5, "openvino": 1e-6}, "openvino fp32 agrees, so onnxruntime is at fault"),
    ("fp32", {"onnxruntime": 0.5, "openvino": 0.5}, "too large for rounding: please report it"),
    ("fp32", {"onnxruntime": 3e-4, "openvino": 3e-4}, "small for a wrong graph: the weights may amplify"),
    ("fp32", {"onnxruntime": math.nan}, "PyTorch's numbers are finite, and these are not"),
    ("fp16", {"onnxruntime": math.nan}, "FP16 ends at 65,504.*Take bf16"),
    ("bf16", {"onnxruntime": 0.5}, "Take fp16, which has three bits more"),
    (
        "int8",
        {"onnxruntime": 0.5},
        r"Calibrate on texts like those that will be served \(--calibration, or --languages multilingual",
    ),
    ("int4-weight", {"onnxruntime": 0.5}, "Take a finer precision: int8-weight or fp32"),
]


@pytest.mark.parametrize(("precision", "differences", "advice"), ADVICE)
def test_the_advice_fits_the_miss(sound, precision, differences, advice):
    engines = []
    for engine in sound.parity.engines:
        if engine.engine in differences and engine.compute == "fp32":
            size = differences[engine.engine]
            cases = tuple(
                dataclasses.replace(
                    case,
                    finite=math.isfinite(size),
                    outputs={
                        name: dataclasses.replace(found, max_rel=size, cosine_min=1 - size)
                        for name, found in case.outputs.items()
                    },
                )
                for case in engine.cases
            )
            tolerance = bounds.tolerance_of(precision, "fp32")
            engines.append(dataclasses.replace(engine, cases=cases, tolerance=tolerance))
    report = dataclasses.replace(sound.parity, precision=precision, engines=tuple(engines))
    with pytest.raises(BoundMissedError, match=f"(?s){advice}") as error:
        report.require()
    assert ("--bounds report" in str(error.value)) == all(map(math.isfinite, differences.values()))


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("fp32", "The checkpoint's own library is right: please report it"),
        ("int8", r"Calibrate on texts like .* If an fp32 bundle differs too, please report it"),
    ],
)
def test_the_advice_when_only_answers_differ(sound, precision, advice):
    report = dataclasses.replace(sound.parity, precision=precision).with_checks(Check("answers", failures=("0 and 1",)))
    with pytest.raises(BoundMissedError, match=advice):
        report.require()


CHANGES = {
    "a regression head for prices": ("classify", {"num_labels": 1}, "classifier", 1500.0),
    "a regression head for tiny numbers": ("classify", {"num_labels": 1}, "classifier", 1e-3),
    "a large last LayerNorm": ("embed", {"hidden_size": 64, "layers": 3}, "layers.2.post_mlp_layernorm", 1e3),
    "a small last LayerNorm": ("embed", {}, "layers.1.post_mlp_layernorm", 1e-3),
    "peaked words": ("fill-mask", {}, "lm_head.layer_norm", 300.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_sound_models_of_every_scale_are_exported(tmp_path, name):
    from safetensors.torch import load_file, save_file

    task, options, module, factor = CHANGES[name]
    folder = make_checkpoint(tmp_path / "model", task=task, layout="native", **options)
    tensors = load_file(folder / "model.safetensors")
    touched = [key for key in tensors if key.rpartition(".")[0].endswith(module)]
    assert touched
    save_file(
        {key: value * factor if key in touched else value for key, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    result = export(folder, tmp_path / "out", max_length=LENGTH)
    largest = max(engine.max_rel for engine in result.parity.engines if engine.compute == "fp32")
    assert result.parity.passed and 0 < largest < 2e-5
    if factor >= 300:
        absolute = max(engine.max_abs for engine in result.parity.engines if engine.compute == "fp32")
        assert absolute > 1e-4 and np.isfinite(absolute), "reported as it is"
