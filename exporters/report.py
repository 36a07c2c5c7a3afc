"""The parity report in three forms: a table for the terminal, report.json for machines, report.html for people."""

import datetime
import html
import importlib
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gte_deploy._version import __version__
from gte_deploy.exporters.parity import CaseResult, ParityReport
from gte_deploy.spec import ModelSpec
from gte_deploy.threads import available_cpus

FORMAT = "gte-deploy-parity-report"
FORMAT_VERSION = 1
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "numpy")
_LOWEST_SHOWN = 1e-9  # a logarithmic axis has no zero
_BLUE, _ORANGE, _GREY, _RED = "#2563eb", "#ea580c", "#6b7280", "#dc2626"


def library_versions() -> dict[str, str]:
    """Version of gte-deploy, of Python and of every library that took part in an export."""
    return {
        "gte-deploy": __version__,
        "python": platform.python_version(),
        # The modules', not the distributions': onnxruntime also comes as onnxruntime-gpu.
        **{name: importlib.import_module(name).__version__ for name in _LIBRARIES},
    }


def build_report(
    parity: ParityReport,
    *,
    spec: ModelSpec,
    source: Mapping[str, str],
    opset: int,
    fusions: Mapping[str, int],
    timings_s: Mapping[str, float],
) -> dict[str, Any]:
    """All of report.json: what was exported, how it compared, on what machine, and how long each step took."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": dict(source),
        "task": spec.task,
        "max_length": spec.max_length,
        "pooling": spec.pooling,
        "logits": spec.logits if spec.task == "fill-mask" else None,
        "opset": opset,
        "fusions": dict(fusions),
        "parity": parity.to_json(),
        "timings_s": {name: round(seconds, 3) for name, seconds in timings_s.items()},
        "machine": {"cpu": _cpu_name(), "cpus": available_cpus(), "platform": platform.platform()},
        "versions": library_versions(),
    }


def format_table(parity: ParityReport) -> str:
    """One line a case, columns aligned, and the verdict."""
    header, rows = _columns(parity.cases)
    rows = [
        [*row, "" if result.within(parity.tolerance) else "FAILED"]
        for row, result in zip(rows, parity.cases, strict=True)
    ]
    cells = [[*header, ""], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, verdict(parity)])


def verdict(parity: ParityReport) -> str:
    """One sentence: passed or failed, the worst numbers and the bounds."""
    return (
        f"parity {'passed' if parity.passed else 'FAILED'}: {len(parity.cases)} cases, "
        f"max abs {parity.max_abs:.2e} (bound {parity.tolerance.max_abs:g}), "
        f"smallest cosine {parity.cosine_min:.8f} (bound {parity.tolerance.cosine:g})"
    )


def render_html(parity: ParityReport, report: Mapping[str, Any]) -> str:
    """One page that needs nothing else: verdict, plots, every case, and where it was measured."""
    name = html.escape(report["source"]["name"])
    passed = "passed" if parity.passed else "failed"
    facts = {
        "task": report["task"],
        "precision": parity.precision,
        "longest input": f"{report['max_length']:,} tokens",
        "opset": report["opset"],
        "fusions": ", ".join(f"{fusion} {count}" for fusion, count in report["fusions"].items()) or "none",
    }
    return _PAGE.format(
        title=f"Parity of {name}",
        passed=passed,
        verdict=html.escape(verdict(parity)),
        facts=_definitions(facts),
        error_plot=_svg(_plot_error, parity),
        latency_plot=_svg(_plot_latency, parity),
        table=_html_table(parity),
        machine=_definitions({**report["machine"], "created": report["created"]}),
        versions=_definitions(report["versions"]),
        timings=_definitions({stage: f"{seconds:.1f} s" for stage, seconds in report["timings_s"].items()}),
    )


def _columns(results: Sequence[CaseResult]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table: the outputs and the top-k columns are those that the task has."""
    outputs = list(results[0].outputs)
    agreement = ["top-1", "top-5"] if results[0].top1 is not None else []
    header = ["length", "batch", "padding", *outputs, "relative", "row alone", "cosine", *agreement]
    rows = []
    for result in results:
        alone = max((found.max_abs for found in result.alone.values()), default=None)
        cosine = min(found.cosine_min for _, found in result.differences())
        row = [f"{result.case.length:,}", str(result.case.batch), "ragged" if result.case.ragged else "none"]
        row += [f"{result.outputs[name].max_abs:.1e}" for name in outputs]
        row.append(f"{max(found.max_rel for found in result.outputs.values()):.1e}")
        row += ["" if alone is None else f"{alone:.1e}", f"{cosine:.7f}"]
        row += [f"{share:.0%}" for share in (result.top1, result.top5) if share is not None]
        rows.append([*row, f"{result.reference_ms:,.1f}", f"{result.candidate_ms:,.1f}"])
    return [*header, "torch ms", "onnx ms"], rows


def _html_table(parity: ParityReport) -> str:
    header, rows = _columns(parity.cases)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for row, result in zip(rows, parity.cases, strict=True):
        style = "" if result.within(parity.tolerance) else ' class="failed"'
        body.append(f"<tr{style}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _definitions(items: Mapping[str, Any]) -> str:
    pairs = (f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in items.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _plot_error(axes: Axes, parity: ParityReport) -> None:
    names = list(parity.cases[0].outputs)
    for name, color in zip(names, (_BLUE, _ORANGE), strict=False):
        lengths = [result.case.length for result in parity.cases]
        errors = [max(result.outputs[name].max_abs, _LOWEST_SHOWN) for result in parity.cases]
        axes.scatter(lengths, errors, s=26, color=color, alpha=0.75, linewidths=0, label=name)
    axes.axhline(parity.tolerance.max_abs, color=_RED, linestyle="--", linewidth=1.2, label="bound")
    axes.set_title("Largest absolute difference from PyTorch")
    axes.set_yscale("log")


def _plot_latency(axes: Axes, parity: ParityReport) -> None:
    single = [result for result in parity.cases if result.case.batch == 1]
    lengths = [result.case.length for result in single]
    axes.plot(lengths, [r.reference_ms for r in single], "o-", color=_GREY, markersize=4, label="PyTorch FP32")
    axes.plot(lengths, [r.candidate_ms for r in single], "o-", color=_BLUE, markersize=4, label="exported graph")
    axes.set_title("Milliseconds for one text, one run each")
    axes.set_yscale("log")


def _svg(plot: Any, parity: ParityReport) -> str:
    style: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": plot.__name__,  # ids that do not change from run to run, nor meet on one page
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
        lengths = sorted({result.case.length for result in parity.cases})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of the longest row")
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # the XML prologue has no place inside a page


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
<h2>Every case</h2>
<div class="scroll">{table}</div>
<p>Under an output's name stands the largest absolute difference from PyTorch FP32 over all real tokens; under
&ldquo;row alone&rdquo; that of the shortest row in the batch from the same row run alone; &ldquo;relative&rdquo; is the
largest difference over the largest value of PyTorch's output; &ldquo;cosine&rdquo; is the
smallest of any vector compared; top-1 and top-5 are the agreement of the best tokens at the masks. Each time is a
single run.</p>
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
