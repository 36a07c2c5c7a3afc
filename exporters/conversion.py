"""Converts a checkpoint between the layout of transformers ("native") and the family's own one ("original")."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gte_deploy.core.errors import CheckpointError, ExportError, require_modules
from gte_deploy.core.files import sync_tree, write_with
from gte_deploy.core.options import check_choice
from gte_deploy.exporters.bundle.writer import check_destination, publish, staging
from gte_deploy.exporters.job import Progress
from gte_deploy.exporters.layouts import FLOAT_TYPES, KEPT, LAYOUTS
from gte_deploy.models import CHECKPOINT_PATTERNS, require_checkpoint, resolve_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gte_deploy.models.adapters import Places

# Graphs and engines of other tools, and what git and huggingface_hub keep: no part of the checkpoint itself.
_OTHER_FOLDERS = ("onnx", "openvino", "tensorrt")


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Args:
        path: its folder.
        layout: "native" or "original".
        model_class: name of the class in transformers that holds its weights.
        dtype: the type of its weights.
        tensors: number of stored tensors.
        left_out: files of the source that were not copied: code, pickles, and files of other tools.
    """

    path: Path
    layout: str
    model_class: str
    dtype: str
    tensors: int
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """Say for people what was written, and what was not."""
        left = f"\nleft out: {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"{self.path}: {self.model_class} in the {self.layout} layout, {self.tensors} tensors, {self.dtype}{left}"
        )


def convert(
    model: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    layout: str,
    dtype: str = KEPT,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint in another layout; it gives the same answers, and every stored weight is kept.

    The tokenizer, modules.json with its folders, prompts, the card and the licence are copied. The result is read back
    and compared with the source, bit for bit, before the folder gets its name.

    Args:
        model: checkpoint folder, hub id `owner/name[@revision]` or preset name; None for the built-in model.
        output: folder of the result; it must be empty or missing.
        layout: "native" loads with transformers alone; "original" is what text-embeddings-inference and the published
            remote code read.
        dtype: type of the stored weights, one of `FLOAT_TYPES`, or "keep".
        progress: called with one line at every step.

    Raises:
        InputError: layout or dtype is unknown.
        ConfigError: the layout cannot express a field of the config; the message names it.
        CheckpointError: the checkpoint cannot be read, holds an adapter, has weights of several types that cannot be
            kept, or its family lacks the layout.
        OutputExistsError: the output must not be replaced.
        MissingDependencyError: the [export] extra is not installed.
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("dtype", dtype, (KEPT, *FLOAT_TYPES))
    require_modules("torch", "transformers", "safetensors", extra="export")
    report = progress or (lambda line: None)
    report("read the checkpoint")
    destination = Path(os.path.realpath(output))
    require_checkpoint(model)
    check_destination(destination, force=False)
    source = resolve_checkpoint(model)
    places = _places(source)
    loaded = _load(source, places, dtype)
    with staging(destination, force=False) as folder:
        report(f"write the {layout} layout")
        copied, left_out = _partition(source, places)
        for name in copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_with(folder / name, partial(shutil.copyfile, source / name))
        tensors = _write_model(loaded, folder / places.model.relative_to(source), layout)
        report("read it back, and compare every weight")
        _compare(loaded, folder, _places(folder))
        sync_tree(folder)
        publish(folder, destination, force=False)
    kind = str(loaded.dtype).removeprefix("torch.")
    return Conversion(Path(output), layout, type(loaded).__name__, kind, tensors, tuple(left_out))


def _places(folder: Path) -> "Places":
    from gte_deploy.models.adapters import places_of
    from gte_deploy.models.folder import CheckpointFiles

    places = places_of(CheckpointFiles(folder))
    if places.adapter is not None:
        raise CheckpointError(
            f"{folder} holds an adapter, which no layout stores in the weights. Merge it with peft "
            "(merge_and_unload, save_pretrained), and convert the result."
        )
    return places


def _load(folder: Path, places: "Places", dtype: str) -> "PreTrainedModel":
    """Load the weights with whatever head is stored, in the type to be written."""
    import torch

    from gte_deploy.models.checkpoint import load_model
    from gte_deploy.models.config import task_of_tensors
    from gte_deploy.models.folder import CheckpointFiles
    from gte_deploy.models.multi_vector_modules import is_multi_vector

    files = CheckpointFiles(folder)
    late = is_multi_vector(files)
    if late and not files.modules:
        raise CheckpointError(
            f"{folder} has the projection of Stanford's ColBERT among its weights, which no other layout has. Load it "
            "with PyLate, save it, and convert the result."
        )
    found = _stored_type(places) if dtype == KEPT else dtype
    loaded = load_model(folder, task="multi-vector" if late else task_of_tensors(places), dtype=getattr(torch, found))
    for name in ("sentence_projection", "token_projection"):
        if hasattr(loaded, name):
            delattr(loaded, name)  # Dense modules, which have files of their own
    lost = [name for name, tensor in loaded.state_dict().items() if not torch.isfinite(tensor).all()]
    if lost:
        raise CheckpointError(f"{folder}: in {found}, {', '.join(lost[:5])} have values that are not finite")
    return loaded


def _stored_type(places: "Places") -> str:
    from gte_deploy.models.config import read_config
    from gte_deploy.models.families import family_of
    from gte_deploy.models.stored_tensors import open_tensors

    names = family_of(read_config(places.config)).tensors
    with ExitStack() as stack:
        stored = open_tensors(places.weight_files, stack)
        types = {tensor.dtype for name, tensor in stored.items() if not names.is_derived(name)}
    known = [name for name, code in FLOAT_TYPES.items() if types == {code}]
    if not known:
        raise CheckpointError(
            f"{places.weights} has weights of the types {', '.join(sorted(types))}; one type can be kept. Choose it "
            f"with --dtype {'|'.join(FLOAT_TYPES)}."
        )
    return known[0]


def _partition(source: Path, places: "Places") -> tuple[list[str], list[str]]:
    """Return the files to copy and those to leave out, relative to the checkpoint, besides its config and weights."""
    written = {places.config / "config.json", *places.weight_files}
    written |= set(places.weights.glob("model*.safetensors*"))
    copied: list[str] = []
    left_out: list[str] = []
    for file in _files(source):
        name = file.relative_to(source)
        if file not in written:
            is_data = any(fnmatch(name.name, pattern) for pattern in CHECKPOINT_PATTERNS)
            keep = is_data and name.parts[0] not in _OTHER_FOLDERS
            (copied if keep else left_out).append(name.as_posix())
    return copied, left_out


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _write_model(model: "PreTrainedModel", folder: Path, layout: str) -> int:
    from gte_deploy.models.checkpoint import save_model
    from gte_deploy.models.weight_files import WEIGHTS, tensor_names

    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, layout=layout)
    return len(tensor_names(folder / WEIGHTS))


def _compare(model: "PreTrainedModel", folder: Path, places: "Places") -> None:
    """Load the result, and compare its weights with those of the source."""
    import torch

    written: Mapping[str, torch.Tensor]
    again = _load(folder, places, KEPT)
    written, wanted = again.state_dict(), model.state_dict()
    differ = [name for name in wanted if name not in written or not torch.equal(wanted[name], written[name])]
    differ += [name for name in written if name not in wanted]
    if type(again) is not type(model) or differ:
        raise ExportError(f"the converted checkpoint differs from its source in {', '.join(differ[:5]) or 'its class'}")
