"""The parity report in three forms: a table for the terminal, report.json for machines, report.html for people."""

import dataclasses
import datetime
import html
import importlib.util
import io
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gte_deploy._version import __version__
from gte_deploy.backends.picks import cpu_model
from gte_deploy.bundle.manifest import CalibrationEntry, GraphEntry, PlanEntry
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.quiet import import_openvino
from gte_deploy.core.spec import Engine, ModelSpec
from gte_deploy.exporters.verification.accuracy import Accuracy
from gte_deploy.exporters.verification.differences import CaseResult, Difference
from gte_deploy.exporters.verification.results import EngineParity, ParityReport

FORMAT = "gte-deploy-parity-report"
FORMAT_VERSION = 1
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "numpy")
_OPTIONAL_LIBRARIES = ("openvino", "executorch", "tensorrt", "tensorrt_rtx")
_LOWEST_SHOWN = 1e-9  # a logarithmic axis has no zero
_GREY = "#6b7280"
_COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea")  # one for each engine


def library_versions() -> dict[str, str]:
    """Return the versions of gte-deploy, Python and every library that took part in an export."""
    installed = [*_LIBRARIES, *(name for name in _OPTIONAL_LIBRARIES if importlib.util.find_spec(name))]
    return {
        "gte-deploy": __version__,
        "python": platform.python_version(),
        # Versions of modules, not of distributions: onnxruntime also comes as onnxruntime-gpu.
        **{name: _module(name).__version__ for name in installed},
    }


def _module(name: str) -> Any:
    if name == "openvino":
        return import_openvino()
    return importlib.import_module("executorch.version" if name == "executorch" else name)


def build_report(
    parity: ParityReport,
    *,
    spec: ModelSpec,
    source: Mapping[str, str],
    graphs: Mapping[Engine, GraphEntry],
    timings_s: Mapping[str, float],
    sensitivity: Mapping[str, float] | None = None,
    plan: PlanEntry | None = None,
    calibration: CalibrationEntry | None = None,
) -> dict[str, Any]:
    """Build report.json: the exported model, the comparison, the machine, and the seconds of each step.

    `sensitivity` is the loss that each group of layers causes alone in INT8 or FP8, if it was measured. `calibration`
    names the texts of these precisions.
    """
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
        "plan": plan and plan.to_json(),
        "parity": parity.to_json(),
        "sensitivity": dict(sensitivity or {}),
        "calibration": calibration and dataclasses.asdict(calibration),
        "timings_s": {name: round(seconds, 3) for name, seconds in timings_s.items()},
        "machine": {"cpu": cpu_model(), "cpus": available_cpus(), "platform": _platform()},
        "versions": library_versions(),
    }


def format_table(parity: ParityReport) -> str:
    """Format one line for each case and a verdict for each engine, then the other checks and the caveats."""
    engines = ("\n".join(_engine_lines(engine)) for engine in parity.engines)
    return "\n".join([*engines, *_reference_lines(parity), *(check.line for check in parity.checks), *parity.caveats])


def verdict(engine: EngineParity) -> str:
    """Return one sentence: passed or failed, the worst numbers and the bounds."""
    numbers = (
        f"max rel {engine.max_rel:.2e} (abs {engine.max_abs:.2e}), "
        f"cosine min {engine.cosine_min:.8f}, mean {engine.cosine_mean:.8f}"
    )
    agreement = "" if engine.top1 is None else f", top-1 {engine.top1:.1%}"
    return (
        f"{engine.title}: parity {'passed' if engine.passed else _miss(engine)}, {len(engine.cases)} cases"
        f"{_parts_compared(engine)}, {numbers}"
        f"{agreement} (bounds: {engine.tolerance})"
    )


def _parts_compared(engine: EngineParity) -> str:
    first = engine.cases[0]
    graphs = ["the whole graph"]
    graphs += [f"the part for {' and '.join(first.parts)}"] if first.parts else []
    graphs += ["the graph for all logits"] if first.all_logits else []
    return f" of {', '.join(graphs[:-1])} and of {graphs[-1]}" if graphs[1:] else ""


