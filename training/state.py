"""Checkpoints of a run: they hold safetensors and JSON only, are complete or not there, and are verified before use.

A checkpoint is a folder `NN-STAGE-STEP`:

    model.safetensors       float32 weights; tied weights are stored once
    optimizer.safetensors   `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`
    state.json              stage and step, seed, recipe, corpus, model config
    COMPLETE.json           size and sha256 of the others; written last, so a folder without it is incomplete

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
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.files import DIRECTORY_MODE, read_json_object, sha256_file, sync_directory, sync_file, write_text

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MARKER_FILE = "COMPLETE.json"
CHECKPOINTS_FOLDER = "checkpoints"
TOKENIZER_FOLDER = "tokenizer"
_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
_ASIDE_SUFFIX = ".tmp"


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
    format_version: int = FORMAT_VERSION

    @property
    def folder_name(self) -> str:
        """The name of the checkpoint's folder. Names sort in the order of the run."""
        return f"{self.stage:02d}-{self.stage_name}-{self.step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; see `read_checkpoint`."""

    path: Path
    state: TrainingState

    def model_tensors(self) -> dict[str, Tensor]:
        """Load the weights by parameter name, float32 on the CPU."""
        return _load_tensors(self.path / MODEL_FILE)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Load the optimizer's state by `<parameter>.<field>`, on the CPU."""
        return _load_tensors(self.path / OPTIMIZER_FILE)


class CheckpointStore:
    """The checkpoints of one run in one folder. It keeps the newest `keep` and the last one of each stage."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: TrainingState, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint into a temporary folder, rename it into place, and delete old checkpoints.

        After a kill at any moment the earlier checkpoints are complete, and this one is complete or not there.
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
        """Return the newest complete checkpoint, or None if the run has no checkpoint. Refused ones are logged.

        Raises:
            CheckpointError: there are checkpoints, but none is complete.
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
        """Return the checkpoint of a step, without verification: another rank has verified it.

        Raises:
            CheckpointError: this rank does not find it.
        """
        for path in self._paths():
            if path.name.startswith(f"{stage:02d}-") and path.name.endswith(f"-{step:08d}"):
                return read_checkpoint(path, verify=False)
        raise CheckpointError(
            f"{self.folder} has no checkpoint of stage {stage} step {step}: is it shared by all nodes?"
        )

    def remove_leftovers(self) -> None:
        """Delete the temporary folders of killed saves. Only the process that writes checkpoints may call this."""
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
    """Return the seed of the random numbers inside one step on one rank, which are those of dropout."""
    return _derived_seed(seed, stage, step, rank)


def stage_seed(seed: int, stage: int) -> int:
    """Return the seed of a stage's order, resampling and masks. Two stages of one length must not repeat each other."""
    return _derived_seed(seed, stage)


def _derived_seed(*path: int) -> int:
    """Return 63 bits of a hash of the numbers, so that neighbouring steps get unrelated seeds."""
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
    """Delete a checkpoint, and its marker first: after a kill in between, the rest does not look complete."""
    (path / MARKER_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing")
    return read_json_object(path, advice="The file is damaged; use another checkpoint of the run.")
