"""INT8 exports of checkpoints with outlier channels keep the strict bounds on every engine."""

import pytest

pytest.importorskip("openvino")

import gte_deploy  # noqa: E402
from gte_deploy.core.errors import ParityError  # noqa: E402
from gte_deploy.exporters import export as export_module  # noqa: E402
from gte_deploy.exporters.export import export  # noqa: E402
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions  # noqa: E402
from gte_deploy.exporters.verification.checks import Check  # noqa: E402
from gte_deploy.models import resolve_checkpoint  # noqa: E402

LENGTH = 128


@pytest.fixture(scope="module")
def checkpoint(with_outliers, tmp_path_factory):
    made = {}

    def make(**outliers):
        key = tuple(sorted(outliers.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("outliers") / "checkpoint"
            made[key] = with_outliers(resolve_checkpoint(None), folder, **outliers)
        return made[key]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outliers", "share"),
    [
        ({"factor": 20, "channels": (17, 101)}, 0.5),
        # Harder: these models find the right word in 1 % of the cases at most, and small errors flip their best words.
        ({"factor": 20, "channels": (18, 205)}, 0.2),
        ({"factor": 50, "channels": (17, 101)}, 0.2),
        ({"factor": 20, "channels": (3, 50, 120, 200)}, 0.2),
    ],
    ids=["two-20", "other-two-20", "two-50", "four-20"],
)
@pytest.mark.parametrize(
    ("options", "engines"),
    [({}, {"onnxruntime", "openvino"}), ({"format": "trt", "tensorrt": TensorRTOptions(onnx_only=True)}, {"tensorrt"})],
    ids=["cpu", "tensorrt"],
)
def test_int8_keeps_its_bounds_with_many_layers_in_int8(checkpoint, tmp_path, outliers, share, options, engines):
    result = export(checkpoint(**outliers), tmp_path / "bundle", precision="int8", max_length=LENGTH, **options)
    assert result.parity.passed and set(result.manifest.graphs) == engines
    assert not result.manifest.missed_bounds
    for graph in result.manifest.graphs.values():
        high = graph.fusions.get("fp32_linears", graph.fusions.get("fp16_linears"))
        assert graph.fusions["int8_linears"] >= share * (graph.fusions["int8_linears"] + high)


@pytest.mark.parametrize("judge", ["_compare", "_judge"], ids=["numbers", "answers"])
def test_a_missed_verdict_keeps_more_layers_high(judge, trace_once, tmp_path, monkeypatch):
    """The comparison of the first graphs is made to fail; the export goes on instead of giving up."""
    monkeypatch.setattr(export_module, "EVALUATION_TOKENS", 400)
    compare, seen, lines = getattr(export_module, judge), [], []

    def fails_once(request, built, job):
        report = compare(request, built, job)
        seen.append(built.graphs["onnxruntime"].fusions["int8_linears"])
        return report if len(seen) > 1 else report.with_checks(Check("test", failures=("too coarse",)))

    monkeypatch.setattr(export_module, judge, fails_once)
    result = export(None, tmp_path / "bundle", precision="int8", max_length=64, progress=lines.append)
    assert seen[0] == 29 and 20 <= seen[1] < 29
    assert result.manifest.graphs["onnxruntime"].fusions["int8_linears"] == seen[1]
    assert any(
        "more layers in a higher precision, because of missed bounds: test: too coarse" in line for line in lines
    )
    with gte_deploy.load(tmp_path / "bundle") as model:
        assert model.fill_mask("the president of the united [MASK] of america.")[0]["token_str"] == "states"


@pytest.mark.slow
def test_answers_that_no_precision_mends_are_named(trace_once, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "EVALUATION_TOKENS", 400)
    judge, rounds = export_module._judge, []

    def fails(request, built, job):
        rounds.append(built)
        return judge(request, built, job).with_checks(Check("answers", failures=("too far",)))

    monkeypatch.setattr(export_module, "_judge", fails)
    with pytest.raises(ParityError, match="the answers differ from the checkpoint's own:\\n  too far"):
        export(None, tmp_path / "bundle", precision="int8", max_length=64)
    assert len(rounds) > 1 and not (tmp_path / "bundle").exists()
