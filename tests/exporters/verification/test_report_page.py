"""report.html: what it says first, what it never says, and how it looks in a browser."""

from __future__ import annotations

import ast
import dataclasses
import html.parser
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gte_deploy import cli
from gte_deploy.bundle.facts import verified
from gte_deploy.bundle.manifest import GraphEntry, Manifest, PlanEntry, TextsEntry
from gte_deploy.core.spec import ModelSpec, MultiVectorSpec, Profile, SparseSpec, TensorSpec
from gte_deploy.exporters.bundle.uses import uses
from gte_deploy.exporters.job import Built
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS, Accuracy
from gte_deploy.exporters.verification.bounds import TOLERANCES
from gte_deploy.exporters.verification.cases import Case
from gte_deploy.exporters.verification.checks import Check
from gte_deploy.exporters.verification.differences import CaseResult, Difference
from gte_deploy.exporters.verification.report import build_report, format_table
from gte_deploy.exporters.verification.report_page import ReportPage
from gte_deploy.exporters.verification.results import EngineParity, ParityReport
from gte_deploy.tasks import TASKS

LENGTHS = (1, 2, 17, 128, 130, 512, 2048, 2049, 8192)
TENSORS = (TensorSpec("input_ids", "int64", ("batch", "sequence")),)
OUTPUTS = (TensorSpec("logits", "float32", ("num_masks", 256)), TensorSpec("last_hidden_state", "float32", ("batch",)))
NAN = float("nan")


def case(length: int, relative: float) -> CaseResult:
    found = Difference(relative * 9, relative, 1 - relative / 200, 1 - relative / 100)
    return CaseResult(
        case=Case(length),
        outputs={"logits": found, "last_hidden_state": found},
        alone={},
        parts={"logits": found},
        all_logits={},
        finite=relative == relative,
        masks=4,
        top1=1.0,
        top5=0.9,
    )


def engine(name: str, compute: str, precision: str, relative: float, **options: Any) -> EngineParity:
    tolerance = TOLERANCES[compute if precision == "fp32" else precision]  # type: ignore[index]
    cases = tuple(case(length, relative * (1 + number)) for number, length in enumerate(LENGTHS))
    return EngineParity(name, compute, precision, tolerance, cases, **options)  # type: ignore[arg-type]


ACCURACY = Accuracy(0.9995, 0.98, 0.9997, 0.99, 1.0, 0.985, (0.97, 0.993), 0.96, (0.3, 0.31), (0.5, 0.51), 6000, 812)
MANY_LANGUAGES = dataclasses.replace(ACCURACY, languages={code: ACCURACY for code in ("de", "en", "zh")})
BF16 = Accuracy(0.9999, 0.999, 0.9999, 0.999, 1.0, None, None, 0.96, None, None, 6000, 0)
MISSED = dataclasses.replace(ACCURACY, top1_agreement=0.9, top1_interval=(0.88, 0.92), token_cosine_mean=0.95)


def on_text(engine: EngineParity, found: Accuracy) -> EngineParity:
    bounds = ACCURACY_BOUNDS[engine.precision]
    return dataclasses.replace(engine, accuracy=found, accuracy_bounds=bounds)


