"""A run stopped or killed at any moment, and resumed, equals the one that nothing disturbed, bit for bit."""

import hashlib
import json
import logging
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import time
from pathlib import Path

import pytest

from gte_deploy.core.errors import CheckpointError
from gte_deploy.training import train as train_module
from gte_deploy.training.log import RunLog, read_log
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.state import CheckpointStore, read_checkpoint
from gte_deploy.training.train import train

STEPS = (5, 4)  # two stages; checkpoints at 2, 4, 5 and 2, 4
# Runs in a process of its own, which the test or the script itself kills. KILL_AT counts synced files.
SCRIPT = """
import json, os, signal
from pathlib import Path
from gte_deploy.core import files
from gte_deploy.training import train as train_module
from gte_deploy.training.recipe import recipe_from_dict

calls, original = 0, files._sync

def sync(path, mode):
    global calls
    calls += 1
    if calls == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, mode)

files._sync = sync
train_module.plot_run = lambda folder: None
train_module.train(recipe_from_dict(json.loads(RECIPE)), data=Path(DATA), output=Path(OUTPUT), tensorboard=False)
"""


def weights_sha256(output: Path) -> str:
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()


def losses(output: Path) -> list[tuple[str, int, float]]:
    return [(r["stage"], r["step"], r["loss"]) for r in read_log(output / "log.jsonl")]


def run(recipe, corpus_folder, output):
    return train(recipe_from_dict(recipe), data=corpus_folder, output=output, tensorboard=False)


pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(steps=STEPS, dropout=0.1)


