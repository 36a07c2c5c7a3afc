"""The options of `gte-export` that are not those of an export: arguments of its commands, and the output's fate."""

from dataclasses import dataclass
from pathlib import Path

from gte_deploy.core.options import option, required
from gte_deploy.exporters.layouts import FLOAT_TYPES, KEPT, LAYOUTS


@dataclass(frozen=True)
class ReplaceOptions:
    """Whether an output that is there already is replaced."""

    force: bool = option(False, "replace a bundle that is there already")


@dataclass(frozen=True)
class UploadOptions:
    """What happens to the verified bundle."""

    push_to_hub: str | None = option(
        None,
        "push the verified bundle to this repository of the Hugging Face hub, owner/name[@branch]",
        metavar="REPO",
    )
    private: bool = option(False, "make a new repository private")


@dataclass(frozen=True)
class CheckArguments:
    """Arguments of `gte-export check`."""

    check_repository: Path = required("folder of the repository", positional=True, metavar="DIR", parse=Path)


@dataclass(frozen=True)
class AdoptArguments:
    """Arguments of `adopt`."""

    plan: Path = required("file of the engine, for example model.plan", positional=True, metavar="PLAN", parse=Path)
    bundle: Path = required(
        "folder of the bundle, written with --format trt --onnx-only", positional=True, metavar="BUNDLE", parse=Path
    )
    device: str = option("cuda", "the GPU of the engine", metavar="cuda:N")
    force: bool = option(False, "replace the engine that the bundle has")


@dataclass(frozen=True)
class ConvertArguments:
    """Arguments of `convert`."""

    model: str = required(
        "checkpoint folder, preset name, or hub id owner/name[@revision]", positional=True, metavar="MODEL"
    )
    output: str = required("folder of the result; empty or missing", positional=True, metavar="OUTPUT")
    layout: str = required(
        "native: transformers reads it alone; original: text-embeddings-inference and the published code read it",
        choices=LAYOUTS,
    )
    dtype: str = option(KEPT, "type of the stored weights", choices=(KEPT, *FLOAT_TYPES))