ENGINES = {
    "fp32": [
        engine("onnxruntime", "fp32", "fp32", 1e-7),
        engine("openvino", "fp32", "fp32", 2e-7),
        engine("openvino", "bf16", "fp32", 2e-3, optional=True),
    ],
    "int8": [
        engine("onnxruntime", "fp32", "int8", 0.01, accuracy=MANY_LANGUAGES, accuracy_bounds=ACCURACY_BOUNDS["int8"]),
        engine("openvino", "bf16", "int8", 0.02, accuracy=MANY_LANGUAGES, accuracy_bounds=ACCURACY_BOUNDS["int8"]),
    ],
    "cuda": [engine("onnxruntime", "fp16", "fp16", 1e-4, emulated=True, device="cuda")],
    "tensorrt": [engine("tensorrt", "fp16", "fp16", 1e-4, emulated=True)],
    "equal": [engine("onnxruntime", "fp32", "fp32", 0.0)],
    "broken": [engine("onnxruntime", "fp32", "fp32", NAN), engine("openvino", "fp32", "fp32", 40.0)],
    "int8 missed": [on_text(engine("onnxruntime", "fp32", "int8", 0.3), MISSED)],
    "int4": [on_text(engine("onnxruntime", "fp32", "int4-weight", 0.05), ACCURACY)],
    "bf16": [
        engine("onnxruntime", "fp32", "bf16", 1e-3),
        engine("openvino", "fp32", "bf16", 1e-3),
        on_text(engine("openvino", "bf16", "bf16", 2e-3), BF16),
    ],
    "cuda bf16": [on_text(engine("onnxruntime", "bf16", "bf16", 1e-3, emulated=True, device="cuda"), BF16)],
    "cuda run": [engine("onnxruntime", "fp16", "fp16", 1e-4, device="cuda")],
    "rtx": [engine("tensorrt", "fp16", "fp16", 1e-4, emulated=True)],
    "fp8": [on_text(engine("tensorrt", "fp8", "fp8", 0.01, emulated=True), MANY_LANGUAGES)],
    "executorch": [engine("executorch", "fp32", "fp32", 1e-6)],
    "openvino": [engine("openvino", "fp32", "fp32", 2e-7), engine("openvino", "bf16", "fp32", 2e-3, optional=True)],
    **{f"task {task}": [engine("onnxruntime", "fp32", "fp32", 1e-7)] for task in TASKS},
    "reranker": [engine("onnxruntime", "fp32", "fp32", 1e-7)],
}
SWEPT = ("int8", "int8 missed", "fp8")
NOT_RUN = "ONNX Runtime's CUDA kernels were not run. The comparison ran an emulation of the graph on the CPU."
LOSS = {f"gte.layers.{layer}.self_attn.a_group_with_a_long_name": 10.0**-layer for layer in range(1, 9)}
COMMAND = "trtexec --onnx=onnx/model_tensorrt.onnx --minShapes=input_ids:1x1,attention_mask:1x1 --fp16"
PLAN = PlanEntry(
    "tensorrt/model.plan",
    "tensorrt-rtx",
    "1.7.1.116",
    ("8.9",),
    (Profile((1, 1), (8, 8), (9, 9)),),
    *(TENSORS, OUTPUTS),
    {"fused_attention": 2},
)


def spec_of(kind: str) -> ModelSpec:
    task: Any = kind.removeprefix("task ") if kind.startswith("task ") else "fill-mask"
    labels = {0: "no", 1: "yes"}
    more: dict[str, Any] = {
        "classify": {"id2label": labels, "num_labels": 2},
        "token-classify": {"id2label": labels, "num_labels": 2},
        "sparse": {"sparse": SparseSpec("splade", activation="log1p_relu")},
        "hybrid": {"sparse": SparseSpec("token-weights", activation="relu")},
        "multi-vector": {"multi_vector": MultiVectorSpec(document_prefix=7, query_length=12, document_length=24)},
    }.get(task, {})
    if kind == "reranker":
        task, more = "classify", {"id2label": {0: "score"}, "num_labels": 1}
    return ModelSpec(task=task, max_length=8192, vocab_size=256, hidden_size=32, pad_token_id=0, **more)


def caveats_of(kind: str) -> tuple[str, ...]:
    if kind == "tensorrt":
        return (f"No engine was built. Build it with:\n{COMMAND}\nThen adopt it.",)
    return (NOT_RUN,) if kind in ("cuda", "cuda bf16") else ()


def graphs_of(kind: str, parity: ParityReport, spec: ModelSpec) -> Any:
    """A graph for each engine, with what an export writes of it."""
    names = ("logits",) if spec.task in ("fill-mask", "classify", "token-classify") else ("sentence_embedding",)
    outputs = tuple(TensorSpec(name, "float32", ("batch",)) for name in (*names, "last_hidden_state"))
    return {
        each.engine: GraphEntry(
            f"onnx/model_{each.engine}.onnx",
            20,
            TENSORS,
            outputs,
            {"rope": 8, "fp32_linears": 0},
            computes=parity.verified(each.engine),
            emulated=parity.verified(each.engine, emulated=True),
        )
        for each in parity.engines
    }


