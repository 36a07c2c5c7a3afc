"""Which TensorRT builds, for which GPUs: everything that can be refused is refused before a model is loaded."""

import types

import pytest

from gte_deploy.core.errors import ExportError, InputError, MissingDependencyError
from gte_deploy.core.spec import TensorSpec
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.targets.tensorrt import runtimes
from gte_deploy.exporters.targets.tensorrt.layouts import trtexec_line
from gte_deploy.exporters.targets.tensorrt.profiles import parse_profile
from gte_deploy.exporters.targets.tensorrt.runtimes import (
    Runtime,
    choose_runtime,
    parse_capabilities,
    resolve_capabilities,
)

MODULE = types.SimpleNamespace(
    __version__="9.9.9", ComputeCapability=types.SimpleNamespace(SM75=1, SM86=2, SM89=3, SM120=4)
)
RTX = Runtime("tensorrt-rtx", "", MODULE)
TENSORRT = Runtime("tensorrt", "", MODULE)


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu, variants)`: a machine with this GPU and these TensorRTs."""

    def set_up(gpu, *variants):
        monkeypatch.setattr(runtimes, "gpu_capability", lambda: gpu)
        monkeypatch.setattr(runtimes, "import_tensorrt", lambda variant: MODULE if variant in variants else None)

    return set_up


@pytest.mark.parametrize(
    "gpu, variants, asked, taken, why",
    [
        ("8.9", ("tensorrt", "tensorrt-rtx"), "auto", "tensorrt", "8.9"),
        (None, ("tensorrt", "tensorrt-rtx"), "auto", "tensorrt-rtx", "no GPU"),
        ("8.9", ("tensorrt-rtx",), "auto", "tensorrt-rtx", "not installed"),
        ("8.9", ("tensorrt", "tensorrt-rtx"), "rtx", "tensorrt-rtx", "requested"),
        ("8.9", ("tensorrt",), "tensorrt", "tensorrt", "requested"),
    ],
)
def test_the_choice_and_its_reason(machine, gpu, variants, asked, taken, why):
    machine(gpu, *variants)
    runtime = choose_runtime(asked)
    assert runtime.variant == taken and why in runtime.reason


@pytest.mark.parametrize(
    "gpu, variants, asked, error, says",
    [
        (None, (), "auto", MissingDependencyError, r"\[rtx\].*\[trt\].*--onnx-only"),
        ("8.9", (), "rtx", MissingDependencyError, r"\[rtx\]"),
        ("8.9", (), "tensorrt", MissingDependencyError, r"\[trt\]"),
        (None, ("tensorrt",), "tensorrt", ExportError, "--runtime rtx.*--onnx-only"),
        (None, ("tensorrt",), "lite", InputError, "lite"),
    ],
)
def test_where_nothing_can_build_the_error_says_what_to_do(machine, gpu, variants, asked, error, says):
    machine(gpu, *variants)
    with pytest.raises(error, match=says):
        choose_runtime(asked)


def test_targets_are_compute_capabilities():
    assert parse_capabilities("sm86, sm89,sm120,sm86") == ("8.6", "8.9", "12.0")
    assert parse_capabilities("8.9,89,rtx4090,orin") == ("8.9", "8.7")
    for text in ("", "8", "sm8", "sm86;sm89", "rtx4099"):
        with pytest.raises(InputError, match="sm86,sm89,sm120"):
            parse_capabilities(text)


def test_the_default_targets_can_compute_in_the_precision():
    assert resolve_capabilities(RTX, None, "fp16") == ("8.6", "8.9", "12.0")
    assert resolve_capabilities(RTX, None, "fp8") == ("8.9", "12.0")
    assert resolve_capabilities(RTX, ("7.5",), "fp16") == ("7.5",)


@pytest.mark.parametrize(
    "capabilities, precision, says",
    [
        (("9.0",), "fp16", "sm90.*sm75, sm86.*data centre"),
        (("8.6", "8.9"), "fp8", "sm86 cannot compute in fp8.*sm89"),
        (("7.5",), "bf16", "sm75 cannot compute in bf16"),
    ],
)
def test_capabilities_that_cannot_be_are_refused(capabilities, precision, says):
    with pytest.raises(InputError, match=says):
        resolve_capabilities(RTX, capabilities, precision)


def test_ordinary_tensorrt_builds_for_the_gpu_here(machine):
    machine("8.9")
    assert resolve_capabilities(TENSORRT, None, "fp16") == ("8.9",)
    assert resolve_capabilities(TENSORRT, ("8.9",), "fp16") == ("8.9",)
    with pytest.raises(InputError, match="sm89, and the target is sm86"):
        resolve_capabilities(TENSORRT, ("8.6",), "fp16")
    machine("7.5")
    with pytest.raises(InputError, match="sm75 cannot compute in fp8"):
        resolve_capabilities(TENSORRT, None, "fp8")


def test_the_trtexec_line_has_every_profile():
    profiles = [parse_profile("1x1:8x64:32x128"), parse_profile("1x129:4x512:4x1024")]
    inputs = [TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
    masks = TensorSpec("mask_positions", "int64", ("num_masks", 2))
    assert trtexec_line("model.onnx", profiles, [*inputs, masks]) == (
        "trtexec --onnx=model.onnx --saveEngine=model.plan --stronglyTyped --noTF32 "
        "--profilingVerbosity=detailed "
        "--profile=0 --minShapes=input_ids:1x1,attention_mask:1x1,mask_positions:1x2 "
        "--optShapes=input_ids:8x64,attention_mask:8x64,mask_positions:8x2 "
        "--maxShapes=input_ids:32x128,attention_mask:32x128,mask_positions:512x2 "
        "--profile=1 --minShapes=input_ids:1x129,attention_mask:1x129,mask_positions:1x2 "
        "--optShapes=input_ids:4x512,attention_mask:4x512,mask_positions:4x2 "
        "--maxShapes=input_ids:4x1024,attention_mask:4x1024,mask_positions:512x2"
    )
    assert "--profile=" not in trtexec_line("model.onnx", profiles[:1], inputs)
    assert "memPoolSize" not in trtexec_line("model.onnx", profiles, inputs)
    limited = trtexec_line("model.onnx", profiles, inputs, workspace=512 << 20)
    assert "--profilingVerbosity=detailed --memPoolSize=workspace:512M --profile=0" in limited


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--precision", "fp16"], "--precision fp16 is for --target cuda or --format trt; --target cpu is"),
        (
            ["--format", "trt", "--precision", "int8-weight"],
            "int8-weight is for --target cpu; --format trt is",
        ),
        (["--onnx-only"], "--onnx-only is for --format trt"),
        (["--profile", "1x1:1x8:1x16"], "--profile is for --format trt"),
        (["--format", "trt", "--calibrator", "max"], "--calibrator is for --precision int8 and fp8"),
        (["--format", "trt", "--reduce-range"], "--reduce-range is for --target cpu"),
        (["--format", "trt", "--profile", "1x1"], "MIN:OPT:MAX"),
        (["--format", "trt", "--target", "ada"], "sm86,sm89,sm120"),
    ],
)
def test_options_that_do_not_go_together(arguments, says, capsys):
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
