"""What every way of running on a GPU computes, against PyTorch in FP32 on the CPU, at lengths from 1 to 8,192.

The tests that decide most come first: whether TensorRT engines of every precision give finite and right answers; what
CUDA graphs and kept kernels do in real runs; what an export with default options makes; and outlier channels in INT8.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import gte_deploy
from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.plan import check_plan
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.errors import BackendError, InputError, MissingDependencyError
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.targets.tensorrt.profiles import default_profiles
from gte_deploy.exporters.verification.bounds import TOLERANCES
from gte_deploy.models import resolve_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Of the masks; random words are far from what 8 bits are calibrated for.
LEAST_AGREEMENT = {"fp32": 1.0, "fp16": 0.97, "bf16": 0.97, "int8": 0.8, "fp8": 0.8}
RUNTIMES = ("tensorrt", "rtx")
OUTPUTS = ["last_hidden_state", "logits"]


@pytest.fixture(scope="module")
def checkpoint():
    return resolve_checkpoint(None)


@pytest.fixture(scope="module")
def batches():
    """Real and ragged: (lengths) -> a batch of random words with masks."""
    rng = np.random.default_rng(0)
    found = []
    for lengths in ([1], [2], [17], [128], [512], [2048], [8192], [1, 17, 128, 40], [512, 300, 511], [2048, 1500]):
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        ids = np.where(mask == 1, rng.integers(1000, 20_000, mask.shape), 0)
        places = [(row, token) for row, length in enumerate(lengths) for token in range(0, length, 50)]
        found.append(Batch(ids, mask, np.array(places)))
    return found


@pytest.fixture(scope="module")
def expected(checkpoint, batches):
    with gte_deploy.load(checkpoint, backend="torch", device="cpu") as model:
        return [model._backend.run(batch, ["last_hidden_state", "logits"]) for batch in batches]


@pytest.fixture(scope="module")
def engine(bundle_of, checkpoint):
    """`engine(runtime, precision)`: the bundle of the built-in model, or a skip that says why there is none here."""

    def build(runtime, precision, source=checkpoint):
        module = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}[runtime]
        pytest.importorskip(module, reason=f"{module} is not installed")
        try:
            bundle = bundle_of(source, format="trt", precision=precision, tensorrt=TensorRTOptions(runtime=runtime))
            check_plan(read_manifest(bundle).plan, "cuda")
        except (InputError, BackendError, MissingDependencyError) as error:
            pytest.skip(f"{runtime} {precision}: {error}")
        return bundle

    return build


def assert_near(model, batches, expected, precision):
    least, agreed, masks = TOLERANCES[precision].cosine_min, 0, 0
    for batch, reference in zip(batches, expected, strict=True):
        for _ in range(4):  # as it comes three times, captured after the third, and replayed
            found = model._backend.run(batch, OUTPUTS)
        real = batch.attention_mask == 1
        assert all(np.isfinite(values[real] if values.ndim == 3 else values).all() for values in found.values()), (
            f"{batch.input_ids.shape}: not finite"
        )
        one, two = found["last_hidden_state"][real], reference["last_hidden_state"][real]
        cosines = (one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
        assert cosines.min() >= least, (batch.input_ids.shape, cosines.min())
        agreed += (found["logits"].argmax(axis=1) == reference["logits"].argmax(axis=1)).sum()
        masks += len(batch.mask_positions)
    assert agreed >= LEAST_AGREEMENT[precision] * masks


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_tensorrt_is_finite_and_near_pytorch(engine, batches, expected, precision, runtime):
    with gte_deploy.load(engine(runtime, precision)) as model:
        assert (model.backend, model.device) == ("tensorrt", "cuda")
        assert_near(model, batches, expected, precision)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nearly_every_run_of_single_texts_is_a_hit(engine, runtime, record_property):
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(150), 0.8, 2000)).astype(int), 1, 8192)
    with gte_deploy.load(engine(runtime, "fp16")) as model:
        done = model.warm_up()
        record_property("warm_up_seconds", done.seconds)
        for number, length in enumerate(lengths):
            if number == 1000:
                before = model._backend.counts()
            ids = rng.integers(1000, 20_000, (1, length))
            model._backend.run(Batch(ids, np.ones_like(ids), np.array([[0, 0]])), ["logits"])
        after = model._backend.counts()
    changes = {name: after[name] - before[name] for name in after}
    record_property("counts", json.dumps(after))
    assert 1 - changes["preparations"] / changes["runs"] >= 0.95, changes
    assert changes["failed captures"] == 0 and after["contexts"] <= 2 * (64 + 3), after
    if runtime == "tensorrt":
        assert changes["replays"] / changes["runs"] >= 0.9, changes


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_export_with_default_options_is_accepted(engine, runtime):
    """Default profiles and workspace; the export reads TensorRT's list of layers, and refuses a slow engine."""
    plan = read_manifest(engine(runtime, "fp16")).plan
    assert plan.profiles == default_profiles(8192) and plan.layers, "no layer was found in TensorRT's list"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_int8_with_outlier_channels(engine, checkpoint, tmp_path_factory, batches, runtime):
    outliers = with_outlier_channels(checkpoint, tmp_path_factory.mktemp("outliers") / "checkpoint")
    short = [batch for batch in batches if batch.input_ids.shape[1] <= 512]
    with gte_deploy.load(outliers, backend="torch", device="cpu") as model:
        expected = [model._backend.run(batch, OUTPUTS) for batch in short]
    with gte_deploy.load(engine(runtime, "int8", outliers)) as model:
        assert_near(model, short, expected, "int8")


