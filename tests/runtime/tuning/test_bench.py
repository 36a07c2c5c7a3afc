"""gte-deploy bench: every engine in its own process, what fails is told, and the fastest is recorded where asked."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from factories import add_multi_vector_modules
from gte_deploy import cli
from gte_deploy.backends import picks
from gte_deploy.backends.stream_plan import ListPick
from gte_deploy.bundle.manifest import PlanEntry, read_manifest
from gte_deploy.core import exit_codes
from gte_deploy.core.errors import BackendError, InputError
from gte_deploy.core.spec import Profile
from gte_deploy.tasks import TASKS
from gte_deploy.text.tokenization import load_tokenizer
from gte_deploy.tuning.bench import EngineResult, bench, fastest, format_table, record, synthetic_texts
from gte_deploy.tuning.calls import answer
from gte_deploy.tuning.lists import ListResult, best_for_lists, list_lengths, measure_lists
from gte_deploy.tuning.measure import Answer, Spread, Worker, WorkerError, interleaved, resident_bytes
from runtime_models import make_word_checkpoint

SHAPES = ["1x8", "3x16"]


@pytest.fixture(scope="module")
def bundle(word_checkpoints, bundle_of):
    return bundle_of(word_checkpoints["embed"])


@pytest.fixture(scope="module")
def report(bundle):
    return bench(bundle, backend="onnx", shapes=SHAPES, repeats=2, num_threads=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def result(name, medians, *, error=None):
    seconds = {shape: [median] * 3 for shape, median in zip(SHAPES, medians, strict=True)}
    backend, precision = name.split()
    return EngineResult(name, backend, "bf16" if precision.endswith("bf16") else "fp32", seconds, 1.0, 10**8, error)


def test_every_shape_is_timed(report):
    (onnx,) = report.engines
    assert onnx.error is None and onnx.name == "onnx fp32"
    assert {shape: len(seconds) for shape, seconds in onnx.seconds.items()} == {"1x8": 2, "3x16": 2}
    assert onnx.first_answer_s > max(max(seconds) for seconds in onnx.seconds.values()) > 0
    # A Python with onnxruntime takes tens of megabytes; one that shared the memory of pytest and torch, hundreds.
    assert 2e7 < onnx.peak_bytes < 3e8


@pytest.mark.parametrize(
    ("task", "call"),
    [
        ("fill-mask", "fill_mask"),
        ("embed", "encode"),
        ("classify", "predict"),
        ("token-classify", "classify_tokens"),
        ("sparse", "encode_sparse"),
        ("hybrid", "encode_hybrid"),
        ("multi-vector", "encode_multi_vector"),
    ],
)
def test_the_call_of_the_task_is_timed(task, call, word_checkpoints, tmp_path, monkeypatch):
    """Each text is an input of its own, of exactly its tokens, and the call is the one of the task alone."""
    import gte_deploy

    if task == "multi-vector":
        source = make_word_checkpoint(tmp_path / "source", task="embed")
        add_multi_vector_modules(source, library="sentence-transformers")
    elif task in word_checkpoints:
        source = word_checkpoints[task]
    else:
        made_for = "fill-mask" if task == "sparse" else "token-classify"
        source = make_word_checkpoint(tmp_path / "source", task=made_for, pooling="cls", num_labels=1)
    tokenizer = load_tokenizer(source)
    texts = synthetic_texts(tokenizer, [8, 8], masked=task == "fill-mask")
    assert [len(row) for row in tokenizer.encode_texts(texts, max_length=128, truncation=False)] == [8, 8]
    with gte_deploy.load(source, backend="torch", task=task) as model:
        called, shapes = [], []
        for name in (
            "fill_mask",
            "encode",
            "predict",
            "classify_tokens",
            "encode_sparse",
            "encode_hybrid",
            "encode_multi_vector",
        ):
            method = getattr(model, name)
            monkeypatch.setattr(
                model, name, lambda *a, name=name, method=method, **k: called.append(name) or method(*a, **k)
            )
        run = model._backend.run
        monkeypatch.setattr(
            model._backend, "run", lambda batch, outputs: shapes.append(batch.input_ids.shape) or run(batch, outputs)
        )
        answer(model, texts, batch_size=2, max_batch_tokens=1024)
    assert TASKS[task].method == called[0] == call
    assert shapes == [(2, 8)]


def test_an_answer_engine_of_a_classifier_is_timed(word_checkpoints, bundle_of):
    report = bench(bundle_of(word_checkpoints["classify"]), backend="onnx", shapes=["2x8"], repeats=1, num_threads=1)
    assert report.engines[0].error is None and report.to_json()["call"] == "predict"
    assert "predict" in format_table(report).splitlines()[0]
    assert all(entry.error is None for entry in report.engines[0].lists)


def test_lists_are_timed_with_one_stream_and_with_several(bundle, tmp_path):
    threads = len(os.sched_getaffinity(0))
    report = bench(bundle, backend="onnx", shapes=SHAPES[:1], repeats=2, num_threads=threads)
    (onnx,) = report.engines
    assert {result.setting.streams for result in onnx.lists} == {1, max(1, threads // 2), threads}
    assert {result.setting.batch_tokens for result in onnx.lists} == {512, 1024, 2048}
    assert all(result.error is None and len(result.seconds) == 2 for result in onnx.lists)
    first = onnx.lists[0]
    assert first.setting == ListPick(1, 1024)
    tokens = sum(report.list_tokens)
    assert f"{first.spread.median * 1000:,.2f}" in format_table(report) and f"{tokens:,} tokens" in format_table(report)
    data = json.loads(json.dumps(report.to_json()))["engines"][0]["lists"][0]
    assert data["setting"] == {"streams": 1, "batch_tokens": 1024} and data["seconds"] == list(first.seconds)
    record(report, onnx)
    assert picks.lookup(read_manifest(bundle).to_json()["checksum"]).lists == best_for_lists(onnx.lists)


def test_lists_of_an_engine_that_fails_with_streams(bundle, monkeypatch):
    class Worker:
        def __init__(self, factory, path, backend, precision, threads, streams):
            if streams > 1:
                raise WorkerError("no memory")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def call(self, method, texts, tokens):
            return Answer(None, 1.0 if tokens == 1024 else 0.9, 0)

    monkeypatch.setattr("gte_deploy.tuning.lists.Worker", Worker)
    found = measure_lists(bundle, ("onnx", None), ["a"], num_threads=2, repeats=1, progress=lambda line: None)
    assert [(result.setting.streams, result.error) for result in found] == [(1, None)] * 3 + [(2, "no memory")] * 3
    assert best_for_lists(found) == ListPick(1, 512)
    assert best_for_lists(found[3:]) is None


def test_the_setting_for_lists_changes_only_for_a_clear_gain():
    one, two = ListPick(1, 1024), ListPick(2, 1024)
    assert best_for_lists([ListResult(one, [1.0] * 3), ListResult(two, [0.98] * 3)]) == one
    assert best_for_lists([ListResult(one, [1.0] * 3), ListResult(two, [0.9] * 3)]) == two


def test_the_list_grows_with_the_threads_and_keeps_to_the_model():
    assert len(list_lengths(1, low=3, high=128)) == len(list_lengths(8, low=3, high=128)) == 64
    assert len(list_lengths(96, low=3, high=128)) == 768
    assert (min(list_lengths(96, low=9, high=50)), max(list_lengths(96, low=9, high=50))) == (9, 50)


def test_json_and_table_say_the_same(report):
    data = json.loads(json.dumps(report.to_json()))
    (onnx,) = data["engines"]
    shape = onnx["shapes"]["3x16"]
    assert shape["tokens_per_second"] == pytest.approx(48 / shape["median"])
    assert shape["least"] <= shape["q1"] <= shape["median"] <= shape["q3"]
    assert data["cpu"] and data["versions"]["onnxruntime"] and data["num_threads"] == 1 and data["date"]
    table = format_table(report)
    assert f"{shape['median'] * 1000:,.2f}" in table and f"{onnx['peak_bytes'] / 1e6:,.0f}" in table


def test_an_engine_that_cannot_run_is_named_with_its_reason(report, monkeypatch):
    lost = result("openvino fp32", [1, 1], error="openvino is not installed")
    both = dataclasses.replace(report, engines=(*report.engines, lost))
    assert "openvino fp32" in format_table(both) and "not measured: openvino is not installed" in format_table(both)
    assert both.to_json()["engines"][1]["shapes"] == {}
    assert fastest(both) == report.engines[0]


@pytest.mark.parametrize(
    ("with_plan", "backend", "tried"),
    [
        (False, None, ["onnx", "openvino", "openvino"]),
        (True, None, ["tensorrt"]),
        (False, "openvino", ["openvino", "openvino"]),
        (False, "tensorrt", ["tensorrt"]),
    ],
)
def test_the_engines_of_a_bundle(bundle, monkeypatch, with_plan, backend, tried):
    opened = []

    def worker(factory, path, *arguments):
        opened.append(arguments[0])
        raise WorkerError("not here")

    manifest = read_manifest(bundle)
    plan = PlanEntry("p", "tensorrt", "11.0", ("8.9",), (Profile((1, 1), (1, 8), (4, 32)),), (), (), {})
    given = dataclasses.replace(manifest, plan=plan) if with_plan else manifest
    monkeypatch.setattr("gte_deploy.tuning.bench.read_manifest", lambda path: given)
    monkeypatch.setattr("gte_deploy.tuning.bench.Worker", worker)
    with pytest.raises(BackendError, match="no engine here could run"):
        bench(bundle, backend=backend, shapes=SHAPES)
    assert opened == tried


def test_no_engine_at_all(bundle, monkeypatch):
    def broken(*arguments):
        raise WorkerError("of no use here")

    monkeypatch.setattr("gte_deploy.tuning.bench.Worker", broken)
    with pytest.raises(BackendError, match="onnx fp32: of no use here"):
        bench(bundle, shapes=SHAPES)


def test_the_fastest_is_chosen_over_all_shapes_and_of_the_same_precision(report):
    engines = (
        result("onnx fp32", [1.0, 10.0]),
        result("openvino fp32", [2.0, 4.0]),  # 8 against 10: slower at one shape, faster in the mean
        result("openvino bf16", [0.5, 0.5]),
    )
    many = dataclasses.replace(report, shapes=tuple(report.shapes), engines=engines)
    assert fastest(many).name == "openvino fp32"
    assert fastest(many, precision_may_change=True).name == "openvino bf16"
    with pytest.raises(BackendError, match="--precision-may-change"):
        fastest(dataclasses.replace(many, engines=engines[2:]))


@pytest.mark.parametrize(
    ("precision", "names"),
    [
        ("fp32", ["onnx fp32", "openvino fp32", "openvino bf16"]),
        ("bf16", ["onnx fp32", "openvino fp32", "openvino bf16"]),
        ("int8", ["onnx int8", "openvino int8", "openvino int8+bf16"]),
    ],
)
def test_bfloat16_is_measured_and_is_a_bundles_own_where_its_export_verified_it(report, monkeypatch, precision, names):
    opened = []

    def worker(factory, path, backend, computes, threads):
        opened.append((backend, computes))
        raise WorkerError("not here")

    graphs = dict(report.manifest.graphs)
    graphs["openvino"] = dataclasses.replace(graphs["openvino"], computes=("fp32", "bf16"))
    given = dataclasses.replace(report.manifest, precision=precision, graphs=graphs)
    monkeypatch.setattr("gte_deploy.tuning.bench.read_manifest", lambda path: given)
    monkeypatch.setattr("gte_deploy.tuning.bench.Worker", worker)
    with pytest.raises(BackendError, match=": not here; ".join(map(re.escape, names))):
        bench(report.bundle, shapes=SHAPES)
    assert opened == [("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]
    engines = tuple(result(name, [seconds] * 2) for name, seconds in zip(names, (3.0, 2.0, 1.0), strict=True))
    found = fastest(dataclasses.replace(report, manifest=given, engines=engines)).name
    assert found == ("openvino fp32" if precision == "fp32" else names[-1])


def test_what_is_recorded_is_found_by_the_manifest(report, bundle):
    file = record(report, report.engines[0])
    pick = picks.lookup(read_manifest(bundle).to_json()["checksum"])
    assert file.is_file() and (pick.backend, pick.precision) == ("onnx", "fp32")
    assert pick.measured["onnx fp32"]["1x8"] == report.engines[0].spread("1x8").median


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["8"]}, "form ROWSxTOKENS"),
        ({"shapes": ["x8"]}, "form ROWSxTOKENS"),
        ({"shapes": ["1x2x3"]}, "form ROWSxTOKENS"),
        ({"shapes": ["0x8"]}, "rows of shape 0x8"),
        ({"shapes": ["1x129"]}, "tokens of shape 1x129"),
        ({"shapes": ["1x2"]}, "tokens of shape 1x2"),
        ({"repeats": 0}, "repeats"),
        ({"num_threads": 0}, "num_threads"),
        ({"backend": "torch"}, "backend is .torch.; expected one of onnx, openvino"),
    ],
)
def test_arguments_out_of_range(bundle, options, message):
    with pytest.raises(InputError, match=message):
        bench(bundle, **options)


def test_synthetic_texts_have_exactly_the_tokens(word_checkpoints):
    tokenizer = load_tokenizer(word_checkpoints["embed"])
    lengths = [3, 128, 17, 17]
    texts = synthetic_texts(tokenizer, lengths)
    assert [len(row) for row in tokenizer.encode_texts(texts, max_length=128, truncation=False)] == lengths
    assert texts[2] != texts[3] and texts == synthetic_texts(tokenizer, lengths)
    with pytest.raises(InputError, match="at least 3 tokens"):
        synthetic_texts(tokenizer, [2])


def test_the_command(bundle, capsys):
    arguments = ["bench", str(bundle), "--shapes", "1x8", "--repeats", "1", "--json"]
    assert cli.main([*arguments, "--pick", "--progress"]) == exit_codes.OK
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["picked"] in {engine["name"] for engine in data["engines"] if engine["error"] is None}
    assert "1x8: 1 rounds" in captured.err and "recorded" in captured.err
    assert picks.lookup(read_manifest(bundle).to_json()["checksum"]).backend == data["picked"].split()[0]
    assert cli.main([*arguments, "--pick", "--threads", "1"]) == exit_codes.USAGE
    assert "leave out" in capsys.readouterr().err


def test_the_command_needs_no_torch(bundle):
    script = (
        "import sys; from gte_deploy import cli\n"
        "if __name__ == '__main__':\n"
        "    code = cli.main(sys.argv[1:]); assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    arguments = ["bench", str(bundle), "--shapes", "1x8", "--repeats", "1", "--backend", "onnx", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == exit_codes.OK, done.stderr
    assert "onnx fp32" in done.stdout and "1x8" in done.stdout
    assert done.stderr == "", "without a terminal, no progress"
    assert done.stdout.isprintable() or set(done.stdout) - {"\n"} == {c for c in done.stdout if c.isprintable()}


@pytest.mark.parametrize(
    ("options", "terminal", "told"),
    [
        ([], False, False),
        ([], True, True),
        (["--progress"], False, True),
        (["--quiet"], True, False),
        (["--quiet", "--progress"], True, False),
        (["--json"], False, False),
        (["--json"], True, True),
    ],
    ids=str,
)
def test_progress_is_for_terminals_and_stdout_for_the_result(report, monkeypatch, capsys, options, terminal, told):
    def measured(bundle, *, progress, **rest):
        progress("1x8: 2 rounds")
        return report

    monkeypatch.setattr("gte_deploy.tuning.bench.bench", measured)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert cli.main(["bench", str(report.bundle), *options]) == exit_codes.OK
    captured = capsys.readouterr()
    assert captured.err == ("gte-deploy: 1x8: 2 rounds\n" if told else "")
    if "--json" in options:
        assert json.loads(captured.out) == {**json.loads(json.dumps(report.to_json())), "picked": None}
    else:
        assert captured.out == format_table(report) + "\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_recorded_is_told_unless_quiet(report, monkeypatch, capsys, quiet):
    monkeypatch.setattr("gte_deploy.tuning.bench.bench", lambda bundle, **rest: report)
    assert cli.main(["bench", str(report.bundle), "--pick", *["--quiet"] * quiet]) == exit_codes.OK
    captured = capsys.readouterr()
    assert ("recorded onnx fp32 in" in captured.err) != quiet
    assert captured.out.endswith(
        "picked onnx fp32: load takes it for this bundle, on this machine, with backend 'auto'\n"
    )


def test_an_error_is_an_object_for_programs(bundle, capsys):
    assert cli.main(["bench", str(bundle), "--shapes", "8", "--json"]) == exit_codes.USAGE
    captured = capsys.readouterr()
    assert "form ROWSxTOKENS" in json.loads(captured.out)["error"]["message"] and "\n" not in captured.err.strip()


# --- measuring ------------------------------------------------------------------------------------------------------


class Contestant:
    def __init__(self, start=0):
        if start < 0:
            raise InputError("start must not be negative")
        print("not on stdout")
        self.count = start

    def add(self, number):
        self.count += number
        return self.count, os.getpid(), len(os.sched_getaffinity(0))

    def allocate(self, size):
        return len(bytearray(size))

    def fail(self):
        raise KeyError("lost")

    def die(self):
        os._exit(7)

    def hang(self):
        import time

        time.sleep(600)


def test_a_worker_keeps_its_contestant_in_a_process_of_its_own(capfd):
    with Worker(Contestant, 5, cpus=1) as worker:
        total, pid, cpus = worker.call("add", 2).value
        assert (total, cpus) == (7, 1) and pid != os.getpid()
        assert worker.call("add", 1).value[:2] == (8, pid)
        before = worker.peak_bytes
        answer = worker.call("allocate", 200_000_000)
        assert answer.seconds > 0 and worker.peak_bytes == answer.peak_bytes > before + 1.5e8
        worker.call("add", 1)
        assert worker.peak_bytes == answer.peak_bytes
    assert capfd.readouterr().out == ""
    with pytest.raises(WorkerError, match="has ended"):
        worker.call("add", 1)


def test_a_workers_failures_are_told():
    with pytest.raises(WorkerError, match="^start must not be negative$"):
        Worker(Contestant, -1)
    with Worker(Contestant) as worker:
        with pytest.raises(WorkerError, match="KeyError: 'lost'"):
            worker.call("fail")
        assert worker.call("add", 1).value[0] == 1  # it goes on
        with pytest.raises(WorkerError, match="exit code 7"):
            worker.call("die")
        with pytest.raises(WorkerError, match="has ended"):
            worker.call("add", 1)


def test_a_worker_that_does_not_answer_is_ended():
    with Worker(Contestant, timeout_s=30) as worker:
        worker._timeout_s = 0.2
        with pytest.raises(WorkerError, match="no answer in 0 s"):
            worker.call("hang")
        assert worker._process.exitcode is not None


def test_calls_are_interleaved_and_a_failure_is_left_out(monkeypatch):
    monkeypatch.setattr("gte_deploy.tuning.measure.PAUSE_S", 0)
    order = []

    def call(name, fails_at=None):
        def once():
            order.append(name)
            if order.count(name) == fails_at:
                raise WorkerError(f"{name} failed")
            return float(len(order))

        return once

    seconds, errors = interleaved({"a": call("a"), "b": call("b", 2), "c": call("c")}, repeats=3)
    assert order == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert (seconds["a"], seconds["b"], errors) == ([1.0, 4.0, 7.0], [2.0], {"b": "b failed"})
    order.clear()
    assert len(interleaved({"a": call("a")}, repeats=9, budget_s=0)[0]["a"]) == 1
    assert len(interleaved({"a": call("a")}, repeats=9, at_least=3, budget_s=0)[0]["a"]) == 3


def test_spread():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, q1=2.0, q3=4.0, least=1.0)


def test_resident_memory_of_this_process():
    assert resident_bytes() > 1e7
