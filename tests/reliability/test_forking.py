"""A model in other processes: forked with it, sent to it by pickle, or spawned."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gte_deploy
from battery import Attempts
from gte_deploy.core import forking
from gte_deploy.core.errors import BackendError, BundleError

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

TEXTS = ["the king walked to the city and the queen is old " * 9] * 8
# Children are compared with what the same model answered before the fork.
FORKS = """
    import os, signal, sys, threading, time
    import numpy as np
    import gte_deploy

    path, backend, count, *joined = sys.argv[1:]
    texts = {texts!r}
    with gte_deploy.load(path, backend=backend, num_threads=2, join_calls=bool(joined)) as model:
        expected = model.encode(texts)
        stopped = threading.Event()

        def work():
            while not stopped.is_set():
                model.encode(texts)

        threads = [threading.Thread(target=work) for _ in range(3)]
        codes = []
        for number in range(int(count)):
            if number == 2:  # the first two find the engine idle, all others find it busy
                for thread in threads:
                    thread.start()
            time.sleep(0.003 * (number % 5))  # at different moments of a batch
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)  # a child that hangs is killed
                for _ in range(2):
                    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
                if number % 2:
                    os._exit(0)
                del model
                sys.exit(0)  # as a worker ends: the interpreter frees all that there is
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        stopped.set()
        for thread in threads:
            thread.join()
        np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
    print(codes)
"""


def python(script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    # Several threads in each engine: OMP_NUM_THREADS=1 of conftest.py would leave PyTorch nothing that can hang.
    kept = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script).replace("{texts!r}", repr(TEXTS)), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
        env=kept | environment,
    )


@pytest.fixture(scope="module")
def path_for(bundle_of: Callable[..., Path], word_checkpoints: dict[str, Path]) -> Callable[[str], Path]:
    def path(backend: str) -> Path:
        if backend == "openvino":
            pytest.importorskip("openvino")
        return word_checkpoints["embed"] if backend == "torch" else bundle_of(word_checkpoints["embed"])

    return path


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("count", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_forked_children_answer(backend: str, count: int, path_for: Callable[[str], Path], attempts: Attempts) -> None:
    done = python(FORKS, path_for(backend), backend, count)
    assert (done.returncode, done.stdout) == (0, f"{[0] * count}\n"), done.stderr[-2000:]
    attempts(f"forks, all but two of them while threads compute: {backend}", count)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_forked_children_answer_where_calls_share_batches(backend: str, path_for: Callable[[str], Path]) -> None:
    done = python(FORKS, path_for(backend), backend, 6, "joined")
    assert (done.returncode, done.stdout) == (0, f"{[0] * 6}\n"), done.stderr[-2000:]


def test_forked_children_answer_with_parallel_tokenizers_asked_for(path_for: Callable[[str], Path]) -> None:
    done = python(FORKS, path_for("onnx"), "onnx", 6, TOKENIZERS_PARALLELISM="true")
    assert (done.returncode, done.stdout) == (0, f"{[0] * 6}\n"), done.stderr[-2000:]


CHILD = """
    import os, sys, threading, time
    import gte_deploy
    from gte_deploy.core import forking

    def in_child(call):
        '''What `call` raises in a forked child, or that it answers.'''
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                call()
                told = "answers"
            except gte_deploy.GteDeployError as error:
                told = f"{type(error).__name__}: {error}"
            os.write(write, told.encode())
            os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        return os.read(read, 10000).decode()

    model = gte_deploy.load(sys.argv[1], backend="onnx", num_threads=1)
