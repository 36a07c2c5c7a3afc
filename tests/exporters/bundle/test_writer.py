"""Bundles are whole or not there, readable by others, and never replace what no export wrote."""

import errno
import os
import stat
from pathlib import Path

import pytest

from gte_deploy.bundle.manifest import GraphEntry, Manifest, open_bundle
from gte_deploy.bundle.signature import SIGNATURE_NAME
from gte_deploy.core.errors import ExportError
from gte_deploy.core.locks import try_lock
from gte_deploy.core.spec import ModelSpec, TensorSpec
from gte_deploy.exporters.bundle import writer as bundle_writer
from gte_deploy.exporters.bundle.writer import check_destination, clean_stale, publish, seal, staging

SPEC = ModelSpec(task="embed", max_length=64, vocab_size=256, hidden_size=32, pad_token_id=0)
GRAPHS = {
    "onnxruntime": GraphEntry(
        path="onnx/model.onnx",
        opset=20,
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(),
        fusions={"rope": 2},
    )
}


def fill(folder: Path, mark: str) -> None:
    (folder / "onnx").mkdir()
    # The smallest ONNX file: a producer_name.
    (folder / "onnx/model.onnx").write_bytes(b"\x12" + bytes([len(mark)]) + mark.encode())
    (folder / "config.json").write_text("{}")
    seal(folder, Manifest(SPEC, "fp32", GRAPHS, files={}, versions={"onnx": "1"}, source={"name": mark}))


def write(target: Path, mark: str, *, force: bool = False) -> None:
    with staging(target, force=force) as folder:
        fill(folder, mark)
        publish(folder, target, force=force)


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path != target]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "here" / "bundle"


@pytest.fixture(params=["exchange", "rename"])
def way(request, monkeypatch):
    """Both ways to replace a folder: in one step, and as on a file system that cannot exchange."""
    if request.param == "rename":
        monkeypatch.setattr(bundle_writer, "_exchange", lambda first, second: False)
    return request.param


def test_what_is_written_opens_and_lists_every_file(target):
    write(target, "new")
    manifest = open_bundle(target)
    tree = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert tree == {*manifest.files, "manifest.json"} == {"config.json", "onnx/model.onnx", "manifest.json"}
    assert manifest.spec == SPEC and manifest.graphs == GRAPHS and manifest.source == {"name": "new"}
    assert leftovers(target) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_says_who_can_read_a_new_bundle(target, mask):
    old = os.umask(mask)
    try:
        write(target, "new")
    finally:
        os.umask(old)
    for path in (target, *target.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_replaced_bundle_keeps_the_mode_of_its_folder(target):
    target.mkdir(parents=True)
    target.chmod(0o700)
    for name in ("old", "new"):  # in place of an empty folder, and of a bundle
        write(target, name, force=True)
        assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_force_replaces_a_bundle(target, way):
    write(target, "old")
    (target / SIGNATURE_NAME).write_bytes(bytes(64))
    write(target, "new", force=True)
    assert open_bundle(target).source["name"] == "new"
    assert leftovers(target) == [] and not (target / SIGNATURE_NAME).exists()


def test_a_bundle_is_refused_without_force(target):
    write(target, "old")
    with pytest.raises(ExportError, match="--force"):
        write(target, "new")
    assert open_bundle(target).source["name"] == "old"
    assert leftovers(target) == []


def test_a_damaged_bundle_can_be_replaced(target):
    write(target, "old")
    (target / "onnx/model.onnx").write_text("cut")
    write(target, "new", force=True)
    assert open_bundle(target).source["name"] == "new"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(target, force):
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="not a bundle"):
        write(target, "new", force=force)
    assert (target / "thesis.tex").read_text() == "years of work"


def test_a_bundle_with_files_of_somebody_else_is_never_replaced(target):
    write(target, "old")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="notes.txt"):
        write(target, "new", force=True)
    assert (target / "notes.txt").read_text() == "mine"


