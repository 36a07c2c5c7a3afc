"""Saves in the background: training waits for the copy alone, and no error of the writer is lost."""

import threading

import pytest
import torch

from gte_deploy.core.errors import CheckpointError
from gte_deploy.training import state as state_module
from gte_deploy.training.distributed import World
from gte_deploy.training.saving import Saver
from gte_deploy.training.state import CheckpointStore, TensorPart, TrainingState, find_checkpoint

ALONE = World(0, 1, torch.device("cpu"))


def state_at(step: int) -> TrainingState:
    return TrainingState(
        stage=0,
        stage_name="s",
        step=step,
        stage_steps=10,
        total_step=step,
        tokens=0,
        seconds=0.0,
        seed=0,
        learning_rate=0.0,
        recipe={},
        model_config={},
        corpus="",
        versions={},
    )


def begin(saver: Saver, weight: torch.Tensor, step: int = 1):
    return saver.save(state_at(step), model={"w": TensorPart.whole(weight)}, optimizer={})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=5)


@pytest.fixture
def gate(monkeypatch):
    """Holds every write until the test opens it."""
    event, original = threading.Event(), state_module._save_tensors

    def save_tensors(*args):
        assert event.wait(60)
        original(*args)

    monkeypatch.setattr(state_module, "_save_tensors", save_tensors)
    yield event
    event.set()


def test_training_goes_on_while_the_checkpoint_is_written(store, gate):
    weight = torch.zeros(3)
    with Saver(store, ALONE) as saver:
        path = begin(saver, weight)
        assert not path.exists()
        weight += 1  # the next step, before a byte is written
        gate.set()
        saver.wait()
        assert torch.equal(find_checkpoint(path).model_tensors()["w"], torch.zeros(3))
        begin(saver, weight, step=2)
    assert torch.equal(store.latest().model_tensors()["w"], torch.ones(3))  # leaving the context waits


def test_one_save_at_a_time(store, gate):
    with Saver(store, ALONE) as saver:
        begin(saver, torch.zeros(3))
        opener = threading.Timer(0.2, gate.set)
        opener.start()
        begin(saver, torch.ones(3), step=2)  # copies into the memory of the first save, which has to be over
        assert gate.is_set()
    first, second = (find_checkpoint(store.folder / f"00-s-0000000{step}") for step in (1, 2))
    assert torch.equal(first.model_tensors()["w"], torch.zeros(3))
    assert torch.equal(second.model_tensors()["w"], torch.ones(3))


@pytest.mark.parametrize("then", ["check", "wait", "save", "leave"])
def test_an_error_of_the_writer_is_raised_later(store, monkeypatch, then):
    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(state_module, "_save_tensors", fails)
    saver = Saver(store, ALONE)
    begin(saver, torch.zeros(3))
    saver._thread.join()
    with pytest.raises(OSError, match="no space left"):
        if then == "save":
            begin(saver, torch.zeros(3), step=2)
        elif then == "leave":
            saver.__exit__(None, None, None)
        else:
            getattr(saver, then)()
    assert list(store.folder.iterdir()) == []  # no half-written folder stays
    saver.wait()  # raised once


def test_the_first_error_is_raised_and_the_writers_logged(store, monkeypatch, caplog):
    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(state_module, "_save_tensors", fails)
    with pytest.raises(ValueError, match="of the training"), Saver(store, ALONE) as saver:
        begin(saver, torch.zeros(3))
        raise ValueError("an error of the training")
    assert "the last checkpoint was not written either: no space left" in caplog.text


def test_a_failure_of_another_rank_fails_here(store, monkeypatch):
    monkeypatch.setattr(World, "any", lambda self, flag, group=None: True)
    saver = Saver(store, World(0, 2, torch.device("cpu")), sharded=True)
    begin(saver, torch.zeros(3))
    with pytest.raises(CheckpointError, match="another rank could not write"):
        saver.wait()
    assert store.latest() is None


def test_only_the_main_process_copies_what_is_not_sharded(store):
    saver = Saver(store, World(1, 2, torch.device("cpu")))
    begin(saver, torch.zeros(3))
    assert saver._copies == {} and not store.folder.exists()