def render_html(parity: ParityReport, report: Mapping[str, Any], plan: PlanEntry | None = None) -> str:
    """Render one page without external files: verdict, plots, every case, and the machine."""
    name = html.escape(report["source"]["name"])
    passed = "passed" if parity.passed else "failed"
    facts = {
        "task": report["task"],
        "precision": parity.precision,
        **_sensitivity_facts(report),
        **_calibration_facts(report),
        "longest input": f"{report['max_length']:,} tokens",
        **{f"graph for {engine}": _graph_facts(graph) for engine, graph in report["graphs"].items()},
        **({"engine": "; ".join(plan.describe())} if plan is not None else {}),
    }
    return _PAGE.format(
        title=f"Parity of {name}",
        passed=passed,
        verdict="<br>".join(map(html.escape, _summary(parity))),
        facts=_definitions(facts),
        error_plot=_svg(_plot_error, parity),
        latency_plot=_svg(_plot_latency, parity),
        tables="".join(_html_table(engine) for engine in parity.engines),
        machine=_definitions({**report["machine"], "created": report["created"]}),
        versions=_definitions(report["versions"]),
        timings=_definitions({stage: f"{seconds:.1f} s" for stage, seconds in report["timings_s"].items()}),
    )


def _sensitivity_facts(report: Mapping[str, Any]) -> dict[str, str]:
    loss = report["sensitivity"]
    alone = ", ".join(f"{group} {cost:.1e}" for group, cost in loss.items())
    return {"loss of token cosine by each group alone, worst first": alone} if loss else {}


def _calibration_facts(report: Mapping[str, Any]) -> dict[str, str]:
    found = report["calibration"]
    return {"calibration": CalibrationEntry(**found).describe()} if found else {}


def _summary(parity: ParityReport) -> list[str]:
    engines = [line for each in parity.engines for line in (verdict(each), *_accuracy_lines(each))]
    return [*engines, *_reference_lines(parity), *(check.line for check in parity.checks), *parity.caveats]


def _reference_lines(parity: ParityReport) -> list[str]:
    """Return one sentence about cached outputs of PyTorch; none if no output was cached."""
    use = parity.reference
    if use is None or not use.cached:
        return []
    return [
        f"PyTorch's hidden states for {use.cached} of {use.batches} batches come from the cache: computed for the same "
        f"weights with the same torch and transformers on this CPU model, the oldest on {use.oldest}. Their times are "
        "those of that run."
    ]


def _graph_facts(graph: Mapping[str, Any]) -> str:
    fusions = ", ".join(f"{fusion} {count}" for fusion, count in graph["fusions"].items())
    compared = "; ".join(f"{path} gives {', '.join(outputs)}" for path, outputs in graph["compared"].items())
    return f"opset {graph['opset']}, {f'fusions: {fusions}' if fusions else 'standard operators'}; compared: {compared}"


def _describe_graph(graph: GraphEntry) -> dict[str, Any]:
    """Describe the files of a graph, all of which were compared with PyTorch."""
    files = {each.path: [output.name for output in each.outputs] for each in graph.files}
    return {"opset": graph.opset, "fusions": dict(graph.fusions), "compared": files}


def _miss(engine: EngineParity) -> str:
    return "missed" if engine.optional else "FAILED"


def _engine_lines(engine: EngineParity) -> list[str]:
    header, rows = _columns(engine.cases)
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
    what = f"texts in {len(found.languages)} languages" if found.languages else "English prose"
    line = f"{engine.title} on {found.tokens:,} tokens of {what}: {'; '.join(parts)} (bounds: {wanted})"
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


def _columns(results: Sequence[CaseResult]) -> tuple[list[str], list[list[str]]]:
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
        rows.append([*row, f"{result.reference_ms:,.1f}", f"{result.candidate_ms:,.1f}"])
    return [*header, "torch ms", "ms"], rows


def _largest_of(found: Mapping[str, Difference]) -> str:
    return f"{max(each.max_abs for each in found.values()):.1e}" if found else ""


