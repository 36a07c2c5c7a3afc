"""Finds the weight files of a checkpoint folder, and says what a folder without weights holds instead. No torch."""

import json
import os
from pathlib import Path

from gte_deploy.core.errors import CheckpointError
from gte_deploy.core.files import is_special, read_json_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# The ends of the names that a reader of checkpoints opens.
_READ = (".json", ".safetensors", ".txt", ".model", ".metadata", ".jinja")
_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TO_SAFETENSORS = (
    'If you trust its source, convert it: python -c "import torch; from safetensors.torch import save_file; s = '
    "torch.load('{name}', weights_only=True); save_file({{k: v.clone().contiguous() for k, v in s.items()}}, "
    "'{target}', metadata={{'format': 'pt'}})\""
)
# Other formats that people find in a folder, and what to do about them.
_OTHER_FORMATS = {
    "*.gguf": "GGUF weights, quantised for llama.cpp; take the checkpoint that they were converted from",
    "*.onnx": "an ONNX graph; load a bundle of gte-export instead, or take the checkpoint that it was exported from",
    "*.h5": "TensorFlow weights; load them with transformers and save_pretrained",
    "*.msgpack": "Flax weights; load them with transformers and save_pretrained",
    "openvino_model.xml": "an OpenVINO model; take the checkpoint that it was converted from",
}


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a checkpoint; for shards, with the tensor names that the index gives to each.

    Raises:
        CheckpointError: there are no weights (the message names what the folder holds instead, and the command that
            helps), a file is a Git LFS pointer, or the index names a file that does not exist.
    """
    if (folder / WEIGHTS).exists():
        refuse_pointer(folder / WEIGHTS)
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}; {_found_instead(folder)}")
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{folder / INDEX} names the shard {file!r}, which is not a file in {folder}")
        refuse_pointer(folder / file)
        files[folder / file] = {name for name, shard in weight_map.items() if shard == file}
    return files


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights of a whole model."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def refuse_irregular(folder: Path) -> None:
    """Refuse a folder that has a pipe, a socket or a device under a name that some reader would open.

    Raises:
        CheckpointError: the message names it.
    """
    try:
        names = [name for name in os.listdir(folder) if name.endswith(_READ)]
    except OSError:
        return  # there is no such folder, which its readers tell
    for name in names:
        _refuse_irregular_file(folder / name)


def _refuse_irregular_file(file: Path) -> None:
    try:
        special = is_special(file)
    except OSError as error:  # links in a circle, or a folder of somebody else
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if special:
        raise CheckpointError(f"{file} is a pipe, a socket or a device, not a file. Copy the checkpoint again.")


def refuse_pointer(file: Path) -> None:
    """Refuse a file that is only the pointer of Git LFS, or that is no regular file.

    Raises:
        CheckpointError: the file is a pointer, a pipe, a socket or a device.
    """
    _refuse_irregular_file(file)
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return  # the caller's own read raises the error
    if is_pointer:
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file itself. Fetch it in that folder: git lfs install && git lfs "
            "pull; or download the checkpoint again with: hf download OWNER/NAME"
        )


def refuse_pickle(folder: Path, safe: str) -> None:
    """Refuse a folder in which `safe`, a safetensors file, is missing.

    Raises:
        CheckpointError: it is missing; a pickle beside it is named with the command that converts it.
    """
    refuse_pointer(folder / safe)
    if not (folder / safe).is_file():
        raise CheckpointError(f"{folder} has no {safe}; {_found_instead(folder, safe)}")


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is missing or its header is damaged.
    """
    refuse_pointer(file)
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 0 < size <= file.stat().st_size - 8:
                raise ValueError(f"its header claims {size:,} bytes")
            header = json.loads(stream.read(size))
        if not isinstance(header, dict):
            raise ValueError(f"its header is {type(header).__name__}, not an object")
        return [name for name in header if name != "__metadata__"]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}). Copy it again.") from error


def _found_instead(folder: Path, target: str = WEIGHTS) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"weights found: only {', '.join(pickles)}, which are pickles and are never loaded. "
            + _TO_SAFETENSORS.format(name=pickles[0], target=target)
        )
    for pattern, what in _OTHER_FORMATS.items():
        if found := sorted(file.name for file in folder.glob(pattern)):
            return f"found: {found[0]}, {what}."
    if (name := _hub_id(folder)) is not None:
        return (
            f"weights found: none in what was downloaded of {name}. Pickles (*.bin) are never downloaded, because "
            "loading one can run code. If its files on the hub have only pickles, and you trust them: `hf download "
            f"{name} --local-dir FOLDER`; then give FOLDER, and the error says how to convert them."
        )
    return "weights found: none. Copy or download the checkpoint again."


def _hub_id(folder: Path) -> str | None:
    """Return the id of a folder in the cache of huggingface_hub, models--owner--name/snapshots/COMMIT."""
    *_, name, kind, _ = ("", "", "", *folder.parts)
    return name.removeprefix("models--").replace("--", "/") if kind == "snapshots" and "models--" in name else None
