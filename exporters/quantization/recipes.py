"""Converts the FP32 graphs of a bundle to a lower precision, for `gte-export --precision`."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gte_deploy.backends.base import Batch
from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.bundle.manifest import TextsEntry
from gte_deploy.core.spec import Engine, ModelSpec, Precision
from gte_deploy.exporters.graph.build import Graph
from gte_deploy.exporters.graph.editing import operand
from gte_deploy.exporters.graph.linear_layers import find_linear_layers
from gte_deploy.exporters.job import EVALUATION_TOKENS
from gte_deploy.exporters.quantization.calibration import Range, measure_ranges, running, sample_rows
from gte_deploy.exporters.quantization.int8 import (
    Activations,
    embedding_lookups,
    int8_scheme,
    quantize_int8,
    table_name,
)
from gte_deploy.exporters.quantization.sensitivity import Judgement, Sweep, SweepError, sweep_sensitivity
from gte_deploy.exporters.quantization.smoothing import outlier_ratio
from gte_deploy.exporters.quantization.weight_only import Bits, quantize_weights
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS, Accuracy, TextReference
from gte_deploy.exporters.verification.cases import TokenSource, max_tokens_of, parity_cases
from gte_deploy.exporters.verification.parity import Comparison, check_parity
from gte_deploy.exporters.verification.results import FP16_OVERFLOWS
from gte_deploy.exporters.verification.texts import (
    CalibrationTexts,
    TextRounds,
    calibration_texts,
    evaluation_rounds,
    text_batches,
)
from gte_deploy.text.tokenization import TextTokenizer

# The `max_tokens` of `text_batches`. A sweep measures each group of layers on fewer tokens than the result.
CALIBRATION_TOKENS = 4000
SWEEP_TOKENS = 1000
# The longest of the parity cases that a sweep judges; the export compares all lengths at the end.
_CASE_LENGTH = 128
_HELD_OUT, _RANDOM = "on held-out text: ", "on random tokens: "
_CALIBRATION = "all"  # the calibration texts are judged together, whatever their languages
# The number of groups that an error message names.
_NAMED_GROUPS = 3
_WEIGHT_BITS: Mapping[Precision, Bits] = {"int8-weight": 8, "int4-weight": 4}
# Layers with the same input are quantized together, so they are judged together.
_ROLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "query", "key", "value"), "qkv"),
    **dict.fromkeys(("up_proj", "gate_proj"), "up_gate"),
}


@dataclass(frozen=True)
class Quantized:
    """Graphs of a lower precision.

    Args:
        graphs: engine -> graph; weight-only precisions have only ONNX Runtime's. The fusions of a graph include the
            numbers of quantized layers.
        sweep: the layers that stay in FP32, and their losses; INT8 only.
        finer: returns graphs with more layers in FP32, for graphs that missed their bounds; INT8 only.
        calibration: the calibration texts; INT8 only.
    """

    graphs: dict[Engine, Graph]
    sweep: Sweep | None = None
    finer: "Callable[[], Quantized] | None" = None
    calibration: TextsEntry | None = None


@dataclass(frozen=True)
class Calibration:
    """The ranges of a model's linear layers, and what is needed to measure more.

    Args:
        fp32: ONNX Runtime's FP32 graph.
        spec: the facts about the model.
        tokenizer: the tokenizer of the model.
        texts: the calibration texts.
        held_out: see `CalibrationTexts`.
        batches: the batches of the calibration texts.
        ranges: weight's name -> range of the layer's input on the batches.
        progress: called with a line at every long step.
    """

    fp32: Graph
    spec: ModelSpec
    tokenizer: TextTokenizer
    texts: Sequence[str]
    held_out: Mapping[str, Sequence[str]]
    batches: Sequence[Batch]
    ranges: Mapping[str, Range]
    progress: Callable[[str], None]

    def sample(self, names: Collection[str]) -> dict[str, NDArray[np.float32]]:
        """See `choose_smoothing`."""
        self.progress(f"outlier channels: choose the smoothing of {len(names)} inputs")
        return sample_rows(self.fp32, self.spec, self.batches, names)


def quantize_graphs(
    graphs: Mapping[Engine, Graph],
    precision: Precision,
    *,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    calibration: CalibrationTexts | None = None,
    activations: Activations = "static",
    reduce_range: bool = False,
    progress: Callable[[str], None],
) -> Quantized:
    """Copy the FP32 `graphs` and convert the copies to `precision`.

    Args:
        graphs: the FP32 graphs of one model; they stay unchanged.
        precision: a precision other than "fp32".
        spec: the facts about the model.
        tokenizer: the tokenizer of the model.
        calibration: texts like those in production; None for the built-in ones, see `calibration_texts`. This and the
            next two arguments are for INT8 only.
        activations: the ranges of activations in ONNX Runtime's graph; OpenVINO's graph is always static.
        reduce_range: whether weights have 7 bits, for CPUs without VNNI.
        progress: called with a line at every long step.
    """
    fp32 = graphs["onnxruntime"]
    if precision != "int8":
        copy = fp32.model.clone()
        counts = quantize_weights(copy, _WEIGHT_BITS[precision])
        return Quantized({"onnxruntime": _with_model(fp32, copy, counts)})
    texts = calibration or calibration_texts(tokenizer, spec.vocab_size)
    measured = calibrated(fp32, spec, tokenizer, texts, progress)
    base = int8_scheme(fp32.model, measured.ranges, sample=measured.sample, reduce_range=reduce_range)
    # Static ranges lose more accuracy than dynamic ones, and OpenVINO's graph always has them.
    sweep_activations: Activations = "static" if "openvino" in graphs else activations
    groups = {**groups_of(fp32, base.excluded), **_tables(fp32)}

    def quantized(engine: Engine, excluded: frozenset[str], activations: Activations) -> Graph:
        copy = graphs[engine].model.clone()
        counts = quantize_int8(copy, base.excluding(excluded), engine=engine, activations=activations)
        return _with_model(graphs[engine], copy, counts)

    def swept(previous: Sweep | None) -> Quantized:
        found = sweep(
            measured, groups, lambda excluded: quantized("onnxruntime", excluded, sweep_activations), "int8", previous
        )
        result: dict[Engine, Graph] = {engine: quantized(engine, found.excluded, activations) for engine in graphs}
        return Quantized(result, found, lambda: swept(found), texts.entry)

    return swept(None)


def groups_of(graph: Graph, excluded: Collection[str]) -> dict[str, list[str]]:
    """Groups of weights that a sweep judges together, such as "gte.layers.0.self_attn.qkv" -> three weights.

    The weights in `excluded` stay in a higher precision and are in no group.
    """
    groups: dict[str, list[str]] = {}
    for linear in find_linear_layers(graph.model):
        if linear.name not in excluded:
            module, _, role = linear.name.removesuffix(".weight").rpartition(".")
            if role.isdigit():  # a part of the vocabulary's matrix
                module, _, role = module.rpartition(".")
            groups.setdefault(f"{module}.{_ROLES.get(role, role)}", []).append(linear.name)
    return groups


def _tables(graph: Graph) -> dict[str, list[str]]:
    """The groups of embedding tables. A table that is also a decoder's matrix is in the group of the decoder."""
    decoders = {linear.name for linear in find_linear_layers(graph.model)}
    tables = [operand(node, 0) for node in embedding_lookups(graph.model.graph)]
    return {
        str(table.name).removesuffix(".weight"): [table_name(table)] for table in tables if table.name not in decoders
    }


