"""Changes to a run that has checkpoints: other settings from a step on, an older checkpoint, a branch of another run.

Each of them adds a checkpoint to the run, `NN-STAGE-STEP.R`. It has the tensors of the checkpoint that it comes from,
the recipe with the changes, and the history of all changes. Any later start of the run goes on from there; a kill in
between leaves either the old checkpoint or both.
"""

from __future__ import annotations

import copy
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.training.log import LOG_FILE
from gte_deploy.training.optim import learning_rate, plateau_end
from gte_deploy.training.recipe import (
    EXECUTION_FIELDS,
    Recipe,
    Stage,
    changed_fields,
    override_recipe,
    recipe_from_dict,
    recipe_to_dict,
)
from gte_deploy.training.state import (
    CHECKPOINTS_FOLDER,
    FORMAT_VERSION,
    Checkpoint,
    CheckpointStore,
    TrainingState,
    find_checkpoint,
)

logger = logging.getLogger(__name__)

ROLLED_BACK_FOLDER = "rolled-back"
CHANGEABLE = (
    "learning_rate",
    "steps",
    "schedule",
    "warmup_ratio",
    "decay_ratio",
    "skip_steps",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.clip_norm",
)
"""The fields of a stage that may change while it runs. Data, masks and model stay: they make the run what it is."""

_SCHEDULE = ("steps", "schedule", "warmup_ratio", "decay_ratio")


def change_run(recipe: Recipe, *, output: Path, changes: Sequence[str] = (), start_from: Path | None = None) -> Path:
    """Change what a run does from now on; `train` with the same recipe and output then goes on with the change.

    The main process alone calls this. The same call again changes nothing, so that a job may be started again with its
    command.

    Args:
        recipe: the recipe of the run, as it was given when the run began.
        output: the output folder of the run.
        changes: such as "stages.0.learning_rate=1e-4"; `CHANGEABLE` has the fields of a stage that may change.
        start_from: a checkpoint in `output`, from which the run goes on: later checkpoints move to `rolled-back/`. Or
            a checkpoint, or the output folder, of another run with the same recipe: `output` becomes a branch of it.

    Returns:
        The checkpoint from which the run goes on.

    Raises:
        ConfigError: a change is not possible there; the message says why.
        CheckpointError: there is no such checkpoint, or it is not complete.
    """
    store = CheckpointStore(output / CHECKPOINTS_FOLDER)
    store.remove_leftovers()
    newest = store.latest()
    if newest is None and start_from is None:
        raise ConfigError(f"{output} has no checkpoint yet: nothing can change there; --set gives a new run its values")
    path = None if start_from is None else _place_of(start_from, store)
    if newest is not None and path is not None and _was_done(newest, path, changes):
        logger.info("%s went on from %s before, with the same changes; it continues", output, path)
        return newest.path
    base = newest if path is None else find_checkpoint(path)
    assert base is not None  # either of the two
    own = base.path.parent.resolve() == store.folder.resolve()
    if newest is not None and not own:
        raise ConfigError(f"{output} holds a run already; a branch of {path} needs a new output folder")
    settled = settled_recipe(recipe, base)
    changed = override_recipe(settled, changes)
    differences = _differences(settled, changed, changes)
    if path is None and not differences:
        logger.info("%s has these values already; it continues", output)
        return base.path
    _require_possible(settled, changed, differences, base.state, store)
    entry = {
        "total_step": base.state.total_step,
        "stage": base.state.stage_name,
        "step": base.state.step,
        "from": None if path is None else str(path),
        "given": list(changes),
        "changes": differences,
    }
    adopted = store.adopt(base, _changed_state(base.state, changed, entry))
    _tell(settled, changed, differences, adopted)
    if own:
        _move_aside(store.later_than(adopted), output)
    return adopted.path


