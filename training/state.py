"""Checkpoints of a run: whole or not there, verified before use, safetensors and JSON only (nothing unpickles).

A checkpoint is a folder `NN-STAGE-STEP`:

    model.safetensors       float32 weights, tied ones once
    optimizer.safetensors   `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`
    state.json              stage and step, seed, recipe, corpus, model config
    COMPLETE.json           size and sha256 of the others; written last, so a folder without it is incomplete

Everything else that a run needs is a pure function of what `state.json` holds. The order of samples and their masks
follow from (seed, step), so the step is the data position; the learning rate follows from (recipe, stage, step); the
random state of dropout is set at the start of each step from (seed, stage, step, rank), see `step_seed`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gte_deploy.errors import CheckpointError
from gte_deploy.files import DIRECTORY_MODE, read_json_object, sha256_file, sync_directory, sync_file, write_text

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MARKER_FILE = "COMPLETE.json"
_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
_ASIDE_SUFFIX = ".tmp"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run stands: `step` optimizer steps of stage `stage` (an index) are done.

    `tokens` counts real tokens seen since the start, `seconds` the time spent in training; `recipe`, `model_config`
    and `corpus` say what the run is, so that it is not continued as another one.
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
    format_version: int = FORMAT_VERSION

    @property
    def folder_name(self) -> str:
        """Sorts in the order of the run."""
        return f"{self.stage:02d}-{self.stage_name}-{self.step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files equal their sha256."""

    path: Path
    state: TrainingState

    def model_tensors(self) -> dict[str, Tensor]:
        """Weights by parameter name, float32 on the CPU."""
        return _load_tensors(self.path / MODEL_FILE)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state by `<parameter>.<field>`, on the CPU."""
        return _load_tensors(self.path / OPTIMIZER_FILE)


class CheckpointStore:
    """The checkpoints of one run in one folder: the newest `keep`, and the last of each stage."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: TrainingState, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint aside, sync it, rename it into place, then delete what is no longer kept.

        A kill at any moment leaves the checkpoints of before, or those and this one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / state.folder_name
        aside = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{target.name}.", suffix=_ASIDE_SUFFIX))
        try:
            _write_files(aside, state, model, optimizer)
            if target.exists():  # the same step again, after its checkpoint was found corrupt
                _remove(target)
            aside.rename(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_directory(self.folder)
        self._prune()
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where the run has none yet. Each one passed over is logged.

        Raises:
            CheckpointError: there are checkpoints, and not one is whole.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                logger.warning("refused a checkpoint, trying the one before: %s", error)
        if paths:
            raise CheckpointError(
                f"none of the {len(paths)} checkpoints in {self.folder} is whole; move the folder away to start anew"
            )
        return None

    def find(self, *, stage: int, step: int) -> Checkpoint:
        """The checkpoint of a step, which another rank has verified.

        Raises:
            CheckpointError: this rank does not see it.
        """
        for path in self._paths():
            if path.name.startswith(f"{stage:02d}-") and path.name.endswith(f"-{step:08d}"):
                return read_checkpoint(path, verify=False)
        raise CheckpointError(
            f"{self.folder} has no checkpoint of stage {stage} step {step}: is it shared by all nodes?"
        )

    def remove_leftovers(self) -> None:
        """Delete what a killed save left behind. Only the one process that writes here may call this."""
        for path in self.folder.glob(f".*{_ASIDE_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*-*") if path.is_dir())

    def _prune(self) -> None:
        paths = self._paths()
        last_of_stage = {path.name.split("-")[0]: path for path in paths}
        for path in paths[: -self.keep]:
            if path not in last_of_stage.values():
                _remove(path)


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Verify a checkpoint folder and read its state. Without `verify`, trust the files: another rank has read them.

    Raises:
        CheckpointError: it is incomplete, altered, or of another format version; the message says which file.
    """
    marker = _read_object(path / MARKER_FILE)
    expected = marker.get("files", {})
    if set(expected) != set(_FILES):
        raise CheckpointError(f"{path / MARKER_FILE} lists {sorted(expected)}; expected {sorted(_FILES)}")
    for name, facts in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if verify and {"bytes": file.stat().st_size, "sha256": sha256_file(file)} != facts:
            raise CheckpointError(f"{path} is corrupt: {name} differs from its sha256")
    raw = _read_object(path / STATE_FILE)
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {raw.get('format_version')}; this version reads {FORMAT_VERSION}")
    try:
        return Checkpoint(path, TrainingState(**raw))
    except TypeError as error:
        raise CheckpointError(f"{path / STATE_FILE} does not hold a training state: {error}") from error


def step_seed(seed: int, stage: int, step: int, rank: int) -> int:
    """Seed of everything random inside one step on one rank (dropout)."""
    return _derived_seed(seed, stage, step, rank)


def stage_seed(seed: int, stage: int) -> int:
    """Seed of a stage's order, resampling and masks: two stages of one length must not repeat each other's."""
    return _derived_seed(seed, stage)


def _derived_seed(*path: int) -> int:
    """63 bits of a hash of the numbers, so that neighbours differ."""
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _write_files(
    folder: Path, state: TrainingState, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> None:
    from safetensors.torch import save_file

    for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
        sync_file(folder / name)
    write_text(folder / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
    facts = {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_file(folder / n)} for n in _FILES}
    write_text(folder / MARKER_FILE, json.dumps({"files": facts}, indent=2) + "\n")
    os.chmod(folder, DIRECTORY_MODE)


def _remove(path: Path) -> None:
    """Delete a checkpoint; its marker first, so that a kill in between leaves no folder that looks whole."""
    (path / MARKER_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing")
    return read_json_object(path, advice="The file is damaged; use another checkpoint of the run.")
