"""Chooses the GEMMs of TensorRT's graph that become INT8 or FP8, and their scales."""

import dataclasses
from collections.abc import Mapping
from typing import cast

from gte_deploy.core.spec import Engine
from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.job import Job
from gte_deploy.exporters.quantization.calibration import measure_amax
from gte_deploy.exporters.quantization.int8 import int8_scheme
from gte_deploy.exporters.quantization.recipes import calibrated, sweep
from gte_deploy.exporters.targets.tensorrt.emulation import engine_arithmetic
from gte_deploy.exporters.targets.tensorrt.fp8_attention import measure_attention_amax
from gte_deploy.exporters.targets.tensorrt.graph import EightBits, QdqScheme, tensorrt_graph
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions


def eight_bit_scheme(
    graphs: Mapping[Engine, Graph], job: Job, options: TensorRTOptions
) -> tuple[QdqScheme, Mapping[str, float]]:
    """Calibrate, and find the GEMMs that must stay in FP16 to keep the bounds of accuracy.

    The sweep judges the padded graph; a padding-free graph has the same GEMMs.

    Args:
        graphs: FP32 graphs of one model: ONNX Runtime's is for calibration, OpenVINO's is rewritten.
        job: an export in INT8 or FP8.
        options: calibration texts and calibrator.

    Returns:
        The scheme, and group of weights -> loss with only that group quantized; empty if all may be quantized.
    """
    spec, tokenizer, report = job.spec, job.tokenizer, job.steps.report
    precision = cast(EightBits, job.precision)
    fp32, plain = graphs["onnxruntime"], graphs["openvino"]
    texts, batches, ranges = calibrated(fp32, spec, tokenizer, options.texts(), report)
    base = int8_scheme(fp32.model, ranges)
    quantized = {name: found for name, found in ranges.items() if name not in base.excluded}
    amax = measure_amax(fp32, spec, batches, quantized, smoothing=base.smoothing, calibrator=options.calibrator)
    # The vocabulary's matrix in 8 bits would be a second copy of the embeddings; a few masked rows do not justify it.
    few_rows = spec.task == "fill-mask" and spec.logits == "masked"
    masked_rows_only = {name for name in quantized if "decoder" in name and few_rows}
    scheme = QdqScheme(precision, amax, base.smoothing, base.excluded | masked_rows_only)
    if options.fp8_attention:
        attention = measure_attention_amax(plain, spec, batches, sites=job.sites)
        scheme = dataclasses.replace(scheme, attention=attention)

    def quantize(excluded: frozenset[str]) -> Graph:
        graph = tensorrt_graph(plain, job.precision, sites=job.sites, scheme=scheme.excluding(excluded))
        return engine_arithmetic(graph)

    found = sweep(
        fp32,
        scheme.excluded,
        quantize,
        job.precision,
        texts=texts,
        tokenizer=tokenizer,
        spec=spec,
        progress=report,
    )
    return scheme.excluding(found.excluded), found.loss
