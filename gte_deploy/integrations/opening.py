"""The model of an adapter: opened from its name, and named again for a file that describes a pipeline."""

import os
from typing import Any

from gte_deploy.tasks.interface import TextInterface

AnyModel = TextInterface | str | os.PathLike[str]
"""A model, what `gte_deploy.load` takes, or the URL of a Triton server."""

_PROTOCOLS = ("http://", "https://", "grpc://", "grpcs://")


def opened(model: AnyModel, options: dict[str, Any] | None = None) -> TextInterface:
    """Return the model itself, or open it with these options of `gte_deploy.load` or `triton.Client`."""
    if isinstance(model, TextInterface):
        return model
    name = os.fspath(model)
    if name.startswith(_PROTOCOLS):
        from gte_deploy.triton import Client

        return Client(name, **(options or {}))
    from gte_deploy.loading import load

    return load(name, **(options or {}))


def name_of(model: AnyModel) -> str:
    """Return the path, name or URL that `opened` opens the same model from."""
    return model.name if isinstance(model, TextInterface) else os.fspath(model)


def call_options(given: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options of each call: long texts are cut, as the frameworks expect, unless `given` says otherwise."""
    return {"truncation": True, **(given or {})}
