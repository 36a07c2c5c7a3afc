"""Which graph of a bundle runs for the outputs of a call: the whole one or a part, on each engine for CPUs."""

import concurrent.futures
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import gte_deploy
from gte_deploy.backends.base import Batch
from gte_deploy.backends.graphs import OpenGraphs
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.core.errors import BackendError, BundleError

HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"
ALL_LOGITS = "fill-mask with all logits"
# Task -> the outputs that its answer needs, those of the graph that computes them, and the outputs of the other graph.
GRAPHS = {
    "embed": ((POOLED,), (POOLED,), (HIDDEN, POOLED)),
    "classify": (("logits",), ("logits",), ("logits", HIDDEN)),
    "fill-mask": (("logits",), ("logits",), ("logits", HIDDEN)),
    ALL_LOGITS: (("logits",), ("logits", HIDDEN), (HIDDEN,)),
}
# Rows of different lengths, so that there is padding.
ROWS = [[2, 20, 21, 4, 22, 3], [2, 4, 3], [2, 30, 31, 32, 4, 33, 34, 4, 3]]
MASKS = np.array([[2, 7], [0, 3], [2, 4], [1, 1]])


def batch_of(rows):
    ids, mask = np.zeros((2, len(rows), max(map(len, rows))), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return Batch(ids, mask, MASKS)


@pytest.fixture(scope="module")
def path_of(bundle_of, word_checkpoints):
    def path(task):
        if task == ALL_LOGITS:
            return bundle_of(word_checkpoints["fill-mask"], logits="all")
        return bundle_of(word_checkpoints[task])

    return path


@pytest.fixture(params=["onnx", "openvino"])
def engine(request):
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return request.param


def opened(model):
    """The outputs of each graph that is open."""
    return set(model._backend._graphs._opened)


def of_transformers(task, checkpoint):
    """The hidden states and the answer of transformers' own classes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kinds = {"embed": "AutoModel", "classify": "AutoModelForSequenceClassification"}
    model = getattr(transformers, kinds.get(task, "AutoModelForMaskedLM")).from_pretrained(checkpoint).eval()
    batch = batch_of(ROWS)
    inputs = {name: torch.from_numpy(getattr(batch, name)) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        hidden = model.base_model(**inputs).last_hidden_state.numpy()
        answer = hidden[:, 0] if task == "embed" else model(**inputs).logits.numpy()
    return hidden, answer[MASKS[:, 0], MASKS[:, 1]] if task == "fill-mask" else answer


@pytest.mark.parametrize("task", GRAPHS)
def test_each_call_runs_the_graph_that_computes_least_and_the_numbers_are_transformers(
    task, engine, path_of, word_checkpoints
):
    wanted, first, other = GRAPHS[task]
    batch, real = batch_of(ROWS), batch_of(ROWS).attention_mask == 1
    hidden, answer = of_transformers(task, word_checkpoints["fill-mask" if task == ALL_LOGITS else task])
    with gte_deploy.load(path_of(task), backend=engine, num_threads=1) as model:
        assert opened(model) == {first}
        assert model._backend.outputs == max(first, other, key=len)
        found = model._backend.run(batch, wanted)
        assert list(found) == list(wanted) and opened(model) == {first}
        compared = real if task == ALL_LOGITS else ...
        # The rounding of FP32 depends on the CPU's kernels; OpenVINO on AVX-512 differs by 1.1e-5.
        np.testing.assert_allclose(found[wanted[0]][compared], answer[compared], atol=2e-5)
        states = model._backend.run(batch, [HIDDEN])[HIDDEN]
        np.testing.assert_allclose(states[real], hidden[real], atol=2e-5)
        assert opened(model) == {first, other}
        both = model._backend.run(batch, [HIDDEN, *wanted])
        np.testing.assert_allclose(both[HIDDEN][real], states[real], atol=1e-6)
        np.testing.assert_allclose(both[wanted[0]][compared], found[wanted[0]][compared], atol=1e-5)
        assert opened(model) == {first, other}


def test_public_calls_open_what_they_need(engine, path_of):
    with gte_deploy.load(path_of("embed"), backend=engine, num_threads=1) as model:
        model.encode(["the king", "a"])
        assert opened(model) == {(POOLED,)}
        model.encode(["the king", "a"], output_value="token_embeddings")
        assert opened(model) == {(POOLED,), (HIDDEN, POOLED)}
    with gte_deploy.load(path_of(ALL_LOGITS), backend=engine, num_threads=1) as model:
        model.encode(["the king", "a"])
        assert opened(model) == {(HIDDEN,), ("logits", HIDDEN)}


def shapes_that_ran(session):
    """The shapes of the outputs of every node that the profile of ONNX Runtime lists."""
    events = json.loads(Path(session.end_profiling()).read_text())
    outputs = [event["args"].get("output_type_shape", []) for event in events if event["cat"] == "Node"]
    return {tuple(shape) for types in outputs for of_type in types for shape in of_type.values()}


def test_the_head_does_not_run_for_hidden_states(path_of, monkeypatch, tmp_path):
    """ONNX Runtime's own profile decides: the vocabulary of every token is computed only for a call for logits."""
    onnxruntime = importlib.import_module("onnxruntime")
    real, sessions, bundle = onnxruntime.InferenceSession, {}, path_of(ALL_LOGITS)

    def profiled(content, options, **more):
        name = next(path.name for path in (bundle / "onnx").glob("*.onnx") if path.read_bytes() == content)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / name)
        sessions[name] = real(content, options, **more)
        return sessions[name]

    monkeypatch.setattr(onnxruntime, "InferenceSession", profiled)
    with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
        hidden = model._backend.run(batch_of(ROWS), [HIDDEN])[HIDDEN]
        model._backend.run(dataclasses.replace(batch_of(ROWS[:1]), mask_positions=None), ["logits"])
        by_hidden, by_logits = (shapes_that_ran(sessions[name]) for name in ("model_hidden.onnx", "model.onnx"))
    assert hidden.shape == (3, 9, 32) and (3, 9, 32) in by_hidden
    assert (1, 6, 128) in by_logits and (3, 9, 128) not in by_logits
    assert not any(128 in shape for shape in by_hidden), "as many words as the vocabulary has"


