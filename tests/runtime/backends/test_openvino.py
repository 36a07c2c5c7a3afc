"""What the OpenVINO backend refuses, and what it holds on to; its answers are tests/contract's."""

import concurrent.futures
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("openvino")

import gte_deploy  # noqa: E402
from gte_deploy.backends.base import Batch  # noqa: E402
from gte_deploy.backends.openvino import OpenVinoBackend, has_native_bf16  # noqa: E402
from gte_deploy.bundle.manifest import read_manifest  # noqa: E402
from gte_deploy.core.errors import BackendError, BundleError, InputError, MissingDependencyError  # noqa: E402
from gte_deploy.core.quiet import import_openvino  # noqa: E402


@pytest.fixture(scope="module")
def graph(bundle_of, word_checkpoints):
    """Path and spec of a bundle's graph for OpenVINO."""
    bundle = bundle_of(word_checkpoints["fill-mask"])
    manifest = read_manifest(bundle)
    return bundle / manifest.graphs["openvino"].path, manifest.spec


def batch_of(rows, length, masks=0):
    ids = np.full((rows, length), 7)
    return Batch(ids, np.ones_like(ids), np.zeros((masks, 2), np.int64))


def test_it_runs_on_the_cpu_only(graph):
    with pytest.raises(BackendError, match="device 'cpu', not on 'cuda'.*backend='onnx'"):
        OpenVinoBackend(*graph, device="cuda")
    with pytest.raises(InputError, match="device must be"):
        OpenVinoBackend(*graph, device="gpu")


def test_without_openvino_the_extra_is_named(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"\[openvino\]"):
        OpenVinoBackend(*graph)
    with pytest.raises(MissingDependencyError):
        has_native_bf16()


def test_a_file_that_is_no_graph(tmp_path, graph):
    _, spec = graph
    (tmp_path / "x.onnx").write_bytes(b"x" * 100)
    for name, message in (("x.onnx", "is not an ONNX model"), ("none.onnx", "cannot be read")):
        with pytest.raises(BundleError, match=message):
            OpenVinoBackend(tmp_path / name, spec)


def test_an_input_that_nobody_provides(tmp_path):
    onnx = pytest.importorskip("onnx")
    names = ("input_ids", "token_type_ids")
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["b", "s"]) for name in names]
    output = onnx.helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.INT64, ["b", "s"])
    node = onnx.helper.make_node("Add", names, ["last_hidden_state"])
    graph = onnx.helper.make_graph([node], "g", inputs, [output])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "x.onnx")
    spec = gte_deploy.core.spec.ModelSpec(task="embed", max_length=8, vocab_size=10, hidden_size=4, pad_token_id=0)
    with pytest.raises(BackendError, match="has the unknown inputs token_type_ids"):
        OpenVinoBackend(tmp_path / "x.onnx", spec)


def test_an_error_while_running_is_typed_and_the_next_batch_runs(graph):
    path, spec = graph
    backend = OpenVinoBackend(path, spec, num_threads=1)
    idle = backend._graphs.for_outputs(backend.outputs).idle
    request = idle.get()

    class Failing:
        def infer(self, *args, **options):
            raise RuntimeError("no memory")

    idle.put(Failing())
    with pytest.raises(BackendError, match=r"failed on a batch of \(1, 3\): no memory"):
        backend.run(batch_of(1, 3), ["logits"])
    assert isinstance(idle.get_nowait(), Failing), "a request comes back whatever happens"
    idle.put(request)
    assert backend.run(batch_of(1, 3, 2), ["logits"])["logits"].shape == (2, 128)


def test_threads_default_to_the_cpus_of_the_process(graph, monkeypatch):
    monkeypatch.setattr("gte_deploy.backends.openvino.available_cpus", lambda: 2)
    assert OpenVinoBackend(*graph).num_threads == 2
    assert OpenVinoBackend(*graph, num_threads=1).num_threads == 1


