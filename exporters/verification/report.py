"""The parity report as a table for the terminal and as report.json for machines; `report_page` has report.html."""

import dataclasses
import datetime
import importlib.util
import platform
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gte_deploy._version import __version__
from gte_deploy.backends.picks import cpu_model
from gte_deploy.backends.tensorrt.variants import VARIANTS
from gte_deploy.bundle.manifest import GraphEntry
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.quiet import import_openvino
from gte_deploy.core.spec import Engine, ModelSpec
from gte_deploy.exporters.job import Built
from gte_deploy.exporters.verification.accuracy import Accuracy
from gte_deploy.exporters.verification.differences import CaseResult, Difference
from gte_deploy.exporters.verification.results import EngineParity, ParityReport

FORMAT = "gte-deploy-parity-report"
FORMAT_VERSION = 1
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "numpy")
_OPTIONAL_LIBRARIES = ("openvino", "executorch", "tensorrt", "tensorrt_rtx")


def library_versions(took_part: Collection[str] = _OPTIONAL_LIBRARIES) -> dict[str, str]:
    """Return the versions of gte-deploy, Python and every library that takes part in an export.

    Args:
        took_part: the modules of engines that took part; others are left out. By default all that are installed.
    """
    optional = (name for name in _OPTIONAL_LIBRARIES if name in took_part and importlib.util.find_spec(name))
    installed = [*_LIBRARIES, *optional]
    return {
        "gte-deploy": __version__,
        "python": platform.python_version(),
        # Versions of modules, not of distributions: onnxruntime also comes as onnxruntime-gpu.
        **{name: _module(name).__version__ for name in installed},
    }


def versions_of(parity: ParityReport, built: Built) -> dict[str, str]:
    """Return the versions of the libraries that made and compared a bundle; see `library_versions`."""
    engines = {engine.engine for engine in parity.engines if not engine.emulated}
    return library_versions({*engines, *([VARIANTS[built.plan.variant].module] if built.plan else [])})


def _module(name: str) -> Any:
    if name == "openvino":
        return import_openvino()
    return importlib.import_module("executorch.version" if name == "executorch" else name)


