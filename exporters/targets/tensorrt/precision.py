"""Chooses the GEMMs of TensorRT's graph that become INT8 or FP8, and their scales."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from gte_deploy.bundle.manifest import TextsEntry
from gte_deploy.core.spec import Engine
from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.job import Job
from gte_deploy.exporters.quantization.calibration import measure_amax
from gte_deploy.exporters.quantization.int8 import int8_scheme
from gte_deploy.exporters.quantization.recipes import calibrated, groups_of, sweep
from gte_deploy.exporters.quantization.sensitivity import Sweep
from gte_deploy.exporters.targets.tensorrt.emulation import engine_arithmetic
from gte_deploy.exporters.targets.tensorrt.fp8_attention import measure_attention_amax
from gte_deploy.exporters.targets.tensorrt.graph import EightBits, QdqScheme, tensorrt_graph
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions


@dataclass(frozen=True)
class QuantizedGemms:
    """A choice of the GEMMs in 8 bits.

    Args:
        scheme: the GEMMs to quantize and their scales.
        sweep: the result of the sweep that chose them.
        finer: chooses fewer GEMMs, for a graph that missed its bounds.
        calibration: the calibration texts.
    """

    scheme: QdqScheme
    sweep: Sweep
    finer: "Callable[[], QuantizedGemms]"
    calibration: TextsEntry


def choose_gemms(graphs: Mapping[Engine, Graph], job: Job, options: TensorRTOptions) -> QuantizedGemms:
    """Calibrate, and find the GEMMs that must stay in FP16 to keep the bounds of accuracy.

    The sweep judges the padded graph; a padding-free graph has the same GEMMs.

    Args:
        graphs: FP32 graphs of one model: ONNX Runtime's is for calibration, OpenVINO's is rewritten.
        job: an export in INT8 or FP8.
        options: the calibrator, and whether attention is FP8.
    """
    spec, precision = job.spec, cast(EightBits, job.precision)
    fp32, plain = graphs["onnxruntime"], graphs["openvino"]
    assert job.texts.calibration is not None  # of INT8 and FP8
    texts = job.texts.calibration
    measured = calibrated(fp32, spec, job.tokenizer, texts, job.steps.report)
    scheme = int8_scheme(fp32.model, measured.ranges, sample=measured.sample)
    # The vocabulary's matrix in 8 bits would be a second copy of the embeddings; a few masked rows do not justify it.
    few_rows = spec.task == "fill-mask" and spec.logits == "masked"
    scheme = scheme.excluding([name for name in measured.ranges if "decoder" in name and few_rows])
    quantized = {name: found for name, found in measured.ranges.items() if name not in scheme.excluded}
    batches, sites = measured.batches, job.sites
    amax = measure_amax(fp32, spec, batches, quantized, smoothing=scheme.smoothing, calibrator=options.calibrator)
    attention = measure_attention_amax(plain, spec, batches, sites=sites) if options.fp8_attention else {}

    def excluding(excluded: frozenset[str]) -> QdqScheme:
        chosen = scheme.excluding(excluded)
        return QdqScheme(precision, amax, chosen.smoothing, chosen.excluded, attention)

    def quantize(excluded: frozenset[str]) -> Graph:
        return engine_arithmetic(tensorrt_graph(plain, precision, sites=sites, scheme=excluding(excluded)))

    def choose(previous: Sweep | None) -> QuantizedGemms:
        found = sweep(measured, groups_of(fp32, scheme.excluded), quantize, job.precision, previous)
        return QuantizedGemms(excluding(found.excluded), found, lambda: choose(found), texts.entry)

    return choose(None)