def calibrated(
    fp32: Graph,
    spec: ModelSpec,
    tokenizer: TextTokenizer,
    calibration: CalibrationTexts,
    progress: Callable[[str], None],
) -> Calibration:
    """Measure the input range of every linear layer on the calibration texts; see `calibration_texts`."""
    texts = calibration.texts
    batches = [batch for batch, _ in text_batches(texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)]
    size = sum(int(batch.attention_mask.sum()) for batch in batches)
    progress(f"calibrate on {size:,} tokens of {calibration.source}")
    ranges = measure_ranges(fp32, spec, batches)
    return Calibration(fp32, spec, tokenizer, texts, calibration.held_out, batches, ranges, progress)


def sweep(
    measured: Calibration,
    groups: Mapping[str, Sequence[str]],
    quantize: Callable[[frozenset[str]], Graph],
    precision: Precision,
    previous: Sweep | None = None,
) -> Sweep:
    """Find the layers that must stay in a higher precision, by comparison with FP32.

    If all layers in 8 bits keep the bounds on the calibration texts, there is no sweep. Its result must keep them on
    the calibration texts, on held-out texts and on the parity cases of short batches.

    Args:
        measured: the model and its calibration texts.
        groups: groups of weights that are judged together, see `groups_of`.
        quantize: returns the quantized graph in which the given weights stay in a higher precision.
        precision: the precision, which sets the bounds of accuracy.
        previous: an earlier result whose graphs missed the bounds of the export; see `sweep_sensitivity`.
    """
    bounds, progress = ACCURACY_BOUNDS[precision], measured.progress
    with running(measured.fp32, measured.spec) as reference:
        judge = _Judge(reference, measured, precision)
        if previous is None:
            with running(quantize(frozenset()), measured.spec) as candidate:
                accuracy = judge.calibration.compare(candidate, bounds)
            if not (missed := bounds.missed(accuracy, by_estimate=True)):
                return Sweep(frozenset(), {}, accuracy)
            progress(f"with all layers in 8 bits the graph misses its bounds ({'; '.join(missed)})")
        sample = [text_batches(measured.texts, measured.tokenizer, measured.spec, max_tokens=SWEEP_TOKENS)]
        small = TextReference(reference, {_CALIBRATION: sample}, measured.spec)

        def measure(excluded: frozenset[str]) -> Accuracy:
            with running(quantize(excluded), measured.spec) as candidate:
                return small.compare(candidate)

        def judged(excluded: frozenset[str]) -> Judgement:
            with running(quantize(excluded), measured.spec) as candidate:
                return judge(candidate)

        try:
            return sweep_sensitivity(groups, measure, judged, bounds, previous=previous, progress=progress)
        except SweepError as error:
            excluded = frozenset(name for names in groups.values() for name in names)
            failure = _advice(error, measured, groups, precision)
            return Sweep(excluded, error.loss, error.accuracy, len(groups), failure)