def build_report(
    parity: ParityReport,
    built: Built,
    *,
    spec: ModelSpec,
    source: Mapping[str, str],
    graphs: Mapping[Engine, GraphEntry],
    timings_s: Mapping[str, float],
) -> dict[str, Any]:
    """Build report.json: the exported model, the comparison, the machine, and the seconds of each step."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "source": dict(source),
        "task": spec.task,
        "max_length": spec.max_length,
        "pooling": spec.pooling,
        "logits": spec.logits if spec.task == "fill-mask" else None,
        "graphs": {engine: _describe_graph(graph) for engine, graph in graphs.items()},
        "plan": built.plan and built.plan.to_json(),
        "parity": parity.to_json(),
        "sensitivity": dict(built.sensitivity),
        "kept_groups": list(built.kept_groups),
        "calibration": built.calibration and dataclasses.asdict(built.calibration),
        "timings_s": {name: round(seconds, 3) for name, seconds in timings_s.items()},
        "machine": {"cpu": cpu_model(), "cpus": available_cpus(), "platform": _platform()},
        "versions": versions_of(parity, built),
    }


def format_table(parity: ParityReport) -> str:
    """Format one line for each case and a verdict for each engine, then the other checks and the caveats."""
    engines = ("\n".join(_engine_lines(engine)) for engine in parity.engines)
    cached = filter(None, [reference_line(parity)])
    return "\n".join([*engines, *cached, *(check.line for check in parity.checks), *parity.caveats])


def verdict(engine: EngineParity) -> str:
    """Return one sentence: passed or failed, the worst numbers and the bounds."""
    numbers = (
        f"max rel {engine.max_rel:.2e} (abs {engine.max_abs:.2e}), "
        f"cosine min {engine.cosine_min:.8f}, mean {engine.cosine_mean:.8f}"
    )
    agreement = "" if engine.top1 is None else f", top-1 {engine.top1:.1%}"
    return (
        f"{engine.title}: parity {'passed' if engine.passed else _miss(engine)}, {len(engine.cases)} cases"
        f"{parts_compared(engine)}, {numbers}"
        f"{agreement} (bounds: {engine.bounds})"
    )


def parts_compared(engine: EngineParity) -> str:
    """Return which graphs of an engine were compared, to follow the number of batches; empty for one graph."""
    first = engine.cases[0]
    graphs = ["the whole graph"]
    graphs += [f"the part for {' and '.join(first.parts)}"] if first.parts else []
    graphs += ["the graph for all logits"] if first.all_logits else []
    return f" of {', '.join(graphs[:-1])} and of {graphs[-1]}" if graphs[1:] else ""


def reference_line(parity: ParityReport) -> str:
    """Return one sentence about cached outputs of PyTorch; empty if no output was cached."""
    use = parity.reference
    if use is None or not use.cached:
        return ""
    return (
        f"PyTorch's hidden states for {use.cached} of {use.batches} batches come from the cache: computed for the same "
        f"weights with the same torch and transformers on this CPU model, the oldest on {use.oldest}."
    )


def _describe_graph(graph: GraphEntry) -> dict[str, Any]:
    """Describe the files of a graph, all of which were compared with PyTorch."""
    files = {each.path: [output.name for output in each.outputs] for each in graph.files}
    return {"opset": graph.opset, "fusions": dict(graph.fusions), "compared": files}


def _miss(engine: EngineParity) -> str:
    return "missed" if engine.optional else "FAILED"


def _engine_lines(engine: EngineParity) -> list[str]:
    header, rows = case_columns(engine.cases)
    rows = [
        [*row, "" if result.within(engine.tolerance) else _miss(engine)]
        for row, result in zip(rows, engine.cases, strict=True)
    ]
    cells = [[*header, ""], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [*lines, verdict(engine), *_accuracy_lines(engine)]


def _accuracy_lines(engine: EngineParity) -> list[str]:
    """Return one sentence about the accuracy of the precision on text; none if it was not measured."""
    found, bounds = engine.accuracy, engine.accuracy_bounds
    if found is None or bounds is None:
        return []
    parts = [
        f"token cosine mean {found.token_cosine_mean:.5f}, min {found.token_cosine_min:.5f}",
        f"sentence cosine mean {found.sentence_cosine_mean:.5f}, min {found.sentence_cosine_min:.5f}",
        f"row in a batch against alone {found.alone_cosine_mean:.5f}",
    ]
    wanted = f"mean cosine {bounds.cosine_mean:g}"
    if found.top1 is not None and found.top5 is not None and found.top1_interval is not None:
        low, high = found.top1_interval
        parts += [
            f"same best word as PyTorch for {found.top1_agreement:.1%} of {found.masks:,} masks (95 % interval "
            f"{low:.1%} to {high:.1%})",
            f"right word first {found.top1[0]:.1%} (PyTorch {found.top1[1]:.1%})",
            f"among five {found.top5[0]:.1%} ({found.top5[1]:.1%})",
        ]
        wanted += f", same best word {bounds.top1_agreement:.0%}"
    line = f"{engine.title} on {found.tokens:,} tokens of {found.kind_of_texts}: {'; '.join(parts)} (bounds: {wanted})"
    return [line, *_language_lines(engine, found)]


def _language_lines(engine: EngineParity, found: Accuracy) -> list[str]:
    """Return one sentence with the accuracy in each language; none if all texts are in one."""
    if not found.languages:
        return []
    agreement = "" if found.top1_agreement is None else ", same best word"
    cells = []
    for language, own in found.languages.items():
        words = "" if own.top1_agreement is None else f" {own.top1_agreement:.1%} of {own.masks:,}"
        cells.append(f"{language} {own.token_cosine_mean:.5f} {own.sentence_cosine_mean:.5f}{words}")
    return [f"{engine.title} by language (mean cosine of tokens, of sentences{agreement}): {'; '.join(cells)}"]


def case_columns(results: Sequence[CaseResult]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table, with columns for the outputs and top-k that the task has."""
    outputs = list(results[0].outputs)
    agreement = ["top-1", "top-5"] if results[0].top1 is not None else []
    by_part = ["by a part"] if results[0].parts else []
    by_all = ["by all logits"] if results[0].all_logits else []
    header = ["length", "batch", "padding", *outputs, *by_part, *by_all, "relative", "row alone", "cosine", *agreement]
    rows = []
    for result in results:
        alone = max((found.max_abs for found in result.alone.values()), default=None)
        cosine = min(found.cosine_min for _, found in result.differences())
        row = [f"{result.case.length:,}", str(result.case.batch), "ragged" if result.case.ragged else "none"]
        row += [f"{result.outputs[name].max_abs:.1e}" for name in outputs]
        row += [_largest_of(result.parts) for _ in by_part]
        row += [_largest_of(result.all_logits) for _ in by_all]
        row.append(f"{max(found.max_rel for found in result.compared().values()):.1e}")
        row += ["" if alone is None else f"{alone:.1e}", f"{cosine:.7f}"]
        row += [f"{share:.0%}" for share in (result.top1, result.top5) if share is not None]
        rows.append(row)
    return header, rows


def _largest_of(found: Mapping[str, Difference]) -> str:
    return f"{max(each.max_abs for each in found.values()):.1e}" if found else ""


def _platform() -> str:
    # platform.platform() would run `uname -p` for a word that it then drops.
    libc = "".join(platform.libc_ver())  # empty on Windows and macOS
    return "-".join((platform.system(), platform.release(), platform.machine(), *(["with", libc] if libc else [])))