def test_threads_share_what_is_open(engine, path_of):
    batch = batch_of(ROWS)
    with gte_deploy.load(path_of("embed"), backend=engine, num_threads=1) as model:
        run = model._backend.run
        expected = {name: run(batch, [name])[name] for name in (POOLED, HIDDEN)}
    with gte_deploy.load(path_of("embed"), backend=engine, num_threads=1) as model:
        run = model._backend.run
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            names = [(POOLED, HIDDEN)[number % 2] for number in range(64)]
            for name, found in zip(names, pool.map(lambda name: run(batch, [name])[name], names), strict=True):
                np.testing.assert_array_equal(found, expected[name])
        assert opened(model) == {(POOLED,), (HIDDEN, POOLED)}


def test_a_graph_opens_once_and_calls_for_an_open_one_do_not_wait():
    going_on, opening, times = threading.Event(), threading.Event(), []

    def open_graph(outputs, file):
        times.append(file.name)
        if file.name == "whole":
            opening.set()
            assert going_on.wait(60)
        return file.name

    graphs = OpenGraphs({(HIDDEN, "logits"): Path("whole"), ("logits",): Path("answer")}, open_graph)
    assert times == ["answer"] and graphs.outputs == (HIDDEN, "logits")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(graphs.for_outputs, [HIDDEN]) for _ in range(4)]
        assert opening.wait(60)
        assert graphs.for_outputs(["logits"]) == "answer", "while another thread opens the whole graph"
        going_on.set()
        assert [future.result() for future in waiting] == ["whole"] * 4
    assert times == ["answer", "whole"]
    graphs.close()
    graphs.close()
    for names in (["logits"], [HIDDEN]):
        with pytest.raises(BackendError, match="closed"):
            graphs.for_outputs(names)