def report_page(kind: str, **parity_options: Any) -> ReportPage:
    """The page of a made-up export."""
    engines = ENGINES[kind]
    compared = {"texts": 125, "answers": 13, "library": "GteForMaskedLM of transformers 5.24"}
    lines = ("encode of 'a', the worst of 12: 0.1 here, 0.2 from the library",) if kind == "int8 missed" else ()
    parity = ParityReport(
        engines[0].precision,
        tuple(engines),
        caveats=caveats_of(kind),
        checks=(Check("answers", lines, compared),),
        **parity_options,
    )
    spec = spec_of(kind)
    calibration = TextsEntry("my <texts>.txt", (), 116, "ab" * 32) if kind in SWEPT else None
    built = Built(
        {},
        sensitivity=LOSS if kind in SWEPT else {},
        kept_groups=tuple(LOSS)[:2] if kind in SWEPT else (),
        plan=PLAN if kind == "rtx" else None,
        calibration=calibration,
    )
    graphs = graphs_of(kind, parity, spec)
    source = {"name": "owner/a-model-<b>-with-a-long-name"}
    report = build_report(parity, built, spec=spec, source=source, graphs=graphs, timings_s={"trace": 1.0})
    described = Manifest(
        spec,
        engines[0].precision,
        {} if kind == "rtx" else graphs,
        {},
        {},
        source,
        target="cuda" if kind.startswith("cuda") else "cpu",
        plan=built.plan,
        calibration=calibration,
    )
    return ReportPage(parity, report, described, mask_token="<mask>")


class Outline(html.parser.HTMLParser):
    """The headings of a page in order, the number of each tag, and whether every tag is closed."""

    VOID = ("meta", "wbr", "line", "circle", "path")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[tuple[str, str]] = []
        self.count: dict[str, int] = {}
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            tag, text = self.headings[-1]
            self.headings[-1] = (tag, text + data)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_verdict_and_the_accuracy_come_first(kind):
    page = report_page(kind).render()
    outline = Outline(page)
    (title,) = [text for tag, text in outline.headings if tag == "h1"]
    assert title == "owner/a-model-<b>-with-a-long-name: report of the export"
    sections = [text for tag, text in outline.headings if tag == "h2"]
    assert sections[0].startswith(("Passed", "Missed")) and sections[1:3] == ["Accuracy", "Differences by length"]
    assert sections[-4:] == ["How to use it", "The bundle", "Every batch", "Where it was made"]
    assert outline.count["caption"] == outline.count["table"] >= 2
    assert "aria-label" in page and outline.count["figcaption"] == 1


@pytest.mark.parametrize("kind", ENGINES)
def test_one_file_that_asks_no_host_and_runs_no_script(kind):
    page = report_page(kind).render()
    assert (
        re.findall(
            r"<(?:script|link|img|iframe|object)\b|\bsrc=|\bhref=|@import|url\(|https?://",
            page.replace("huggingface.co", ""),
        )
        == []
    )


def test_no_time_of_a_run_is_shown():
    """A single run says nothing about speed, and that of an emulation less."""
    text = report_page("tensorrt").render() + format_table(report_page("int8").parity)
    assert not re.search(r"\bms\b|milliseconds|torch ms", text)
    assert "gte-deploy bench MODEL" in text


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("fp32", ["onnxruntime fp32", "openvino fp32", "openvino bf16"]),
        ("int8", ["onnxruntime int8", "openvino int8+bf16"]),
        ("cuda", ["onnxruntime fp16 on cuda (emulated)"]),
        ("tensorrt", ["tensorrt fp16 (emulated)"]),
    ],
)
def test_the_names_say_what_ran(kind, names):
    found = report_page(kind)
    assert [each.title for each in found.parity.engines] == names
    assert [each["title"] for each in found.report["parity"]["engines"]] == names
    table, page = format_table(found.parity), found.render()
    for name in names:
        assert f"{name}: parity passed" in table and f'<th scope="col">{name}</th>' in page
    assert ("the engine itself did not run here" in page) == all("emulated" in name for name in names)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_names_are_those_of_the_manifest(kind):
    """`gte-deploy info` reads them from the manifest, and says them as the report and the export's own lines do."""
    found = report_page(kind)
    passed = [each.title for each in found.parity.engines if each.passed]
    if found.described.plan is None:
        assert [title for titles in verified(found.described).values() for title in titles] == passed
    assert all(f"{each.title}: parity " in format_table(found.parity) for each in found.parity.engines)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("int8", "CPUs"),
        ("openvino", "CPUs"),
        ("cuda", "NVIDIA GPUs, with ONNX Runtime"),
        ("tensorrt", "TensorRT; its engine is not built yet"),
        ("rtx", "GPUs of sm89, with TensorRT-RTX"),
        ("executorch", "ExecuTorch, on CPUs of phones and other devices"),
    ],
)
def test_the_page_says_what_runs_the_bundle(kind, expected):
    assert f"<dt>made for</dt><dd>{expected}</dd>" in report_page(kind).render()