def test_a_folder_with_another_manifest_is_never_replaced(target):
    target.mkdir(parents=True)
    (target / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(ExportError, match="is not replaced"):
        write(target, "new", force=True)


def test_a_file_is_never_replaced(target):
    target.parent.mkdir()
    target.write_text("a file")
    with pytest.raises(ExportError, match="not a folder"):
        check_destination(target, force=True)


def test_an_empty_folder_may_be_filled(target):
    target.mkdir(parents=True)
    write(target, "new")
    assert open_bundle(target).source["name"] == "new"


def test_a_target_that_appears_meanwhile_is_not_overwritten(target):
    with pytest.raises(ExportError, match="exists already"), staging(target, force=False) as folder:
        fill(folder, "slow")
        write(target, "fast")
        publish(folder, target, force=False)
    assert open_bundle(target).source["name"] == "fast"
    assert leftovers(target) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_appears_in_the_last_moment(target, monkeypatch, force):
    """After the check of what is there: refused as at the check, or replaced with force."""
    keep_mode = bundle_writer.keep_mode

    def appears(new, old):
        monkeypatch.setattr(bundle_writer, "keep_mode", keep_mode)
        write(target, "fast")
        keep_mode(new, old)

    def write_slowly():
        with staging(target, force=force) as folder:
            fill(folder, "slow")
            monkeypatch.setattr(bundle_writer, "keep_mode", appears)
            publish(folder, target, force=force)

    if force:
        write_slowly()
    else:
        with pytest.raises(ExportError, match="exists already"):
            write_slowly()
    assert open_bundle(target).source["name"] == ("slow" if force else "fast")
    assert leftovers(target) == []


def test_folders_above_that_were_made_go_if_nothing_is_written(tmp_path):
    (tmp_path / "kept").mkdir()
    target = tmp_path / "kept" / "new" / "newer" / "bundle"
    with pytest.raises(RuntimeError), staging(target, force=False):
        assert target.parent.is_dir()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    write(target, "new")
    assert open_bundle(target).source["name"] == "new"


def test_a_failure_leaves_nothing(target):
    with pytest.raises(RuntimeError), staging(target, force=False) as folder:
        fill(folder, "new")
        raise RuntimeError
    assert not target.parent.exists(), "which the export had made"


def test_a_failed_second_rename_puts_the_old_bundle_back(target, monkeypatch):
    monkeypatch.setattr(bundle_writer, "_exchange", lambda first, second: False)
    write(target, "old")
    rename = Path.rename

    def failing(self, goal):
        if self.name.endswith(".staging"):
            raise OSError(errno.EIO, "worn out disk")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="worn out"):
        write(target, "new", force=True)
    assert open_bundle(target).source["name"] == "old"
    assert leftovers(target) == []


def test_an_exchange_that_fails_for_a_real_reason_is_told(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(OSError) as error:
        bundle_writer._exchange(tmp_path / "one", tmp_path / "missing")
    assert error.value.errno == errno.ENOENT


def test_the_exchange_is_one_step_here(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert bundle_writer._exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one/two").exists() and (tmp_path / "two/one").exists()


def test_what_dead_exports_left_is_cleaned_and_the_living_are_not(target):
    target.parent.mkdir()
    dead, alive = target.parent / ".bundle.0000dead.staging", target.parent / ".bundle.0000beef.staging"
    neighbour = target.parent / ".bundle.two.0000dead.staging"
    for folder in (dead, alive, neighbour):
        folder.mkdir()
        (folder / "part").touch()
    release, lock = try_lock(alive.with_suffix(".lock")), alive.with_suffix(".lock").name
    abandoned = target.parent / ".bundle.0000face.lock"  # of an export that died before it made its folder
    abandoned.touch()
    try:
        write(target, "new")
        assert sorted(leftovers(target)) == sorted([alive.name, lock, neighbour.name])
    finally:
        release()
    clean_stale(target)
    assert leftovers(target) == [neighbour.name]


def test_an_old_bundle_moved_aside_by_a_killed_export_comes_back(target):
    write(target, "old")
    target.rename(target.parent / ".bundle.0000dead.old")
    with pytest.raises(ExportError, match="exists already"):
        write(target, "new")
    assert open_bundle(target).source["name"] == "old"


def test_the_name_of_a_target_is_no_pattern(tmp_path):
    target = tmp_path / "bundle[1]*"
    other = tmp_path / ".bundle1x.0000dead.staging"
    other.mkdir()
    write(target, "new")
    assert open_bundle(target).source["name"] == "new" and other.exists()