@pytest.fixture(scope="module")
def undisturbed(recipe, corpus_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert run(recipe, corpus_folder, output).finished
    return output


def test_a_checkpoint_that_a_killed_run_did_not_delete_goes(recipe, corpus_folder, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run") / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    for complete in (True, False):
        one_too_many = shutil.copytree(folder / kept[0], folder / kept[0].replace("5", "4"))
        if not complete:
            (one_too_many / "COMPLETE.json").unlink()
        assert run(recipe, corpus_folder, tmp_path / "run").finished
        assert sorted(path.name for path in folder.iterdir()) == kept


def assert_equal_runs(output: Path, undisturbed: Path) -> None:
    assert losses(output) == losses(undisturbed)
    assert weights_sha256(output) == weights_sha256(undisturbed)
    last = [max((folder / "checkpoints").iterdir()) / "optimizer.safetensors" for folder in (output, undisturbed)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_dropout_is_on(undisturbed, make_recipe, corpus_folder, tmp_path):
    run(make_recipe(steps=STEPS, dropout=0.0), corpus_folder, tmp_path)
    assert losses(tmp_path)[0] != losses(undisturbed)[0]


@pytest.mark.parametrize(
    ("at", "number"),
    [(1, signal.SIGTERM), (3, signal.SIGTERM), (3, signal.SIGINT), (5, signal.SIGHUP), (7, signal.SIGTERM)],
    ids=["first step", "between checkpoints", "SIGINT", "stage border", "second stage"],
)
def test_a_signal_saves_and_the_rest_is_bitwise_equal(
    undisturbed, recipe, corpus_folder, tmp_path, monkeypatch, caplog, at, number
):
    original = RunLog.write

    def write(self, records):
        records = list(records)
        original(self, records)
        if records[-1].total_step == at:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(RunLog, "write", write)
    stopped = run(recipe, corpus_folder, tmp_path)
    monkeypatch.undo()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not stopped.finished and stopped.model is None
    state = json.loads((stopped.checkpoint / "state.json").read_text())
    assert state["total_step"] == at  # nothing of what was done is lost
    assert f"stopped by {signal.Signals(number).name}" in caplog.text
    assert run(recipe, corpus_folder, tmp_path).finished
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("total_step", "batch", "saved"),
    [(0, 0, None), (0, 1, None), (3, 1, 3), (4, 1, 4), (5, 1, 5)],
    ids=["before all", "first step", "middle", "after a checkpoint", "first step of a stage"],
)
def test_a_signal_inside_a_step_drops_it_and_the_rest_is_bitwise_equal(
    undisturbed, recipe, corpus_folder, tmp_path, monkeypatch, caplog, total_step, batch, saved
):
    """The signal comes after some micro-batches of a step. The step has more of them, which are not computed."""
    steps, batches = signal_in_step(monkeypatch, after=total_step, batches=batch)
    stopped = run(recipe, corpus_folder, tmp_path)
    monkeypatch.undo()
    assert len(steps) == total_step + 1 and len(batches) == batch < steps[-1]
    assert "received SIGTERM: the run drops the step" in caplog.text
    assert not stopped.finished
    if saved is None:
        assert stopped.checkpoint is None and "before the first step; the same command starts again" in caplog.text
    else:
        assert read_checkpoint(stopped.checkpoint).state.total_step == saved
    assert run(recipe, corpus_folder, tmp_path).finished
    assert_equal_runs(tmp_path, undisturbed)


def signal_in_step(monkeypatch, *, after: int, batches: int) -> tuple[list[int], list[int]]:
    """Send SIGTERM when `after` steps are done, and then `batches` micro-batches.

    Returns the number of micro-batches of each step, and the micro-batches of the last one that were computed.
    """
    steps: list[int] = []
    computed: list[int] = []
    accumulate, tensors = train_module.accumulate_gradients, train_module.micro_batch_tensors

    def counting(module, micro_batches, **options):
        steps.append(len(micro_batches))
        computed.clear()
        if len(steps) == after + 1 and batches == 0:
            signal.raise_signal(signal.SIGTERM)
        return accumulate(module, micro_batches, **options)

    def signalling(batch, device):
        computed.append(1)
        if len(steps) == after + 1 and len(computed) == batches:
            signal.raise_signal(signal.SIGTERM)
        return tensors(batch, device)

    monkeypatch.setattr(train_module, "accumulate_gradients", counting)
    monkeypatch.setattr(train_module, "micro_batch_tensors", signalling)
    return steps, computed


def test_execution_settings_may_change_in_between(undisturbed, recipe, corpus_folder, tmp_path, monkeypatch):
    """Not bitwise then, but up to rounding."""
    monkeypatch.setattr(RunLog, "write", stop_at(3))
    assert not run({**recipe, "gradient_checkpointing": True}, corpus_folder, tmp_path).finished
    monkeypatch.undo()
    assert run({**recipe, "keep_checkpoints": 5}, corpus_folder, tmp_path).finished
    assert_equal_runs(tmp_path, undisturbed)  # checkpointing of gradients happens to be bitwise equal


def stop_at(total_step):
    original = RunLog.write

    def write(self, records):
        records = list(records)
        original(self, records)
        if records[-1].total_step == total_step:
            signal.raise_signal(signal.SIGTERM)

    return write


def test_a_corrupt_newest_checkpoint_costs_only_time(undisturbed, recipe, corpus_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(RunLog, "write", stop_at(3))
    newest = run(recipe, corpus_folder, tmp_path).checkpoint
    monkeypatch.undo()
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert run(recipe, corpus_folder, tmp_path).finished
    assert f"{newest} is corrupt: model.safetensors differs from its sha256" in caplog.text
    assert "continuing from" in caplog.text and "00-mlm-32-00000002" in caplog.text
    assert_equal_runs(tmp_path, undisturbed)


def test_only_corrupt_checkpoints_are_no_new_start(recipe, corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(RunLog, "write", stop_at(1))
    newest = run(recipe, corpus_folder, tmp_path).checkpoint
    (newest / "COMPLETE.json").unlink()
    with pytest.raises(CheckpointError, match="is whole"):
        run(recipe, corpus_folder, tmp_path)


# --- killed processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start_run(recipe, corpus_folder, tmp_path_factory):
    """`start_run(output, kill_at) -> Process`: train in a child of a server that has torch imported already."""
    script = tmp_path_factory.mktemp("script") / "run.py"
    script.write_text(SCRIPT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gte_deploy.training.train", "safetensors.torch", "matplotlib.figure"])

    def start(output: Path, kill_at: int):
        names = {"KILL_AT": kill_at, "RECIPE": json.dumps(recipe), "DATA": str(corpus_folder), "OUTPUT": str(output)}
        process = context.Process(target=runpy.run_path, args=(str(script), names))
        process.start()
        return process

    return start


# Files synced before the first checkpoint: the recipe, four of the tokenizer, the log. A checkpoint syncs five more.
FIRST_WRITES = (7, 16)


def kill_until_finished(start_run, output, *, rng, kills, longest) -> tuple[int, int]:
    """Kill a run `kills` times, every other time inside a write, then let it finish.

    Returns how many kills struck before the run was done, and how many of them were inside a write.
    """
    struck = [0, 0]
    for attempt in range(kills):
        inside = attempt % 2
        process = start_run(output, rng.randint(*FIRST_WRITES) if inside else 0)
        if not inside:
            time.sleep(rng.uniform(0, longest))
            process.kill()
        process.join()
        struck[inside] += process.exitcode == -signal.SIGKILL
    last = start_run(output, 0)
    last.join()
    assert last.exitcode == 0
    return sum(struck), struck[1]


def whole_run(start_run, output) -> float:
    """Seconds of a run that nothing disturbs."""
    started = time.monotonic()
    process = start_run(output, 0)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def test_killed_runs_end_in_the_same_weights(start_run, undisturbed, tmp_path):
    first = start_run(tmp_path / "first", 4)
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert CheckpointStore(tmp_path / "first" / "checkpoints").latest() is None
    longest = whole_run(start_run, tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", undisturbed)
    output = tmp_path / "killed"
    kills, inside = kill_until_finished(start_run, output, rng=random.Random(0), kills=5, longest=longest / 2)
    assert kills >= 2 and inside >= 1
    assert_equal_runs(output, undisturbed)
    assert not list((output / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_hundred_random_kills(start_run, undisturbed, tmp_path):
    whole_run(start_run, tmp_path / "cold")  # starts the server, which the next measurement must not count
    longest = whole_run(start_run, tmp_path / "whole")
    rng, kills, inside, runs = random.Random(1), 0, 0, 0
    while kills < 100 or inside < 50:
        runs += 1  # one may be over before its first kill
        assert runs <= 200, f"{kills} kills struck, {inside} of them inside a write: the moments chosen are too late"
        output = tmp_path / f"killed-{runs}"
        struck = kill_until_finished(start_run, output, rng=rng, kills=4, longest=longest)
        kills, inside = kills + struck[0], inside + struck[1]
        assert_equal_runs(output, undisturbed)
