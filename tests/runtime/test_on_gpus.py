"""What every way of running on a GPU computes, against PyTorch in FP32 on the CPU, at lengths from 1 to 8,192."""

import numpy as np
import pytest

import gte_deploy
from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.plan import check_plan
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.errors import BackendError, MissingDependencyError
from gte_deploy.exporters.verification.bounds import TOLERANCES
from gte_deploy.models import resolve_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Of the masks; random words are far from what 8 bits are calibrated for.
LEAST_AGREEMENT = {"fp32": 1.0, "fp16": 0.97, "bf16": 0.97, "int8": 0.8}


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


def assert_near(model, batches, expected, precision):
    least, agreed, masks = TOLERANCES[precision].cosine_min, 0, 0
    for batch, reference in zip(batches, expected, strict=True):
        for _ in range(3):  # as it comes, captured, and replayed
            found = model._backend.run(batch, ["last_hidden_state", "logits"])
        real = batch.attention_mask == 1
        one, two = found["last_hidden_state"][real], reference["last_hidden_state"][real]
        cosines = (one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
        assert cosines.min() >= least, (batch.input_ids.shape, cosines.min())
        agreed += (found["logits"].argmax(axis=1) == reference["logits"].argmax(axis=1)).sum()
        masks += len(batch.mask_positions)
    assert agreed >= LEAST_AGREEMENT[precision] * masks


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_tensorrt(bundle_of, checkpoint, batches, expected, precision):
    bundle = bundle_of(checkpoint, format="trt", precision=precision)
    try:
        check_plan(read_manifest(bundle).plan, "cuda")
    except (BackendError, MissingDependencyError) as error:
        pytest.skip(str(error))
    with gte_deploy.load(bundle) as model:
        assert (model.backend, model.device) == ("tensorrt", "cuda")
        assert_near(model, batches, expected, precision)


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
    from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions

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
