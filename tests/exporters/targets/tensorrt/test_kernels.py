"""How many kernels a layer of a real engine launches, according to the listing of TensorRT-RTX."""

import pytest

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")

from gte_deploy.exporters.targets.tensorrt.profiles import default_profiles  # noqa: E402
from tensorrt_listing import build_listing  # noqa: E402

PROFILES = default_profiles(8192)
# QKV, rotation, attention, output, sum with LayerNorm, up with gate, gated unit, down, sum with LayerNorm. In INT8 the
# output of attention is also copied.
KERNELS = {"fp16": 9, "bf16": 9, "int8": 10, "fp8": 9}


@pytest.mark.parametrize("precision", KERNELS)
def test_a_layer_of_the_tiny_model(saved, num_layers, precision):
    listing = build_listing(trt, saved(precision), PROFILES)
    assert sorted(listing.kernels) == [0, 1, 2]
    for profile in listing.kernels:
        assert listing.between_attentions(profile) == [KERNELS[precision]] * (num_layers - 1), profile