def test_what_it_computes_in_is_what_was_asked_for(graph):
    def properties(backend):
        compiled = backend._graphs.for_outputs(backend.outputs).idle.get().get_compiled_model()
        return {name: compiled.get_property(name) for name in ("INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS")}

    openvino = import_openvino()
    found = properties(OpenVinoBackend(*graph, num_threads=1))
    assert found == {"INFERENCE_PRECISION_HINT": openvino.Type.f32, "INFERENCE_NUM_THREADS": 1}
    if has_native_bf16():
        found = properties(OpenVinoBackend(*graph, num_threads=1, precision="bf16"))
        assert found["INFERENCE_PRECISION_HINT"] == openvino.Type.bf16


def test_the_setting_for_onednn_leaves_the_environment_as_it_was(graph, monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    OpenVinoBackend(*graph)
    assert name not in os.environ
    monkeypatch.setenv(name, "77")
    OpenVinoBackend(*graph)
    assert os.environ[name] == "77"


def test_hidden_states_are_cut_from_a_graph_without_that_part(bundle_of, word_checkpoints):
    """Bundles of earlier formats have no part; the head would compute the vocabulary for every token."""
    bundle = bundle_of(word_checkpoints["fill-mask"], logits="all")
    manifest = read_manifest(bundle)
    backend = OpenVinoBackend(bundle / manifest.graphs["openvino"].path, manifest.spec)
    assert backend.outputs == ("logits", "last_hidden_state")
    full = backend.run(batch_of(2, 5), ["logits", "last_hidden_state"])
    lean = backend.run(batch_of(2, 5), ["last_hidden_state"])
    np.testing.assert_allclose(lean["last_hidden_state"], full["last_hidden_state"], atol=1e-6)
    compiled = backend._graphs.for_outputs(["last_hidden_state"]).idle.get().get_compiled_model()
    assert [output.any_name for output in compiled.outputs] == ["last_hidden_state"]


def test_requests_do_not_multiply(graph):
    backend = OpenVinoBackend(*graph, num_threads=1)
    idle = backend._graphs.for_outputs(backend.outputs).idle
    before = idle.qsize()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda length: backend.run(batch_of(1, length), ["last_hidden_state"]), range(1, 100)))
    assert idle.qsize() == before >= 1


def test_closing_is_idempotent(graph):
    backend = OpenVinoBackend(*graph)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(batch_of(1, 3), ["logits"])


def test_kernels_of_many_shapes_are_kept_up_to_a_limit_and_let_go(graph):
    """OpenVINO's own settings keep those of every shape, and some of them after the model is gone."""
    path, spec = graph
    script = """
        import gc, os, sys
        from pathlib import Path
        import numpy as np
        from gte_deploy.backends.base import Batch
        from gte_deploy.backends.openvino import OpenVinoBackend
        from gte_deploy.core.spec import ModelSpec

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

        spec = ModelSpec(task="fill-mask", max_length=128, vocab_size=128, hidden_size=32, pad_token_id=0)
        backend = OpenVinoBackend(Path(sys.argv[1]), spec, num_threads=1)
        def run(rows, length):
            ids = np.full((rows, length), 7)
            backend.run(Batch(ids, np.ones_like(ids)), ["last_hidden_state"])
        run(8, 128)
        sizes = [resident()]
        for rows in range(8, 0, -1):
            for length in range(128, 0, -2):
                run(rows, length)
            sizes.append(resident())  # some 15 MB for these 64 shapes, as long as all are kept
        backend.close()
        gc.collect()
        print(*sizes, resident())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, *_, half, _, _, _, last, closed = map(float, done.stdout.split())
    assert half - first > 30 and last - half < 20, "megabytes for 256 shapes each"
    assert closed - first < 20


def test_signals_are_handled_after_a_model_is_given_up_by_another_thread(graph):
    """OpenVINO's plugin unmaps the signal stack that it gave to the thread which opened it."""
    path, spec = graph
    script = f"""
        import os, signal, threading
        from pathlib import Path
        from gte_deploy.backends.openvino import OpenVinoBackend
        from gte_deploy.core.spec import ModelSpec

        def give_up(backends):
            backends.pop().close()

        received = []
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        backends = [OpenVinoBackend(Path({str(path)!r}), {spec!r})]
        thread = threading.Thread(target=give_up, args=(backends,))
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