class _Judge:
    """Judges a graph on all the data that the result of a sweep must hold on.

    The held-out texts are those of the evaluation texts that the export's verdict does not read. So the verdict is on
    texts that chose nothing.
    """

    def __init__(self, reference: OnnxBackend, measured: Calibration, precision: Precision) -> None:
        spec, tokenizer = measured.spec, measured.tokenizer
        self._reference, self._bounds = reference, ACCURACY_BOUNDS[precision]
        rounds = TextRounds(measured.texts, tokenizer, spec, max_tokens=CALIBRATION_TOKENS)
        self.calibration = TextReference(reference, {_CALIBRATION: rounds}, spec)
        held_out = evaluation_rounds(
            measured.held_out,
            tokenizer,
            spec,
            max_tokens=CALIBRATION_TOKENS,
            left_out_of=EVALUATION_TOKENS,
        )
        self._held_out = TextReference(reference, held_out, spec)
        limit = max_tokens_of(spec)
        self._cases = Comparison(
            outputs=[output.name for output in measured.fp32.outputs],
            spec=spec,
            precision=precision,
            tokens=TokenSource.from_tokenizer(tokenizer),
            cases=parity_cases(min(spec.max_length, _CASE_LENGTH), max_tokens=limit),
        )

    def __call__(self, candidate: OnnxBackend) -> Judgement:
        accuracy = self.calibration.compare(candidate, self._bounds)
        missed = self._bounds.missed(accuracy, by_estimate=True)
        if not missed:
            held_out = self._held_out.compare(candidate, self._bounds)
            missed = [f"{_HELD_OUT}{line}" for line in self._bounds.missed(held_out, by_estimate=True)]
        if not missed:
            report = check_parity(self._reference, {("onnxruntime", self._cases.precision): candidate}, self._cases)
            missed = [f"{_RANDOM}{line}" for line in report.failures()]
        return Judgement(accuracy, missed)


def _advice(error: SweepError, measured: Calibration, groups: Mapping[str, Sequence[str]], precision: Precision) -> str:
    """Say why a model cannot have 8 bits, and what to do."""
    if math.isnan(error.accuracy.token_cosine_mean):
        return (
            f"{precision}: even without 8 bits the graph gives numbers that are not finite, and PyTorch's are finite. "
            f"{FP16_OVERFLOWS} No bundle was written."
        )
    worst = []
    for group, loss in list(error.loss.items())[:_NAMED_GROUPS]:
        found = measured.ranges.get(groups[group][0])
        ratio = "" if found is None else f"; its largest input channel is {outlier_ratio(found):,.0f} × the median"
        worst.append(f"\n  {group} loses {loss:.1e} of the token cosine{ratio}")
    named = f"\nThe most sensitive groups of layers, each alone in 8 bits:{''.join(worst)}" if worst else ""
    if all(line.startswith((_HELD_OUT, _RANDOM)) for line in error.missed):
        advice = "The calibration texts keep the bounds: calibrate on more texts like those that will be served."
    else:
        advice = "Other calibration texts do not help."
    return (
        f"{precision} misses its bounds with this model, even with almost all layers in a higher precision: "
        f"{'; '.join(error.missed)}{named}\nNo bundle was written. {advice} Or take a finer precision: int8-weight or "
        "fp32 on a CPU, fp16 or bf16 on a GPU."
    )


def _with_model(graph: Graph, model: ir.Model, counts: Mapping[str, int]) -> Graph:
    return dataclasses.replace(graph, model=model, fusions={**graph.fusions, **counts})
