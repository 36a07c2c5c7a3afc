"""Checkpoints: whole or refused, and what an interrupted write leaves."""

import hashlib
import json
import os
import resource
import signal
import stat

import pytest
import torch

from gte_deploy.core.errors import CheckpointError
from gte_deploy.training import state as state_module
from gte_deploy.training.state import CheckpointStore, TensorPart, TrainingState, read_checkpoint, stage_seed, step_seed

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
    return store.save(make_state(stage, step), model=parts(tensors), optimizer=parts(moments))


def parts(tensors):
    return {name: TensorPart.whole(tensor) for name, tensor in tensors.items()}


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
    monkeypatch.setattr(state_module, "_READ_VERSIONS", (1,))
    with pytest.raises(CheckpointError, match="format version 2; this gte-deploy reads 1"):
        read_checkpoint(path)


class Killed(BaseException):
    """Stands for a kill: the clean-up of `save` must not be needed."""


@pytest.mark.parametrize("call", range(1, 9))
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


def test_parts_of_ranks_are_put_together(store):
    """Five rows over two ranks, which torch.chunk cuts into three and two, and a scalar that rank 0 has."""
    state, whole = make_state(step=4), torch.arange(10.0).view(5, 2)
    cut = [TensorPart(whole[:3], 0, (5, 2)), TensorPart(whole[3:], 3, (5, 2))]
    step = {"w.step": TensorPart.whole(torch.tensor(4.0))}
    store.begin(state)
    for rank in (1, 0):
        rest = step if rank == 0 else {}
        store.write_part(
            state, model={"w": cut[rank]}, optimizer={"w.exp_avg": cut[rank], **rest}, shard=rank, shards=2
        )
    path = store.finish(state, shards=2)
    assert sorted(file.name for file in path.glob("model*")) == [
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    ]
    checkpoint = store.latest()
    assert torch.equal(checkpoint.model_tensors()["w"], whole)
    assert torch.equal(checkpoint.optimizer_tensors()["w.exp_avg"], whole)
    assert checkpoint.optimizer_tensors()["w.step"] == 4


def test_rows_that_no_rank_wrote_are_an_error(store):
    state, rows = make_state(), TensorPart(torch.zeros(3, 2), 0, (5, 2))
    store.begin(state)
    for rank in (0, 1):
        store.write_part(state, model={"w": rows} if rank == 0 else {}, optimizer={}, shard=rank, shards=2)
    store.finish(state, shards=2)
    with pytest.raises(CheckpointError, match="do not hold all rows of w"):
        store.latest().model_tensors()


def test_a_checkpoint_of_the_first_format_is_read(store):
    """Format 1 had neither shards nor changes."""
    path = save(store, 1)
    state, marker = (json.loads((path / name).read_text()) for name in ("state.json", "COMPLETE.json"))
    del state["interventions"], state["recent"], marker["shards"]
    text = json.dumps({**state, "format_version": 1}).encode()
    (path / "state.json").write_bytes(text)
    marker["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (path / "COMPLETE.json").write_text(json.dumps(marker))
    assert store.latest().state.format_version == 1 and store.latest().state.interventions == []
    assert torch.equal(store.latest().model_tensors()["a.weight"], torch.arange(6.0).view(2, 3) + 1)


def test_the_end_of_a_plateau_is_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, milestones=[(0, 2)])
    for step in (1, 2, 3, 4):
        save(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-s0-00000002", "00-s0-00000004"]


def test_deleting_starts_with_the_marker(store, monkeypatch):
    save(store, 1), save(store, 2)
    monkeypatch.setattr(state_module.CheckpointStore, "abandon", lambda *args: None)
    monkeypatch.setattr(state_module.shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(Killed()))
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


@pytest.mark.parametrize("most_bytes", [10, 100, 300])
def test_a_full_disk_is_told_and_costs_no_checkpoint(store, most_bytes):
    """The limit of file sizes refuses a write to every user, root included, as a full disk does."""
    save(store, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        with pytest.raises((CheckpointError, OSError), match=r"cannot be written|File too large"):
            save(store, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in store.folder.iterdir()] == [make_state(step=1).folder_name]
    assert store.latest().state.step == 1
    assert save(store, step=2) == store.latest().path