"""


def told(script: str, *arguments: Any) -> list[str]:
    done = python(textwrap.dedent(CHILD) + textwrap.dedent(script), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_engine_that_does_not_come_to_rest_is_refused_in_the_child(path_for: Callable[[str], Path]) -> None:
    script = """
        forking.PATIENCE_S = 0.1
        inside, leave = threading.Event(), threading.Event()

        def long_run():
            with forking.in_use():
                inside.set()
                leave.wait()

        thread = threading.Thread(target=long_run)
        thread.start()
        inside.wait()
        print(in_child(lambda: model.encode("a")))
        leave.set()
        thread.join()
        print(in_child(lambda: model.encode("a")))
    """
    refused, answered = told(script, path_for("onnx"))
    assert refused.startswith("BackendError") and "Load the model after the fork" in refused
    assert answered == "answers"


def test_a_fork_within_a_run_is_refused_in_the_child(path_for: Callable[[str], Path]) -> None:
    script = """
        with forking.in_use():
            print(in_child(lambda: model.encode("a")))
        print(in_child(lambda: model.encode("a")))
    """
    refused, answered = told(script, path_for("onnx"))
    assert "Load the model after the fork" in refused and answered == "answers"


def test_grandchildren_answer_and_a_closed_model_stays_closed(path_for: Callable[[str], Path]) -> None:
    script = """
        def grandchild():
            model.encode("a")
            if in_child(lambda: model.encode("a")) != "answers":
                raise gte_deploy.BackendError("the grandchild did not answer")

        def closed_in_child():
            model.close()
            model.encode("a")

        print(in_child(grandchild))
        print(in_child(closed_in_child))
        model.encode("a")
        model.close()
        print(in_child(lambda: model.encode("a")))
    """
    grandchild, *closed = told(script, path_for("onnx"))
    assert grandchild == "answers"
    assert all("BackendError: this model is closed" in line for line in closed)


def test_a_bundle_that_was_replaced_is_not_opened_in_the_child(path_for: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(path_for("onnx"), tmp_path / "bundle")
    script = """
        import pathlib
        def replaced():
            folder = pathlib.Path(sys.argv[1])
            folder.rename(folder.with_name("old"))
            import shutil
            shutil.copytree(folder.with_name("old"), folder)
            model.encode("a")
        print(in_child(replaced))
    """
    assert "has changed since it was loaded" in told(script, bundle)[0]


def test_what_a_forked_model_says_of_itself(path_for: Callable[[str], Path]) -> None:
    pytest.importorskip("openvino")
    script = """
        engines = {name: gte_deploy.load(sys.argv[1], backend=name, num_threads=2) for name in ("onnx", "openvino")}
        if os.fork() == 0:
            for engine in engines.values():
                engine.encode("a")
            print({name: engine.info()["num_threads"] for name, engine in engines.items()}, flush=True)
            os._exit(0)
        os.wait()
    """
    assert told(script, path_for("openvino")) == ["{'onnx': 2, 'openvino': 1}"]


@pytest.fixture
def model(backend: str, load_on: Callable[..., Any], word_checkpoints: dict[str, Path]) -> Any:
    with load_on(backend, word_checkpoints["embed"], num_threads=1, max_batch_tokens=64) as model:
        yield model


@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, copy.copy])
def test_pickled_and_copied_it_is_loaded_again(
    model: Any, again: Callable[[Any], Any], repeat_tolerance: float
) -> None:
    expected = model.encode(TEXTS[0])
    with again(model) as other:
        np.testing.assert_allclose(other.encode(TEXTS[0]), expected, atol=max(1e-6, repeat_tolerance))
        same = ("backend", "precision", "device", "num_threads", "max_batch_tokens", "task", "max_length")
        assert {name: other.info()[name] for name in same} == {name: model.info()[name] for name in same}
    np.testing.assert_allclose(model.encode(TEXTS[0]), expected, atol=max(1e-6, repeat_tolerance))  # it is not closed


def test_a_pickle_holds_a_whole_path_and_nothing_of_the_model(
    path_for: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(path_for("onnx"), tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    with gte_deploy.load("bundle", backend="onnx", num_threads=1) as model:
        data = pickle.dumps(model)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    with pickle.loads(data) as other:
        assert other.path == tmp_path / "bundle"


def test_the_built_in_model_is_each_processes_own() -> None:
    with gte_deploy.load(num_threads=1) as model:
        function, arguments, *_ = model.__reduce__()
        assert arguments[0] is None
        assert function(*arguments).fill_mask("a [MASK]") == model.fill_mask("a [MASK]")


def test_another_bundle_at_the_path_is_refused(
    path_for: Callable[[str], Path], bundle_of: Callable[..., Path], word_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(path_for("onnx"), tmp_path / "bundle")
    with gte_deploy.load(bundle, backend="onnx", num_threads=1) as model:
        data = pickle.dumps(model)
    shutil.rmtree(bundle)
    shutil.copytree(bundle_of(word_checkpoints["classify"]), bundle)
    with pytest.raises(BundleError, match="is not what the pickled model was loaded from"):
        pickle.loads(data)


def test_what_cannot_travel_says_what_to_do(path_for: Callable[[str], Path]) -> None:
    model = gte_deploy.load(path_for("onnx"), backend="onnx", num_threads=1)
    by_hand = gte_deploy.Model(
        model._backend,
        model._tokenizer,
        model.spec,
        max_batch_tokens=64,
        path=model.path,
        backend_reason="",
    )
    with pytest.raises(BackendError, match=r"gte_deploy\.load in the process"):
        pickle.dumps(by_hand)
    model.close()
    with pytest.raises(BackendError, match="closed.*load it again"):
        copy.deepcopy(model)


@pytest.mark.parametrize(
    ("start", "backend_name"),
    [
        ("spawn", "onnx"),
        ("spawn", "openvino"),
        ("forkserver", "onnx"),
        ("fork", "onnx"),
        *(
            pytest.param(start, name, marks=pytest.mark.slow)
            for start, name in itertools.product(("spawn", "forkserver", "fork"), ("torch", "openvino"))
            if (start, name) != ("spawn", "openvino")
        ),
    ],
)
def test_workers_of_a_pool_take_a_model_as_an_argument(
    start: str, backend_name: str, path_for: Callable[[str], Path], attempts: Attempts
) -> None:
    """Also while other threads compute with it: a pool that forks waits for them."""
    # pytest's import mode gives this module no name that a spawned process could import: a method of the model has one.
    with gte_deploy.load(path_for(backend_name), backend=backend_name, num_threads=1) as model:
        stopped, expected = threading.Event(), model.encode(TEXTS)

        def work() -> None:
            while not stopped.is_set():
                model.encode(TEXTS)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(start)) as pool:
                for answer in [pool.submit(model.encode, TEXTS) for _ in range(4)]:
                    np.testing.assert_allclose(answer.result(timeout=300), expected, atol=1e-6)
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
    attempts(f"models sent to the workers of a pool, which {start} starts, while threads compute", 4)


def test_what_cuda_and_unknown_engines_say_in_a_child() -> None:
    from gte_deploy.backends.inherited import after_fork

    class Engine:
        name, device, precision, num_threads, outputs = "tensorrt", "cuda:0", "fp16", 1, ("logits",)

        def run(self, batch: Any, outputs: Any) -> Any:
            raise AssertionError("the parent's engine is not to be touched")

        close = run

    batch: Any = None
    on_gpu = after_fork(Engine(), None, idle=True)
    with pytest.raises(BackendError, match="CUDA does not survive a fork.*Load the model after the fork"):
        on_gpu.run(batch, ["logits"])
    on_gpu.close()
    with pytest.raises(BackendError, match="closed"):
        on_gpu.run(batch, ["logits"])
    Engine.device = "cpu"
    with pytest.raises(BackendError, match="nobody knows how it was opened"):
        after_fork(Engine(), None, idle=True).run(batch, ["logits"])


def test_an_engine_that_does_not_open_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from gte_deploy.backends import inherited

    class Engine:
        name, device, precision, num_threads, outputs = "onnx", "cpu", "fp32", 3, ("logits",)

    never = threading.Event()
    monkeypatch.setattr(inherited, "PATIENCE_S", 0.05)
    engine: Any = Engine()
    backend = inherited.after_fork(engine, lambda threads: never.wait() and engine, idle=True)
    batch: Any = None
    for _ in range(2):  # and the second time at once
        with pytest.raises(BackendError, match="did not open again within"):
            backend.run(batch, ["logits"])
    never.set()


def test_computations_wait_for_a_fork_and_forks_for_computations() -> None:
    script = """
        import json, os, sys, threading, time
        from gte_deploy.core import forking

        order = []
        inside = threading.Event()

        def compute():
            with forking.in_use():
                with forking.in_use():  # nested
                    inside.set()
                    time.sleep(0.3)
                    order.append("computed")

        threads = [threading.Thread(target=compute) for _ in range(3)]
        for thread in threads:
            thread.start()
        inside.wait()
        if os.fork() == 0:
            os._exit(0)
        order.append("forked")
        for thread in threads:
            thread.join()
        print(json.dumps(order))
    """
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["computed"] * 3 + ["forked"]
    assert forking._gate._inside == {}