def settled_recipe(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """Return the recipe with the changes that a run has had so far.

    Raises:
        ConfigError: the recipe is not that of the run.
    """
    given, state = recipe_to_dict(recipe), checkpoint.state
    values: dict[str, list[Any]] = {}
    for entry in state.interventions:
        for key, (old, new) in entry["changes"].items():
            values.setdefault(key, [old]).append(new)
    raw = copy.deepcopy(given)
    for key, known in values.items():
        if len(given["stages"]) > int(key.split(".")[1]) and _field(given, key) in known:
            _set_field(raw, key, known[-1])
    differing = changed_fields(recipe_to_dict(recipe_from_dict(state.recipe)), raw)
    if differing:
        raise ConfigError(
            f"{checkpoint.path} was trained with another recipe; it differs in {', '.join(differing)}. Use the same "
            "recipe, or another output folder; --change KEY=VALUE changes a learning rate, a schedule or the optimizer"
        )
    return recipe_from_dict(raw)


def _place_of(path: Path, store: CheckpointStore) -> Path:
    """Return the folder that a path names: as it is, or as the name of a checkpoint of this run."""
    is_name = path.parent == Path() and not path.exists()
    return (store.folder / path if is_name else path).resolve()


def _was_done(newest: Checkpoint, path: Path, changes: Sequence[str]) -> bool:
    """Whether the run has gone on from this checkpoint with these changes, which a repeated command does not repeat."""
    return any(entry["from"] == str(path) and entry["given"] == list(changes) for entry in newest.state.interventions)


def _differences(old: Recipe, new: Recipe, changes: Sequence[str]) -> dict[str, list[Any]]:
    """Return the old and the new value of each key that a change names, where they differ.

    Raises:
        ConfigError: a key may not change.
    """
    before, after, found = recipe_to_dict(old), recipe_to_dict(new), {}
    for change in changes:
        key = change.partition("=")[0]
        if key in EXECUTION_FIELDS:
            raise ConfigError(f"{key} may change at any start; give it with --set {change}")
        if not re.fullmatch(rf"stages\.\d+\.({'|'.join(map(re.escape, CHANGEABLE))})", key):
            raise ConfigError(f"{key} cannot change in a run; stages.N. can: {', '.join(CHANGEABLE)}")
        if _field(before, key) != _field(after, key):
            found[key] = [_field(before, key), _field(after, key)]
    return found


def _require_possible(
    old: Recipe, new: Recipe, differences: Mapping[str, Any], state: TrainingState, store: CheckpointStore
) -> None:
    for key in differences:
        _, number_text, field = key.split(".", 2)
        number = int(number_text)
        if number < state.stage:
            raise ConfigError(f"{key}: stage {number} is over; go back to one of its checkpoints with --from")
        if number == state.stage and field in _SCHEDULE:
            _require_schedule_open(old.stages[number], new.stages[number], state, store)


def _require_schedule_open(old: Stage, new: Stage, state: TrainingState, store: CheckpointStore) -> None:
    """Refuse to change a schedule whose decay has begun: the rate would jump, and what the decay did stays done."""
    if new.steps <= state.step:
        raise ConfigError(f"stages.{state.stage}.steps={new.steps}: {state.step} steps are done already")
    plateau = plateau_end(old)
    if plateau is not None and state.step > plateau:
        earlier = store.newest_of(stage=state.stage, step=plateau)
        hint = f"--from {earlier.name}" if earlier is not None else "--from a checkpoint of the plateau"
        raise ConfigError(
            f"stage {old.name} decays since step {plateau}, and {state.step} are done; to change its schedule, go back "
            f"to the plateau with {hint}"
        )


def _changed_state(state: TrainingState, recipe: Recipe, entry: Mapping[str, Any]) -> TrainingState:
    return replace(
        state,
        recipe=recipe_to_dict(recipe),
        stage_steps=recipe.stages[state.stage].steps,
        interventions=[*state.interventions, entry],
        format_version=FORMAT_VERSION,
    )


def _tell(old: Recipe, new: Recipe, differences: Mapping[str, Any], adopted: Checkpoint) -> None:
    state = adopted.state
    logger.info("the run goes on from %s, after step %d of stage %s", adopted.path, state.step, state.stage_name)
    for key, (before, after) in differences.items():
        logger.info("%s is %s from here on; it was %s", key, after, before)
    if state.step < new.stages[state.stage].steps:
        rates = [learning_rate(recipe.stages[state.stage], state.step) for recipe in (old, new)]
        if rates[0] != rates[1]:
            logger.info("the learning rate of the next step is %g; it would have been %g", rates[1], rates[0])


def _move_aside(paths: Sequence[Path], output: Path) -> None:
    """Move checkpoints, the newest first, and a copy of the log out of the way."""
    if not paths:
        return
    number = 1
    while (target := output / ROLLED_BACK_FOLDER / f"{number:03d}").exists():
        number += 1
    target.mkdir(parents=True)
    if (output / LOG_FILE).is_file():
        shutil.copy2(output / LOG_FILE, target / LOG_FILE)
    for path in reversed(paths):
        path.rename(target / path.name)
    logger.warning("%d later checkpoints, and the log so far, are now in %s", len(paths), target)


def _field(raw: Mapping[str, Any], key: str) -> Any:
    node: Any = raw
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _set_field(raw: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = _field(raw, ".".join(path))
    node[last] = value
