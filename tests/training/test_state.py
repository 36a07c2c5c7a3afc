"""Checkpoints: whole or refused, and what an interrupted write leaves."""

import json
import os
import stat

import pytest
import torch

from gte_deploy.core.errors import CheckpointError
from gte_deploy.training import state as state_module
from gte_deploy.training.state import CheckpointStore, TrainingState, read_checkpoint, stage_seed, step_seed

FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def make_state(stage=0, step=1, stage_steps=10) -> TrainingState:
    return TrainingState(
        stage=stage,
        stage_name=f"s{stage}",
        step=step,
        stage_steps=stage_steps,
        total_step=step,
        tokens=7,
        seconds=1.5,
        seed=3,
        learning_rate=1e-3,
        recipe={"name": "r"},
        model_config={"vocab_size": 5},
        corpus="abc",
        versions={},
    )


def save(store, step=1, stage=0):
    tensors = {"a.weight": torch.arange(6.0).view(2, 3) + step}
    moments = {"a.weight.exp_avg": torch.full((2, 3), 0.1), "a.weight.step": torch.tensor(float(step))}
    return store.save(make_state(stage, step), model=tensors, optimizer=moments)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_round_trip_is_bitwise(store):
    path = save(store, step=4)
    checkpoint = store.latest()
    assert checkpoint.path == path and checkpoint.state == make_state(step=4)
    assert torch.equal(checkpoint.model_tensors()["a.weight"], torch.arange(6.0).view(2, 3) + 4)
    moments = checkpoint.optimizer_tensors()
    assert moments["a.weight.step"].shape == () and moments["a.weight.step"] == 4
    assert torch.equal(moments["a.weight.exp_avg"], torch.full((2, 3), 0.1))
    # A server or a colleague under another account can read it.
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in path.iterdir())
    assert sorted(file.name for file in path.iterdir()) == ["COMPLETE.json", *FILES]


def test_a_new_run_has_none(store):
    assert store.latest() is None


def test_the_newest_and_each_stages_last_are_kept(store):
    for stage, step in [(0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (1, 6), (1, 8)]:
        save(store, step, stage)
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "00-s0-00000006",
        "01-s1-00000006",
        "01-s1-00000008",
    ]


@pytest.mark.parametrize("name", [*FILES, "COMPLETE.json"])
@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(store, caplog, name, damage):
    before, damaged = save(store, 1), save(store, 2)
    file = damaged / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes({"flipped": content, "cut": content[:-9], "empty": b""}[damage])
    with pytest.raises(CheckpointError):
        read_checkpoint(damaged)
    assert store.latest().path == before
    assert "refused a checkpoint, trying the one before" in caplog.text and str(damaged) in caplog.text


def test_none_whole_is_an_error_not_a_new_start(store):
    (save(store, 1) / "COMPLETE.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints in .* is whole"):
        store.latest()


def test_another_format_version_is_refused(store, monkeypatch):
    path = save(store, 1)
    monkeypatch.setattr(state_module, "FORMAT_VERSION", 2)
    with pytest.raises(CheckpointError, match="format 1; this version reads 2"):
        read_checkpoint(path)


class Killed(BaseException):
    """Stands for a kill: the clean-up of `save` must not be needed."""


@pytest.mark.parametrize("call", range(1, 6))
def test_a_write_cut_short_leaves_the_old_checkpoint(store, monkeypatch, call):
    before = save(store, 1)
    calls = 0

    def fails(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*args, **kwargs)

    original = os.fsync
    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(state_module.shutil, "rmtree", lambda *args, **kwargs: None)  # a kill cleans nothing up
    with pytest.raises(Killed):
        save(store, 2)
    monkeypatch.undo()
    assert [path.name.startswith(".") for path in store.folder.iterdir()].count(True) == 1
    assert store.latest().path == before
    store.remove_leftovers()
    assert list(store.folder.iterdir()) == [before]


def test_deleting_starts_with_the_marker(store, monkeypatch):
    save(store, 1), save(store, 2)
    monkeypatch.setattr(state_module.shutil, "rmtree", lambda path: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        save(store, 3)
    assert not (store.folder / "00-s0-00000001" / "COMPLETE.json").exists()
    assert store.latest().state.step == 3


def test_nothing_in_a_checkpoint_is_a_pickle(store):
    path = save(store, 1)
    json.loads((path / "state.json").read_text())
    for file in path.glob("*.safetensors"):
        header = file.read_bytes()
        json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


def test_stage_seeds_differ_and_stay():
    assert len({stage_seed(seed, stage) for seed in range(3) for stage in range(50)}) == 150
    assert stage_seed(1, 2) == stage_seed(1, 2)


def test_step_seeds_differ_and_stay():
    seeds = {step_seed(0, stage, step, rank) for stage in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 600 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 2, 3, 0) == step_seed(1, 2, 3, 0) != step_seed(2, 2, 3, 0)