def _html_table(engine: EngineParity) -> str:
    header, rows = _columns(engine.cases)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for row, result in zip(rows, engine.cases, strict=True):
        style = "" if result.within(engine.tolerance) else ' class="failed"'
        body.append(f"<tr{style}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<h2>{html.escape(engine.title)}: every case</h2><div class="scroll">{table}</div>'


def _definitions(items: Mapping[str, Any]) -> str:
    pairs = (f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in items.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _plot_error(axes: Axes, parity: ParityReport) -> None:
    for engine, color in zip(parity.engines, _COLORS, strict=False):
        lengths = [result.case.length for result in engine.cases]
        errors = [
            max(_LOWEST_SHOWN, *(found.max_rel for found in result.compared().values())) for result in engine.cases
        ]
        axes.scatter(lengths, errors, s=26, color=color, alpha=0.75, linewidths=0, label=engine.title)
        if engine.tolerance.max_rel is not None:
            axes.axhline(engine.tolerance.max_rel, color=color, linestyle="--", linewidth=1.2)
    axes.set_title("Largest difference from PyTorch over the output's scale")
    axes.set_yscale("log")


def _plot_latency(axes: Axes, parity: ParityReport) -> None:
    for number, (engine, color) in enumerate(zip(parity.engines, _COLORS, strict=False)):
        single = [result for result in engine.cases if result.case.batch == 1]
        lengths = [result.case.length for result in single]
        if number == 0:
            axes.plot(lengths, [r.reference_ms for r in single], "o-", color=_GREY, markersize=4, label="PyTorch fp32")
        axes.plot(lengths, [r.candidate_ms for r in single], "o-", color=color, markersize=4, label=engine.title)
    axes.set_title("Milliseconds for one text, one run each")
    axes.set_yscale("log")


def _svg(plot: Any, parity: ParityReport) -> str:
    style: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": plot.__name__,  # the same ids in every run, and other ids for each plot of a page
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GREY,
    }
    with rc_context(style):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        axes = figure.add_subplot()
        plot(axes, parity)
        lengths = sorted({result.case.length for result in parity.engines[0].cases})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of the longest row")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # a page must not contain the XML prologue


def _platform() -> str:
    # platform.platform() would run `uname -p` for a word that it then drops.
    libc = "".join(platform.libc_ver())  # empty on Windows and macOS
    return "-".join((platform.system(), platform.release(), platform.machine(), *(["with", libc] if libc else [])))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0; background: #f3f4f6; color: #111827; font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 74rem; margin: 2rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 0 0 .6rem; }}
section {{ background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; padding: 1.1rem 1.3rem; margin: 1rem 0; }}
.verdict {{ border-left: 6px solid #16a34a; font-weight: 600; }}
.verdict.failed {{ border-left-color: #dc2626; }}
.plots, .columns {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1.2rem; }}
.plots svg {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .3rem .65rem; text-align: right; border-bottom: 1px solid #e5e7eb; }}
th {{ font-size: .82rem; color: #4b5563; }}
tr.failed td {{ background: #fee2e2; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }}
dt {{ color: #6b7280; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
p {{ margin: .7rem 0 0; color: #4b5563; font-size: .88rem; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<section class="verdict {passed}">{verdict}</section>
<section>{facts}</section>
<section class="plots">{error_plot}{latency_plot}</section>
<section>
{tables}
<p>The column of an output gives its largest absolute difference from PyTorch FP32 over all real tokens, and
&ldquo;by a part&rdquo; that of an output which a part of the graph computes.
&ldquo;row alone&rdquo; is the largest difference between the shortest row in the batch and the same row run alone.
&ldquo;relative&rdquo; is the largest difference over the largest value that PyTorch gives for the same channel, word or
label in any case; it has a bound. &ldquo;cosine&rdquo; is the smallest cosine of all compared vectors (labels are
numbers and have none). top-1 and top-5 are the agreement of the best tokens at the masks. Each time is that of a single
run. Dashed lines are bounds.</p>
</section>
<section class="columns">
<div><h2>Machine</h2>{machine}</div>
<div><h2>Versions</h2>{versions}</div>
<div><h2>Export</h2>{timings}</div>
</section>
</main>
</body>
</html>
"""
