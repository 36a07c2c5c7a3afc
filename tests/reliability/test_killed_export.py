"""kill -9 while a bundle is written: what is at the target is the old bundle, the new one, or nothing."""

import random
import shutil
import signal
import time

import pytest

from factories import make_checkpoint
from fork_server import ForkServer
from gte_deploy.bundle.manifest import open_bundle

# The child dies by its own SIGKILL at the `at`-th event: a file system call beside the target (seen through an audit
# hook, so that no call can be forgotten) or a progress line of an export.
SERVER = """
import sys
from pathlib import Path
from fork_server import die, serve

class Countdown:
    def __init__(self, at):
        self.left = at
    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            die()

def write_small(target, mark, at, exchange):
    from gte_deploy.bundle.manifest import GraphEntry, Manifest
    from gte_deploy.exporters.bundle import writer
    from gte_deploy.core.spec import ModelSpec
    if not exchange:
        writer._exchange = lambda first, second: False
    countdown, beside = Countdown(at), str(target.parent)
    def hook(event, args):
        if event == "ctypes.dlsym" or any(str(a).startswith(beside) for a in args if isinstance(a, (str, Path))):
            countdown()
    spec = ModelSpec(task="embed", max_length=64, vocab_size=256, hidden_size=32, pad_token_id=0)
    sys.addaudithook(hook)
    with writer.staging(target, force=True) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx/model.onnx").write_bytes(b"\x12" + bytes([len(mark)]) + mark.encode())  # producer_name
        graphs = {"onnxruntime": GraphEntry("onnx/model.onnx", 20, (), (), {})}
        writer.seal(folder, Manifest(spec, "fp32", graphs, files={}, versions={}, source={"name": mark}))
        writer.publish(folder, target, force=True)

def run_export(target, checkpoint, at):
    graph.build_graphs = lambda model, **options: traced[checkpoint]
    log, countdown = open(target.with_suffix(".log"), "w"), Countdown(at)
    def progress(line):
        print(line, file=log, flush=True)
        countdown()
    export(checkpoint, target, max_length=32, force=True, progress=progress)

if sys.argv[1] == "small":  # here once, and not in each child
    import gte_deploy.bundle.manifest, gte_deploy.core.spec, gte_deploy.exporters.bundle.writer
else:
    import onnxruntime, torch, tqdm
    tqdm.tqdm.monitor_interval = 0  # its thread could hold a lock at the moment of a fork
    import gte_deploy.backends.onnxruntime, gte_deploy.backends.openvino
    import gte_deploy.exporters.bundle.contents, gte_deploy.exporters.verification.parity
    from gte_deploy.exporters.graph import build as graph
    from gte_deploy.exporters.export import export
    from gte_deploy.models.checkpoint import load_model
    torch.set_num_threads(1)
    traced = {}  # a trace takes seconds; it writes nothing, and the kills around it are those of its neighbours
    for folder in sys.argv[2:]:
        traced[folder] = graph.build_graphs(load_model(folder), task="fill-mask", max_length=32)
work = {"small": write_small, "export": run_export}[sys.argv[1]]
serve(lambda target, **request: work(Path(target), **request))
"""

NEVER = 10**9


@pytest.fixture
def small():
    server = ForkServer(SERVER, "small")
    yield server
    server.close()


def name_at(target):
    """Which whole bundle is at the target; None where there is nothing. Anything else is an error."""
    return open_bundle(target).source["name"] if target.exists() else None


def remove_leftovers(folder):
    for leftover in folder.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "rename"])
@pytest.mark.parametrize("old", ["old", None], ids=["over an old bundle", "nothing there"])
def test_every_moment_of_writing(small, tmp_path, old, exchange):
    target = tmp_path / "bundle"
    seen, at = [], 0
    while True:
        at += 1
        remove_leftovers(tmp_path)  # so that every export makes the same calls
        if name_at(target) != old:
            assert small.run(target=target, mark="old", at=NEVER, exchange=exchange) == 0
        if old is None and target.exists():
            target.rename(tmp_path / f"finished-{at}")
        code = small.run(target=target, mark="new", at=at, exchange=exchange)
        seen.append(name_at(target))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert len(seen) > 20, "the hook sees every call"
    assert seen[0] == old and seen[-1] == "new" and seen[-2] == "new", "a kill before, and one after, the change"
    assert set(seen) <= {old, "new", None}
    if exchange:
        assert set(seen) == {old, "new"}, "with an exchange nothing is ever absent"
    # What the killed left behind goes with the next export.
    assert small.run(target=target, mark="last", at=NEVER, exchange=exchange) == 0
    assert name_at(target) == "last"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_random_moments_of_writing(small, tmp_path):
    target, rng = tmp_path / "bundle", random.Random(0)
    assert small.run(target=target, mark="0", at=NEVER, exchange=True) == 0
    started = time.perf_counter()
    assert small.run(target=target, mark="0", at=NEVER, exchange=True) == 0
    whole = time.perf_counter() - started
    killed = 0
    for number in range(1, 51):
        before = name_at(target)
        pid = small.start(target=target, mark=str(number), at=NEVER, exchange=True)
        killed += small.killed_after(pid, rng.uniform(0, whole))
        assert name_at(target) in (before, str(number))
    assert killed > 5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return [make_checkpoint(folder / name, seed=seed, layers=1) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module")
def exporting(checkpoints):
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    server = ForkServer(SERVER, "export", *checkpoints)
    yield server
    server.close()


def test_an_export_killed_at_its_steps(exporting, checkpoints, tmp_path):
    first, second = map(str, checkpoints)
    target = tmp_path / "bundle"
    assert exporting.run(target=target, checkpoint=first, at=NEVER) == 0
    lines = (tmp_path / "bundle.log").read_text().splitlines()
    steps = [i for i, line in enumerate(lines, 1) if not line.startswith("parity") or line.startswith("parity 3/")]
    assert len(steps) >= 7
    for at in steps:
        assert exporting.run(target=target, checkpoint=second, at=at) == -signal.SIGKILL
        assert name_at(target) == "first", f"killed at {lines[at - 1]!r}"
        left = sorted(path.suffix for path in tmp_path.glob(".*"))
        assert left == [".lock", ".staging"], "an export removes what the one killed before it left"
    assert exporting.run(target=target, checkpoint=second, at=NEVER) == 0
    assert name_at(target) == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.log"]


@pytest.mark.slow
def test_an_export_killed_at_random_moments(exporting, checkpoints, tmp_path):
    target, rng = tmp_path / "bundle", random.Random(1)
    started = time.perf_counter()
    assert exporting.run(target=target, checkpoint=str(checkpoints[0]), at=NEVER) == 0
    whole = time.perf_counter() - started
    killed = 0
    for number in range(50):
        before = name_at(target)
        goal = checkpoints[number % 2]
        pid = exporting.start(target=target, checkpoint=str(goal), at=NEVER)
        killed += exporting.killed_after(pid, rng.uniform(0, whole))
        assert name_at(target) in (before, goal.name)
    assert killed >= 25