def test_what_does_not_open_is_tried_again():
    refusals = [BackendError("no memory")]

    def open_graph(outputs, file):
        if file.name == "whole" and refusals:
            raise refusals.pop()
        return file.name

    graphs = OpenGraphs({(HIDDEN, "logits"): Path("whole"), ("logits",): Path("answer")}, open_graph)
    with pytest.raises(BackendError, match="no memory"):
        graphs.for_outputs([HIDDEN])
    assert graphs.for_outputs([HIDDEN]) == "whole"


def test_one_copy_of_the_weights_as_long_as_one_kind_of_call_is_made(tmp_path):
    """Megabytes of a process: the answer needs as much with a part as without one, a call for more a second copy."""
    onnx = pytest.importorskip("onnx")
    tensor, of = onnx.TensorProto, onnx.helper
    width, layers, rng = 1024, 16, np.random.default_rng(0)  # 67 MB
    inputs = [of.make_tensor_value_info(name, tensor.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((width, width), np.float32), f"weight{number}")
        for number in range(layers)  # all different: ONNX Runtime packs equal ones once
    ]
    nodes = [
        of.make_node("Unsqueeze", ["input_ids", "axis"], ["ids"]),
        of.make_node("Cast", ["ids"], ["numbers"], to=tensor.FLOAT),
        of.make_node("Expand", ["numbers", "wide"], ["x0"]),
        *(of.make_node("MatMul", [f"x{i}", f"weight{i}"], [f"x{i + 1}"]) for i in range(layers)),
        of.make_node("Identity", [f"x{layers}"], [HIDDEN]),
        of.make_node("Gather", [f"x{layers}", "first"], [POOLED], axis=1),
    ]
    small = [("axis", [-1]), ("wide", [1, 1, width]), ("first", 0)]
    weights += [onnx.numpy_helper.from_array(np.array(value), name) for name, value in small]
    shapes = {HIDDEN: ["b", "s", width], POOLED: ["b", width]}
    for name, outputs in (("model.onnx", (HIDDEN, POOLED)), ("model_answer.onnx", (POOLED,))):
        graph = of.make_graph(
            [node for node in nodes if not set(node.output) & (set(shapes) - set(outputs))],
            "g",
            inputs,
            [of.make_tensor_value_info(output, tensor.FLOAT, shapes[output]) for output in outputs],
            weights,
        )
        model = of.make_model(graph, opset_imports=[of.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, tmp_path / name, save_as_external_data=True, location=f"{name}.data", size_threshold=1024)
    script = f"""
        import re, sys
        from pathlib import Path
        import numpy as np
        from gte_deploy.backends.base import Batch
        from gte_deploy.backends.onnxruntime import OnnxBackend
        from gte_deploy.core.spec import ModelSpec

        def own():
            return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

        spec = ModelSpec(task="embed", max_length=8, vocab_size=9, hidden_size={width}, pad_token_id=0)
        folder = Path(sys.argv[1])
        whole = {{("last_hidden_state", "sentence_embedding"): folder / "model.onnx"}}
        batch = Batch(np.ones((1, 8), np.int64), np.ones((1, 8), np.int64))
        loaded = OnnxBackend(whole, spec, num_threads=1)  # stays, because its memory would be used again
        loaded.run(batch, ["sentence_embedding"])
        sizes = [own()]
        for files in (whole, {{**whole, ("sentence_embedding",): folder / "model_answer.onnx"}}):
            backend = OnnxBackend(files, spec, num_threads=1)
            for outputs in (["sentence_embedding"], ["last_hidden_state"]):
                backend.run(batch, outputs)
                sizes.append(own())
            sizes.append(backend)
        print(*(size for size in sizes if isinstance(size, float)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    # With its default threshold, glibc keeps freed memory, and the next copy of the weights lies there.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    before, whole_answers, whole_states, part_answers, part_states = map(float, done.stdout.split())
    copy = whole_answers - before
    assert copy > 30 and whole_states - whole_answers < 5
    assert part_answers - whole_states < 1.4 * copy
    assert part_states - part_answers > 30, "the whole graph, opened by a call that needs it"


def rewritten(bundle, target, change):
    """A copy of a bundle whose manifest is changed, with the right checksum."""
    shutil.copytree(bundle, target)
    file = target / "manifest.json"
    data = json.loads(file.read_text())
    del data["checksum"]
    change(data)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps({**data, "checksum": hashlib.sha256(canonical.encode()).hexdigest()}))
    return target


@pytest.mark.parametrize("task", ["embed", ALL_LOGITS])
def test_a_bundle_of_version_2_without_parts_answers_the_same(task, engine, path_of, tmp_path):
    def without_parts(data):
        data["format_version"] = 2
        for graph in data["graphs"].values():
            for part in graph.pop("parts"):
                del data["files"][part["path"]]
                (tmp_path / "old" / part["path"]).unlink()

    old = rewritten(path_of(task), tmp_path / "old", without_parts)
    assert all(graph.parts == () for graph in read_manifest(old).graphs.values())
    models = [gte_deploy.load(path, backend=engine, num_threads=1) for path in (path_of(task), old)]
    with models[0] as new, models[1] as former:
        assert new._backend.outputs == former._backend.outputs
        for name in new._backend.outputs:
            found, expected = (model._backend.run(batch_of(ROWS), [name])[name] for model in (former, new))
            np.testing.assert_allclose(found[:, :3], expected[:, :3], atol=1e-5)


def test_a_bundle_in_the_layout_of_version_3_answers_the_same(engine, path_of, tmp_path):
    """The weights had another name, the hidden states came first, and fill-mask had one whole graph."""
    onnx = pytest.importorskip("onnx")

    def old_graph(path):
        model = onnx.load(path, load_external_data=False)
        outputs = sorted(model.graph.output, key=lambda output: output.name != HIDDEN)
        del model.graph.output[:]
        model.graph.output.extend(outputs)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = entry.value.replace("onnx_data", "onnx.data")
        return model.SerializeToString()

    def as_version_3(data):
        data["format_version"] = 3
        folder = tmp_path / "old"
        for graph in data["graphs"].values():
            (folder / graph.pop("all_logits")["path"]).unlink()
            graph["outputs"].reverse()
            for file in (graph, *graph["parts"]):
                content = old_graph(folder / file["path"])
                (folder / file["path"]).unlink()
                del data["files"][file["path"]]
                file["path"] = file["path"].replace("_masked", "")
                (folder / file["path"]).write_bytes(content)
                entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                data["files"][file["path"]] = entry
        (folder / "onnx/model.onnx_data").rename(folder / "onnx/model.onnx.data")
        data["files"]["onnx/model.onnx.data"] = data["files"].pop("onnx/model.onnx_data")

    old = rewritten(path_of("fill-mask"), tmp_path / "old", as_version_3)
    models = [gte_deploy.load(path, backend=engine, num_threads=1) for path in (path_of("fill-mask"), old)]
    with models[0] as new, models[1] as former:
        assert former._backend.outputs == (HIDDEN, "logits") == new._backend.outputs[::-1]
        assert former.fill_mask("w20 [MASK] w30") == new.fill_mask("w20 [MASK] w30")
        for name in (HIDDEN, "logits"):
            found, expected = (model._backend.run(batch_of(ROWS), [name])[name] for model in (former, new))
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_part_that_is_missing_or_altered_is_refused(path_of, tmp_path):
    target = tmp_path / "bundle"
    shutil.copytree(path_of("embed"), target)
    part = target / "onnx" / "model_answer.onnx"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match="model_answer.onnx has sha256"):
        gte_deploy.load(target, backend="onnx")
    part.unlink()
    with pytest.raises(BundleError, match="model_answer.onnx is missing"):
        gte_deploy.load(target, backend="onnx")


def test_a_part_with_other_outputs_than_the_manifest_says_is_refused(engine, path_of, tmp_path):
    def confuse(data):
        for graph in data["graphs"].values():
            graph["parts"][0]["outputs"][0]["name"] = HIDDEN

    target = rewritten(path_of("embed"), tmp_path / "bundle", confuse)
    with gte_deploy.load(target, backend=engine) as model, pytest.raises(BackendError, match="outputs .*last_hidden"):
        model.encode("the king", output_value="token_embeddings")
