"""Which GEMMs of TensorRT's graph become INT8 or FP8, and with which scales."""

from collections.abc import Mapping
from typing import cast

from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.job import Job
from gte_deploy.exporters.quantization.calibration import measure_peaks
from gte_deploy.exporters.quantization.int8 import plan_int8
from gte_deploy.exporters.quantization.recipes import CALIBRATION_TOKENS, calibrated, sweep
from gte_deploy.exporters.targets.tensorrt.graph import EightBits, QdqPlan, tensorrt_graph
from gte_deploy.exporters.targets.tensorrt.options import TensorRTOptions
from gte_deploy.exporters.verification.texts import text_batches
from gte_deploy.spec import Engine


def plan_eight_bits(
    graphs: Mapping[Engine, Graph], job: Job, options: TensorRTOptions
) -> tuple[QdqPlan, Mapping[str, float]]:
    """Calibrate, and keep in FP16 what misses the bounds of accuracy otherwise.

    The sweep judges the padded graph; a padding-free one has the same GEMMs.

    Args:
        graphs: FP32 graphs of one model: ONNX Runtime's is calibrated with, OpenVINO's is rewritten.
        job: in INT8 or FP8.
        options: calibration texts and calibrator.

    Returns:
        The plan, and group of weights -> what it costs alone, empty where everything may be quantized.
    """
    spec, tokenizer, precision = job.spec, job.tokenizer, cast(EightBits, job.precision)
    fp32, plain = graphs["onnxruntime"], graphs["openvino"]
    texts, ranges = calibrated(fp32, spec, tokenizer, options.texts(), job.steps.report)
    base = plan_int8(fp32.model, ranges)
    quantized = {name: found for name, found in ranges.items() if name not in base.high}
    batches = [batch for batch, _ in text_batches(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)]
    peaks = measure_peaks(fp32, spec, batches, quantized, smoothing=base.smoothing, calibrator=options.calibrator)
    # For a few masked rows an 8-bit matrix saves less than the copy of the embeddings that it would be.
    few_rows = spec.task == "fill-mask" and spec.logits == "masked"
    rows_only = {name for name in quantized if "decoder" in name and few_rows}
    plan = QdqPlan(precision, peaks, base.smoothing, base.high | rows_only)

    def quantize(high: frozenset[str]) -> Graph:
        return tensorrt_graph(plain, job.precision, num_layers=job.num_layers, plan=plan.keeping(high))

    found = sweep(
        fp32, plan.high, quantize, job.precision, texts=texts, tokenizer=tokenizer, spec=spec, progress=job.steps.report
    )
    return plan.keeping(found.high), found.loss