@pytest.mark.parametrize("kind", ENGINES)
def test_no_section_is_empty_and_none_is_about_what_is_not_there(kind):
    found = report_page(kind)
    page = found.render()
    sections = re.findall(r"<section[^>]*><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL)
    assert all(len(re.sub(r"<[^>]+>", "", content).strip()) > 20 for _, content in sections)
    titles = [title for title, _ in sections]
    assert len(set(titles)) == len(titles)
    assert ("Sensitivity of the layers" in titles) == (kind in SWEPT)
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<(style|pre|svg)\b.*?</\1>", " ", page, flags=re.DOTALL))
    assert not re.search(r"\bNone\b|\bTrue\b|\bFalse\b|\{\}|\[\]|fp32_linears 0", text)
    every = dict(sections)["Every batch"]
    for column in re.findall(r"“([^”]+)”", every):
        assert f'<th scope="col">{column}</th>' in every, "a column that no table has is not explained"
    assert ("Dashed lines are bounds" in page) == any(each.tolerance.max_rel for each in ENGINES[kind])
    assert ("Emulated” means" in page) == (kind in ("tensorrt", "rtx", "fp8")), "the others say it in their caveats"


@pytest.mark.parametrize("kind", ENGINES)
def test_the_programs_can_be_parsed_and_the_commands_are_commands(kind):
    """tests/exporters/bundle/test_card.py runs the same programs."""
    found, parser = report_page(kind), cli._parser()
    for use in uses(found.described, "gte"):
        if use.language == "python":
            ast.parse(use.text)
        elif use.language == "console":
            for line in use.text.splitlines():
                name, *words = shlex.split(line.removeprefix("$ "))
                assert name == "gte-deploy" and parser.parse_args(words)
    commands = [line for use in uses(found.described, "gte") for line in use.text.splitlines() if line[:1] == "$"]
    assert len(commands) == 2, "the task's own command, and the server"
    assert ("has no TensorRT engine yet" in found.render()) == (kind in ("tensorrt", "fp8"))


def test_a_reranker_reads_pairs_and_a_classifier_texts():
    found = {kind: "\n".join(use.text for use in uses(report_page(kind).described, "gte")) for kind in ENGINES}
    assert 'tokenizer.encode("what is a panda?", "The panda is a bear.")' in found["reranker"]
    assert "gte-deploy rank" in found["reranker"]
    assert 'tokenizer.encode("The panda is a bear.")' in found["task classify"]
    assert 'model.predict("The panda is a bear.")' in found["task classify"]
    assert 'gte-deploy predict -m MODEL "The panda is a bear."' in found["task classify"]


def test_values_that_miss_their_bounds_stand_out():
    page = report_page("int8 missed").render()
    marked = re.findall(r'<td><span class="failed-word">([\d.%]+)</span>', page)
    assert marked == ["0.95000", "90.0%"], "the cosine of tokens, and the share whose interval ends below its bound"
    assert page.count("the worst of 12") == 1 and ">MISSED</span> answers: 13 compared with those of Gte" in page
    assert 'class="failed-word">9' not in report_page("int8").render()


def test_only_the_libraries_that_took_part_have_a_version():
    assert "openvino" in report_page("fp32").report["versions"]
    assert not {"openvino", "tensorrt_rtx", "tensorrt"} & set(report_page("cuda").report["versions"])


def test_int8_says_which_groups_stay_higher_and_what_each_costs():
    page = report_page("int8").render()
    assert (
        "2 of 8 groups of layers stay in a higher precision" in page
        and "<dt>calibration texts</dt><dd>116 texts: my &lt;texts&gt;" in page
    )
    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%"', page)]
    assert widths == [100.0, 10.0, 1.0, 0.1, 0.0, 0.0, 0.0, 0.0], "on a linear scale from 0"
    assert page.count("kept higher") == 2 and "1.0e-08" in page
    assert "Sensitivity of the layers" not in report_page("fp32").render()


def test_a_miss_is_the_first_thing_to_read():
    page = report_page("broken").render()
    first = page.index('class="verdict failed"')
    assert first < page.index("length 8,192, batch 1: ") < page.index("<h2>Accuracy")
    assert page.index("<li>", first) < page.index("<summary>13 more misses</summary>") < page.index("<h2>Accuracy")
    assert page.count('<tr class="failed">') == 2 * len(LENGTHS) and ">MISSED<" in page


def test_what_an_optional_engine_misses_is_told_without_alarm():
    engines = [ENGINES["fp32"][0], engine("openvino", "bf16", "fp32", 1.0, optional=True)]
    page = dataclasses.replace(report_page("fp32"), parity=ParityReport("fp32", tuple(engines))).render()
    assert 'class="verdict partly"' in page and "Passed, but openvino bf16 misses its bounds" in page


def test_the_examples_have_the_mask_of_the_tokenizer_and_commands_can_be_copied():
    page = report_page("tensorrt").render()
    assert "Paris is the &lt;mask&gt; of France." in page and "$ gte-deploy fill-mask -m MODEL" in page
    assert f"<code>{COMMAND}</code>" in page and "<div>Then adopt it.</div>" in page


@pytest.mark.parametrize("kind", ENGINES)
def test_the_axis_of_the_chart_has_numbers_at_every_range(kind):
    page = report_page(kind).render()
    ticks = [float(text) for text in re.findall(r'class="tick">([^<]+)<', page)]
    assert 3 <= len(ticks) <= 8 and ticks == sorted(ticks)
    values = [
        found.max_rel
        for each in ENGINES[kind]
        for result in each.cases
        for found in result.outputs.values()
        if 0 < found.max_rel < 1e9
    ]
    bounds = [each.tolerance.max_rel for each in ENGINES[kind] if each.tolerance.max_rel is not None]
    assert all(ticks[0] <= value for value in [*values, *bounds])
    drawn = [float(x) for x in re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="3.4" class="s0"><title>.', page)]
    assert len(drawn) == len(LENGTHS) and all(42 <= x <= 326 for x in drawn)


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Callable[..., Any]:
    """`opened(page, **context)`: a page of Playwright with the text of a report."""

    def open_(text: str, **context: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        page = chromium.new_context(**context).new_page()
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(file.as_uri())
        return page

    return open_


_OVERLAPS = """
() => {
  const texts = [...document.querySelectorAll('figure > svg text')];
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  const meet = (p, q) => p.left < q.right && q.left < p.right && p.top < q.bottom - 2 && q.top < p.bottom - 2;
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) => meet(p, q)).map(([b, q]) => [a, b]));
}
"""
# The contrast of WCAG 2.2 between the colour of each text and the ground behind it.
_CONTRASTS = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = v => v <= 10 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const ground = node => {
    const color = node ? rgba(getComputedStyle(node).backgroundColor) : [255, 255, 255, 255];
    return color[3] ? color : ground(node.parentElement);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || node.closest('title')) continue;
    const style = getComputedStyle(node), color = rgba(node.closest('svg') ? style.fill : style.color);
    const [dark, light] = [luminance(color), luminance(ground(node))].sort((x, y) => x - y);
    found.push([(light + .05) / (dark + .05), text.slice(0, 40)]);
  }
  return found;
}
"""


DRAWN = ("fp32", "int8", "broken", "tensorrt", "rtx", "int8 missed", "task hybrid")
"""Reports whose sections differ: all others are of the same parts."""


@pytest.mark.parametrize("kind", DRAWN)
def test_on_a_phone_nothing_is_wider_than_the_screen(opened, kind):
    page = opened(report_page(kind).render(), viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    table = page.locator("table.fit").first
    assert table.evaluate("t => t.scrollWidth <= t.parentElement.clientWidth"), "the accuracy needs no scrolling"
    assert page.evaluate(_OVERLAPS) == []
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure > svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 9, "pixels"
    assert len(page.requests) == 1 and page.requests[0].startswith("file:")


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["int8", "broken", "tensorrt"])
def test_every_text_has_contrast(opened, kind, color_scheme):
    page = opened(report_page(kind).render(), color_scheme=color_scheme)
    found = page.evaluate(_CONTRASTS)
    assert len(found) > 100 and [entry for entry in found if entry[0] < 4.5] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 247)", "dark": "rgb(17, 22, 21)"}[color_scheme]


def test_on_paper_it_is_light_and_nothing_is_cut_off(opened):
    page = opened(report_page("int8").render(), color_scheme="dark", viewport={"width": 720, "height": 1000})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(23, 33, 31)"
    boxes = "[...document.querySelectorAll('.scroll, pre')]"
    cut = page.evaluate(f"Math.max(...{boxes}.map(box => box.scrollWidth - box.clientWidth))")
    assert cut <= 1, "A4 has 720 pixels between usual margins"


def test_on_paper_every_miss_is_listed(opened):
    page = opened(report_page("broken").render())
    hidden = page.locator("details li").last
    assert not hidden.evaluate("node => node.checkVisibility({contentVisibilityAuto: true})")
    page.emulate_media(media="print")
    assert hidden.evaluate("node => node.checkVisibility({contentVisibilityAuto: true})")
    assert hidden.evaluate("node => node.getBoundingClientRect().height") > 10
