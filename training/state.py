"""Checkpoints of a run: they hold safetensors and JSON only, are complete or not there, and are verified before use.

A checkpoint is a folder `NN-STAGE-STEP`, or `NN-STAGE-STEP.R` after a change of the run (`training/rescue.py`):

    model.safetensors       float32 weights; tied weights are stored once
    optimizer.safetensors   `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`
    state.json              stage and step, seed, recipe and its changes, corpus, model config
    COMPLETE.json           size and sha256 of the others; written last, so a folder without it is incomplete

In a sharded run each of N ranks writes the rows that it has, into `model-RRRRR-of-NNNNN.safetensors` and
`optimizer-RRRRR-of-NNNNN.safetensors`. Their header has a field `rows`: for each tensor its first row, and the shape of
the whole. A checkpoint is read whole, so any number of ranks continues it.

All other state of a run is a pure function of `state.json`. The order of samples and their masks follow from the seed
and the step, so the step is also the position in the data. The learning rate follows from the recipe, the stage and the
step. The random state of dropout is set at the start of each step, see `step_seed`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.files import read_json_object, sha256_file, sync_directory, sync_file, write_text
from gte_deploy.core.formats import check_version, is_newer

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # 1 had no shards and no changes
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MARKER_FILE = "COMPLETE.json"
CHECKPOINTS_FOLDER = "checkpoints"
TOKENIZER_FOLDER = "tokenizer"
_ASIDE_SUFFIX = ".tmp"
_ROWS = "rows"  # the field of a shard's header


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The progress of a run, and the facts that identify the run.

    Args:
        stage: index of the stage.
        stage_name: its name.
        step: optimizer steps done in the stage.
        stage_steps: all steps of the stage.
        total_step: optimizer steps done in all stages.
        tokens: tokens seen since the start, without padding.
        seconds: time spent in training.
        seed: the run's seed.
        learning_rate: the learning rate of the last step.
        recipe: the recipe; a run is not continued with another one, see `recipe.changed_fields`.
        model_config: the model's config.json.
        corpus: fingerprint of the corpus; a run is not continued on another one.
        versions: versions of the libraries.
        interventions: what was changed since the run began, the oldest first, see `training/rescue.py`.
        recent: losses and gradient norms of the last steps, with which the alarms compare the next.
        format_version: version of the checkpoint's format.
    """

    stage: int
    stage_name: str
    step: int
    stage_steps: int
    total_step: int
    tokens: int
    seconds: float
    seed: int
    learning_rate: float
    recipe: Mapping[str, Any]
    model_config: Mapping[str, Any]
    corpus: str
    versions: Mapping[str, str]
    interventions: Sequence[Mapping[str, Any]] = field(default_factory=list)
    recent: Mapping[str, Sequence[float]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def folder_name(self) -> str:
        """The name of the checkpoint's folder. Names sort in the order of the run."""
        return f"{self.stage:02d}-{self.stage_name}-{self.step:08d}"


@dataclass(frozen=True)
class TensorPart:
    """What one rank writes of a tensor.

    Args:
        rows: consecutive rows of the tensor, or all of it.
        start: number of the first row.
        shape: shape of the whole tensor.
    """

    rows: Tensor
    start: int
    shape: tuple[int, ...]

    @staticmethod
    def whole(tensor: Tensor) -> TensorPart:
        """All of a tensor."""
        return TensorPart(tensor, 0, tuple(tensor.shape))

    @property
    def is_whole(self) -> bool:
        """Whether no other rank has rows of the tensor."""
        return tuple(self.rows.shape) == self.shape


Parts = Mapping[str, TensorPart]
"""Tensors by name, as one rank writes them."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in `shards` parts; see `read_checkpoint`."""

    path: Path
    state: TrainingState
    shards: int = 1

    @property
    def place(self) -> tuple[int, int, int]:
        """Its stage, its step, and its revision among the checkpoints of this step, see `CheckpointStore.adopt`."""
        return _place(self.path)

    def model_tensors(self) -> dict[str, Tensor]:
        """Load the weights by parameter name, float32 on the CPU."""
        return _load_tensors([self.path / name for name in _shard_names(MODEL_FILE, self.shards)])

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Load the optimizer's state by `<parameter>.<field>`, on the CPU."""
        return _load_tensors([self.path / name for name in _shard_names(OPTIMIZER_FILE, self.shards)])


class _NewerCheckpointError(CheckpointError):
    """A newer gte-deploy wrote the checkpoint, which is no reason to go on from an older one."""


class CheckpointStore:
    """The checkpoints of one run in one folder.

    Args:
        folder: the folder.
        keep: number of newest checkpoints to keep, besides the last one of each stage.
        milestones: stage and step of further checkpoints to keep.
    """

    def __init__(self, folder: Path, *, keep: int = 2, milestones: Iterable[tuple[int, int]] = ()) -> None:
        self.folder = folder
        self.keep = keep
        self.milestones = frozenset(milestones)

    def save(self, state: TrainingState, *, model: Parts, optimizer: Parts) -> Path:
        """Write a checkpoint, of which this process has all tensors.

        After a kill at any moment the earlier checkpoints are complete, and this one is complete or not there.
        """
        self.begin(state)
        try:
            self.write_part(state, model=model, optimizer=optimizer)
            return self.finish(state)
        except BaseException:
            self.abandon(state)
            raise

    def begin(self, state: TrainingState) -> None:
        """Make the temporary folder of a checkpoint. One process does this, before any writes its part."""
        aside = self._aside(state)
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)

    def write_part(
        self, state: TrainingState, *, model: Parts, optimizer: Parts, shard: int = 0, shards: int = 1
    ) -> None:
        """Write the files of one rank, number `shard` of `shards`, into the temporary folder."""
        aside, facts = self._aside(state), {}
        for name, parts in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
            file = aside / _shard_names(name, shards)[shard]
            _save_tensors(file, parts)
            facts[file.name] = _facts(file)
        write_text(aside / _facts_name(shard), json.dumps(facts))

    def finish(self, state: TrainingState, *, shards: int = 1) -> Path:
        """Rename the temporary folder, of which every part is written, into place, and delete old checkpoints."""
        aside, target = self._aside(state), self.folder / state.folder_name
        write_text(aside / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
        files = {STATE_FILE: _facts(aside / STATE_FILE)}
        for shard in range(shards):
            part = aside / _facts_name(shard)
            files |= _read_object(part)
            part.unlink()
        write_text(aside / MARKER_FILE, json.dumps({"shards": shards, "files": files}, indent=2) + "\n")
        if target.exists():  # the same step again, after its checkpoint was found corrupt
            _remove(target)
        aside.rename(target)
        sync_directory(self.folder)
        self.prune()
        return target

    def abandon(self, state: TrainingState) -> None:
        """Delete the temporary folder of a checkpoint that could not be written."""
        shutil.rmtree(self._aside(state), ignore_errors=True)

    def adopt(self, checkpoint: Checkpoint, state: TrainingState) -> Checkpoint:
        """Add a checkpoint with the tensors of another one, of this run or not, and with a state of its own.

        The files of the tensors are linked, or copied where the disk cannot do that. The new checkpoint has the step of
        the old one, and a name that sorts behind it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        revision = 1
        while (target := self.folder / f"{state.folder_name}.{revision}").exists():
            revision += 1
        aside = self.folder / f".{target.name}{_ASIDE_SUFFIX}"
        aside.mkdir()
        files = dict(_read_object(checkpoint.path / MARKER_FILE)["files"])
        for name in files:
            if name != STATE_FILE:
                _link_or_copy(checkpoint.path / name, aside / name)
        write_text(aside / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
        files[STATE_FILE] = _facts(aside / STATE_FILE)
        write_text(aside / MARKER_FILE, json.dumps({"shards": checkpoint.shards, "files": files}, indent=2) + "\n")
        aside.rename(target)
        sync_directory(self.folder)
        return read_checkpoint(target, verify=False)

    def later_than(self, checkpoint: Checkpoint) -> list[Path]:
        """Return the checkpoints after one of this run, the oldest first."""
        return [path for path in self._paths() if _place(path)[:2] > _place(checkpoint.path)[:2]]

    def newest_of(self, *, stage: int, step: int) -> Path | None:
        """Return the newest checkpoint of a stage that has at most so many steps."""
        paths = [path for path in self._paths() if _place(path)[0] == stage and _place(path)[1] <= step]
        return paths[-1] if paths else None

    def latest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None if the run has no checkpoint. Refused ones are logged.

        Raises:
            CheckpointError: there are checkpoints, but none is complete; or a newer gte-deploy wrote the newest.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                return read_checkpoint(path)
            except _NewerCheckpointError:
                raise
            except CheckpointError as error:
                logger.warning("refused a checkpoint, trying the one before: %s", error)
        if paths:
            raise CheckpointError(
                f"none of the {len(paths)} checkpoints in {self.folder} is whole; move the folder away to start anew"
            )
        return None

    def find(self, *, stage: int, step: int, revision: int = 0) -> Checkpoint:
        """Return the checkpoint of a step, without verification: another rank has verified it.

        Args:
            stage: index of the stage.
            step: steps done in the stage.
            revision: number of the checkpoint among those of this step, see `adopt`.

        Raises:
            CheckpointError: this rank does not find it.
        """
        for path in self._paths():
            if _place(path) == (stage, step, revision):
                return read_checkpoint(path, verify=False)
        raise CheckpointError(
            f"{self.folder} has no checkpoint of stage {stage} step {step}: is it shared by all nodes?"
        )

    def remove_leftovers(self) -> None:
        """Delete the temporary folders of killed saves. Only the process that writes checkpoints may call this."""
        for path in self.folder.glob(f".*{_ASIDE_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)

    def prune(self) -> None:
        """Delete old checkpoints, but for the last of each stage and the milestones."""
        paths = self._paths()
        last_of_stage = {path.name.split("-")[0]: path for path in paths}
        for path in paths[: -self.keep]:
            if path not in last_of_stage.values() and _place(path)[:2] not in self.milestones:
                _remove(path)

    def _aside(self, state: TrainingState) -> Path:
        return self.folder / f".{state.folder_name}{_ASIDE_SUFFIX}"

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*-*") if path.is_dir())


def is_run(path: Path) -> bool:
    """Whether a folder is a training checkpoint, or the output folder of a run that has checkpoints."""
    return (path / STATE_FILE).is_file() or (path / CHECKPOINTS_FOLDER).is_dir()


def find_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder, or the newest complete one in the output folder of a run.

    Raises:
        CheckpointError: there is no checkpoint, or it is not complete.
    """
    if (path / STATE_FILE).is_file():
        return read_checkpoint(path)
    checkpoint = CheckpointStore(path / CHECKPOINTS_FOLDER).latest()
    if checkpoint is None:
        raise CheckpointError(
            f"{path} is neither a training checkpoint nor the output folder of a run that has one.",
            advice="Give the folder that `gte-train run` wrote with --output. A model that is ready is exported with "
            "gte-export.",
        )
    return checkpoint


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Verify a checkpoint's folder and read its state. Without `verify` the files' sha256 are not compared.

    Raises:
        CheckpointError: the checkpoint is incomplete or altered (the message names the file), or has another format
            version.
    """
    marker = _read_object(path / MARKER_FILE)
    listed, shards = marker.get("files", {}), marker.get("shards", 1)
    _refuse_newer(path, listed)  # which may list other files
    if not isinstance(shards, int) or shards < 1:
        raise CheckpointError(f"{path / MARKER_FILE} has {shards!r} shards; expected 1 or more")
    expected = {STATE_FILE, *_shard_names(MODEL_FILE, shards), *_shard_names(OPTIMIZER_FILE, shards)}
    if set(listed) != expected:
        raise CheckpointError(f"{path / MARKER_FILE} lists {sorted(listed)}; expected {sorted(expected)}")
    for name, facts in listed.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if verify and _facts(file) != facts:
            raise CheckpointError(f"{path} is corrupt: {name} differs from its sha256")
    raw = _read_object(path / STATE_FILE)
    advice = "Install the gte-deploy that wrote it."
    check_version(path / STATE_FILE, raw.get("format_version"), _READ_VERSIONS, error=CheckpointError, advice=advice)
    try:
        return Checkpoint(path, TrainingState(**raw), shards)
    except TypeError as error:
        raise CheckpointError(f"{path / STATE_FILE} does not hold a training state: {error}") from error


def _refuse_newer(path: Path, listed: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a newer format, if its state is undamaged: else the version could be a flipped bit.

    Raises:
        CheckpointError: it is one.
    """
    file = path / STATE_FILE
    if file.is_file() and listed.get(STATE_FILE) == _facts(file):
        version = _read_object(file).get("format_version")
        if is_newer(version, _READ_VERSIONS):
            check_version(file, version, _READ_VERSIONS, error=_NewerCheckpointError, advice="")


def step_seed(seed: int, stage: int, step: int, rank: int) -> int:
    """Return the seed of the random numbers inside one step on one rank, which are those of dropout."""
    return _derived_seed(seed, stage, step, rank)


def stage_seed(seed: int, stage: int) -> int:
    """Return the seed of a stage's order, resampling and masks. Two stages of one length must not repeat each other."""
    return _derived_seed(seed, stage)


def _derived_seed(*path: int) -> int:
    """Return 63 bits of a hash of the numbers, so that neighbouring steps get unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _shard_names(name: str, shards: int) -> list[str]:
    """Return the names of the files that stand for one file in a checkpoint of so many parts."""
    stem, dot, suffix = name.partition(".")
    return [name] if shards == 1 else [f"{stem}-{i:05d}-of-{shards:05d}{dot}{suffix}" for i in range(shards)]


def _facts_name(shard: int) -> str:
    return f"part-{shard:05d}.json"


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _place(path: Path) -> tuple[int, int, int]:
    """Return stage, step and revision of a checkpoint by its name."""
    stage, *_, last = path.name.split("-")
    step, _, revision = last.partition(".")
    return int(stage), int(step), int(revision or 0)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
        sync_file(target)


def _remove(path: Path) -> None:
    """Delete a checkpoint, and its marker first: after a kill in between, the rest does not look complete."""
    (path / MARKER_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _save_tensors(file: Path, parts: Parts) -> None:
    from gte_deploy.models.stored_tensors import save_tensors

    tensors = {name: part.rows.contiguous() for name, part in parts.items()}
    rows = {name: [part.start, *part.shape] for name, part in parts.items() if not part.is_whole}
    save_tensors(tensors, file, {_ROWS: json.dumps(rows)} if rows else None)
    sync_file(file)


def _load_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Load tensors, and put those together of which each file has some rows."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    whole: dict[str, Tensor] = {}
    missing: dict[str, int] = {}  # rows that no file had yet
    for file in files:
        with safe_open(file, "pt") as opened:
            rows: dict[str, list[int]] = json.loads((opened.metadata() or {}).get(_ROWS, "{}"))
        for name, tensor in load_file(file).items():
            if name in rows:
                start, *shape = rows[name]
                target = whole[name] if name in whole else whole.setdefault(name, tensor.new_empty(shape))
                target[start : start + len(tensor)] = tensor
                missing[name] = missing.get(name, shape[0]) - len(tensor)
            else:
                whole[name] = tensor
    if any(missing.values()):
        raise CheckpointError(
            f"{files[0].parent}: the shards do not hold all rows of {max(missing, key=missing.__getitem__)}"
        )
    return whole


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing")
    return read_json_object(path, advice="The file is damaged; use another checkpoint of the run.")
