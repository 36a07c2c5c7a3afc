"""Where the range of a quantized input is cut."""

import numpy as np
import pytest

from factories import make_checkpoint
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.quantization.calibration import measure_amax, measure_ranges


@pytest.fixture(scope="module")
def ranges(plain, spec, batches):
    found = measure_ranges(plain["onnxruntime"], spec, batches)
    return {name: value for name, value in found.items() if ".layers." in name}


@pytest.fixture(scope="module")
def batches(make_batch):
    return [make_batch(2, 40), make_batch(1, 9)]


@pytest.fixture(scope="module")
def amax(plain, spec, batches, ranges):
    """`amax(calibrator, smoothing)`"""

    def measured(calibrator, smoothing):
        return measure_amax(plain["onnxruntime"], spec, batches, ranges, smoothing=smoothing, calibrator=calibrator)

    return measured


def test_max_keeps_all_that_was_seen(amax, ranges):
    for name, peak in amax("max", {}).items():
        assert peak == max(-ranges[name].low.min(), ranges[name].high.max())


def test_smoothing_is_taken_into_account(amax, ranges):
    name = next(iter(ranges))
    factor = np.full(ranges[name].low.shape, 4, np.float32)
    for calibrator in ("max", "percentile"):
        plain, smooth = amax(calibrator, {}), amax(calibrator, {name: factor})
        assert smooth[name] == pytest.approx(plain[name] / 4, rel=1e-3)
        assert {k: v for k, v in smooth.items() if k != name} == {k: v for k, v in plain.items() if k != name}


def test_percentile_and_entropy_clip_what_is_rare(amax):
    most, percentile, entropy = (amax(calibrator, {}) for calibrator in ("max", "percentile", "entropy"))
    assert most.keys() == percentile.keys() == entropy.keys()
    for name, peak in most.items():
        assert 0 < percentile[name] <= peak * (1 + 1e-6) and 0 < entropy[name] <= peak * (1 + 1e-6)
    assert sum(percentile.values()) < 0.9 * sum(most.values())
    assert sum(entropy.values()) < 0.95 * sum(most.values())


def test_entropy_is_for_integers(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "small")
    options = ["--format", "trt", "--precision", "fp8", "--calibrator", "entropy", "--max-len", "16"]
    assert main([str(folder), str(tmp_path / "out"), *options]) == 2
    assert "128 integer levels" in capsys.readouterr().err