def test_a_second_process_compiles_no_kernels_again(engine, tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = (
        "import sys, time, gte_deploy; start = time.perf_counter(); model = gte_deploy.load(sys.argv[1]); "
        "model.fill_mask('Paris is the [MASK] of France.'); print(time.perf_counter() - start); model.close()"
    )
    seconds = []
    for _ in range(2):
        command = [sys.executable, "-c", script, str(engine("rtx", "fp16"))]
        seconds.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        (file,) = (tmp_path / "gte-deploy" / "tensorrt-rtx").glob("*.cache")
        assert file.stat().st_size > 0
    record_property("first_answer_seconds", seconds)  # cold, then warm; no bound was measured yet


@pytest.mark.parametrize(
    ("target", "precision"), [("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "fp16"), ("cuda", "bf16")]
)
def test_onnxruntime_on_cuda(bundle_of, checkpoint, batches, expected, target, precision):
    _need_provider("CUDAExecutionProvider")
    bundle = bundle_of(checkpoint, target=target, precision=precision)
    with gte_deploy.load(bundle, device="cuda") as model:
        assert (model.backend, model.info()["precision"]) == ("onnx", precision)
        assert_near(model, batches, expected, precision)


def test_onnxruntime_through_tensorrt(bundle_of, checkpoint, batches, expected, monkeypatch, tmp_path):
    _need_provider("TensorrtExecutionProvider")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = bundle_of(checkpoint, format="trt", tensorrt=TensorRTOptions(onnx_only=True))
    with gte_deploy.load(bundle, backend="onnx", device="cuda") as model:
        assert_near(model, batches, expected, "fp16")
    assert list(tmp_path.rglob("*.engine")), "nothing was cached"


@pytest.mark.parametrize("compile", [False, True])
def test_torch_without_padding(checkpoint, batches, expected, compile):
    with gte_deploy.load(checkpoint, device="cuda", precision="bf16", compile=compile) as model:
        assert model._backend._is_packed
        assert_near(model, batches, expected, "bf16")


def _need_provider(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {name}")


def with_outlier_channels(checkpoint, target):
    """A copy in which every LayerNorm scales channels 3 and 11 by 20 more, as outlier channels of real BERT models."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        norms = [name for name, values in tensors.items() if "norm" in name.lower() and name.endswith("weight")]
        assert norms, f"{path} has no LayerNorm"
        for name in norms:
            tensors[name] = tensors[name].copy()
            tensors[name][[3, 11]] *= 20
        save_file(tensors, path, metadata={"format": "pt"})
    return target
