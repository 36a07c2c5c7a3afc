"""Files that a newer gte-deploy wrote: refused by name with the advice to upgrade, and nothing of them is lost."""

import dataclasses
import json

import pytest
import torch

import gte_deploy
from gte_deploy.backends import picks
from gte_deploy.bulk import BulkOptions, encode_files
from gte_deploy.bulk.parts import PartsFolder
from gte_deploy.bundle.manifest import MANIFEST_NAME, is_bundle, open_bundle
from gte_deploy.core.errors import BundleError, CheckpointError, GteDeployError, InputError, OutputExistsError
from gte_deploy.core.formats import check_version
from gte_deploy.exporters.bundle.writer import check_destination
from gte_deploy.exporters.published.results import read_result
from gte_deploy.exporters.triton.repository import repository_files
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.prepare import PrepareOptions, prepare
from gte_deploy.training.state import CheckpointStore, TensorPart, TrainingState, find_checkpoint

UPGRADE = "A newer gte-deploy wrote it: upgrade gte-deploy."


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path):
    """Call something that must refuse, name the file, advise to upgrade, and leave every file as it is."""

    def refused(call, kind, file):
        before = snapshot(tmp_path)
        with pytest.raises(kind) as caught:
            call()
        assert str(file) in str(caught.value) and str(caught.value).endswith(UPGRADE), str(caught.value)
        assert snapshot(tmp_path) == before

    return refused


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_versions():
    def check(found, known=(1, 2)):
        check_version("f", found, known, error=InputError, advice="Do it again.")

    check(1), check(2)
    for found in (3, 10**30):
        with pytest.raises(InputError, match=f"f has format version {found}; .* reads 1, 2. A newer .*: upgrade"):
            check(found)
    for found in (0, -1, None, True, 1.0, "3", [3], {}):
        with pytest.raises(InputError, match=r"this gte-deploy reads 1, 2\. Do it again\."):
            check(found)


def test_a_bundle(tmp_path, bundle_of, word_checkpoints, refused):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = bundle / MANIFEST_NAME
    manifest.write_bytes((bundle_of(word_checkpoints["embed"]) / MANIFEST_NAME).read_bytes())
    edit(manifest, format_version=5, new_field={"a": 1})
    assert is_bundle(bundle), "it is not taken for a checkpoint"
    for call in (gte_deploy.load, open_bundle):
        refused(lambda call=call: call(bundle), BundleError, manifest)
    with pytest.raises(OutputExistsError, match=f"is not replaced: .*{UPGRADE}"):  # an export with --force
        check_destination(bundle, force=True)


def test_a_triton_repository(tmp_path, refused):
    manifest = tmp_path / MANIFEST_NAME
    manifest.write_text(json.dumps({"format": "gte-deploy-triton-repository", "format_version": 2, "files": {}}))
    refused(lambda: repository_files(tmp_path), BundleError, manifest)
    with pytest.raises(OutputExistsError, match=f"is not replaced: .*{UPGRADE}"):
        check_destination(tmp_path, force=True, files_of=repository_files)
    edit(manifest, format_version=1, files={"a": {}})
    assert repository_files(tmp_path) == {"a"}


@pytest.fixture
def store(tmp_path):
    """Checkpoints of steps 1 and 2; the second says that its format is newer, and is sealed as it is."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=5)
    for step in (1, 2):
        state = TrainingState(
            stage=0, stage_name="s", step=step, stage_steps=9, total_step=step, tokens=0, seconds=0.0, seed=0,
            learning_rate=0.1, recipe={}, model_config={}, corpus="", versions={},
        )  # fmt: skip
        state = dataclasses.replace(state, format_version=step + 1)
        part = {"w": TensorPart.whole(torch.zeros(2))}
        store.save(state, model=part, optimizer=part)
    return store


@pytest.mark.parametrize("with_other_files", [False, True])
def test_a_checkpoint_of_a_run_is_no_reason_to_go_on_from_an_older_one(store, with_other_files, tmp_path, refused):
    newest = store.folder / "00-s-00000002"
    if with_other_files:  # as a newer format may have them
        marker = json.loads((newest / "COMPLETE.json").read_text())
        (newest / "COMPLETE.json").write_text(json.dumps({"files": {"state.json": marker["files"]["state.json"]}}))
    for call in (store.latest, lambda: find_checkpoint(tmp_path / "run"), lambda: find_checkpoint(newest)):
        refused(call, CheckpointError, newest / "state.json")


def test_a_damaged_version_is_damage(store):
    """Then the run goes on from the checkpoint before."""
    file = store.folder / "00-s-00000002" / "state.json"
    file.write_text(file.read_text().replace('"format_version": 3', '"format_version": 9'))
    assert store.latest().state.step == 1


def test_a_corpus(tmp_path, refused):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"format": "gte-token-corpus", "version": 2}))
    refused(lambda: TokenCorpus.open(tmp_path), InputError, index)


def test_an_unfinished_corpus(tmp_path, tiny_mlm, refused):
    (tmp_path / "t.txt").write_text("a text")
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "header.json").write_text(json.dumps({"version": 2, "new": 1}))
    (work / "units").mkdir()
    (work / "units" / "kept.json").write_text("{}")

    def run(**options):
        prepare([str(tmp_path / "t.txt")], tmp_path / "out", tokenizer=tiny_mlm, options=PrepareOptions(**options))

    refused(run, InputError, work / "header.json")
    run(restart=True)
    assert TokenCorpus.open(tmp_path / "out").num_documents == 1


def test_an_unfinished_run_over_files(tmp_path, bundle_of, word_checkpoints, monkeypatch, refused):
    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    output, write = tmp_path / "out.npy", PartsFolder.write

    def run(**options):
        model = bundle_of(word_checkpoints["embed"])
        return encode_files(tmp_path / "in.txt", output, model=model, options=BulkOptions(shard_rows=1, **options))

    def write_two(self, shard, *rest):
        if shard.cursor.number == 2:
            raise GteDeployError("interrupted")
        return write(self, shard, *rest)

    monkeypatch.setattr(PartsFolder, "write", write_two)
    with pytest.raises(GteDeployError, match="interrupted"):
        run()
    monkeypatch.undo()
    journal = tmp_path / "out.npy.parts" / "journal.json"
    edit(journal, version=3, new=1)
    refused(run, InputError, journal)
    assert run(restart=True).rows == 3


def test_a_result_of_verify_published(tmp_path, refused):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"format": 2}))
    refused(lambda: read_result(file), InputError, file)


def test_a_pick_of_another_version_is_another_file(tmp_path, monkeypatch, caplog):
    """Each version measures for itself: what changes with a version may change which engine is fastest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pick = picks.Pick("onnx", None, {}, "2026-01-01", {})
    monkeypatch.setattr(picks, "__version__", "99.0.0")
    newer = picks.save("sum", pick)
    content = newer.read_bytes()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert picks.lookup("sum") is None and not caplog.records
    assert picks.save("sum", pick) != newer and newer.read_bytes() == content
    assert picks.lookup("sum") == pick
