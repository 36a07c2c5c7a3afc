"""Reads and writes a checkpoint's config.json, in the family that its `model_type` names. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import ConfigError
from gte_deploy.core.spec import TaskName
from gte_deploy.models.adapters import Places, places_of
from gte_deploy.models.families import family_of_fields
from gte_deploy.models.families.base import Family
from gte_deploy.models.fields import check_fields
from gte_deploy.models.folder import CheckpointFiles
from gte_deploy.models.modules import reranker_activation
from gte_deploy.models.multi_vector_modules import is_multi_vector
from gte_deploy.models.reading import read_required_json
from gte_deploy.models.sparse_modules import is_sparse_encoder
from gte_deploy.models.weight_files import tensor_names

if TYPE_CHECKING:
    from transformers import GteConfig, PreTrainedConfig


def task_of(folder: str | Path) -> TaskName:
    """Return the task that a checkpoint was trained for, one of gte_deploy.core.spec.TASK_NAMES. Needs no torch.

    Supported modules of a SparseEncoder make it "sparse", and those of PyLate, of MultiVectorEncoder or of Stanford's
    ColBERT "multi-vector". A Pooling module of sentence-transformers (modules.json)
    makes it "embed", whatever head is stored (gte-multilingual-base stores a token-weight head). Otherwise
    `architectures` decides, and without that the names of the tensors. A pooling in config.json
    (`Family.pooling_field`) makes "embed" of "fill-mask".

    Raises:
        CheckpointError: the folder holds no checkpoint.
        ConfigError: no family has the model type, `architectures` names a head that the family lacks, or nothing says
            what the stored classifier is for.
    """
    files = CheckpointFiles(folder)
    return task_of_files(files, places_of(files))


def task_of_files(files: CheckpointFiles, places: Places) -> TaskName:
    """Return the task of a checkpoint whose parts are known; see `task_of`."""
    file = places.config / "config.json"
    raw = read_required_json(file)
    if is_sparse_encoder(files.path, places.sparse):
        return "sparse"
    if is_multi_vector(files):
        return "multi-vector"
    if any(module.kind == "Pooling" for module in files.modules or ()):
        return "embed"
    family = family_of_fields(raw, file)
    task = _task_of_architecture(raw, file, family) if raw.get("architectures") else task_of_tensors(places)
    is_embedder = family.pooling_field is not None and bool(raw.get(family.pooling_field))
    return "embed" if is_embedder and task == "fill-mask" else task


def _task_of_architecture(raw: Mapping[str, Any], file: Path, family: Family) -> TaskName:
    names, known = raw["architectures"], family.architectures
    task = known.get(str(names[0])) if isinstance(names, list) else None
    if task is None:
        raise ConfigError(f"{file}: architectures is {names!r}; this package knows {', '.join(known)}")
    return task


def task_of_tensors(places: Places) -> TaskName:
    """Return the task of the stored head, from the names of the stored tensors, whatever modules are listed.

    Raises:
        ConfigError: the names fit a classifier of texts and one of tokens, and config.json does not say which it is.
    """
    names = [name for file in places.weight_files for name in tensor_names(file)]
    file = places.config / "config.json"
    raw = read_required_json(file)
    family = family_of_fields(raw, file)
    if family.has_head(names, "fill-mask"):
        return "fill-mask"
    if not family.has_head(names, "classify") and not family.has_head(names, "token-classify"):
        return "embed"
    return family.classifier_task(names) or _classifier_in_config(raw, family, file, places)


def _classifier_in_config(raw: Mapping[str, Any], family: Family, file: Path, places: Places) -> TaskName:
    """The task of a classifier, from what config.json says; for stored tensors that fit both kinds.

    Raises:
        ConfigError: it does not say it; the message names the field that would.
    """
    architectures = raw.get("architectures")
    named = (
        family.architectures.get(str(architectures[0])) if isinstance(architectures, list) and architectures else None
    )
    if named is not None and named in ("classify", "token-classify"):
        return named
    # transformers writes problem_type for classifiers of texts alone; the activation is that of a CrossEncoder.
    if raw.get("problem_type") is not None or reranker_activation(places.config) is not None:
        return "classify"
    expected = " or ".join(family.classes[kind] for kind in ("classify", "token-classify"))
    raise ConfigError(
        f"{file}: architectures is {architectures!r}; expected {expected}, because the tensors of both may be the "
        "same. Name the task, as in `--task classify`."
    )


def read_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Read `folder`/config.json in any layout of any family; `overrides` replace some of its fields.

    Raises:
        CheckpointError: there is no config.json.
        ConfigError: a field is missing, malformed or not supported by the model; the message names the field.
    """
    file = Path(folder) / "config.json"
    raw = read_required_json(file) | dict(overrides or {})
    family = family_of_fields(raw, file)
    check_fields(raw, file, family.fields)
    return family.read_config(raw, file)


def build_config(name: str) -> GteConfig:
    """Build the config of a preset, to train a model from scratch. Every preset is of the GTE family."""
    from gte_deploy.models.families.gte import preset_config

    return preset_config(name)
