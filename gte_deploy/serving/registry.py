"""The models of a server by their names, and whether they are loaded."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gte_deploy.core.errors import InputError
from gte_deploy.model import Model
from gte_deploy.serving.failures import RequestError, unhealthy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, under the name that requests call it by.

    Args:
        name: the name.
        model: the model.
        loaded_at: when it was loaded, in seconds since the epoch.
    """

    name: str
    model: Model
    loaded_at: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for places of tokens in a text."""
        return self.model.tokenizer.backend_tokenizer

    @cached_property
    def info(self) -> dict[str, Any]:
        """The facts about the model, which do not change."""
        return self.model.info()


Suits = Callable[[ServedModel], bool]
"""Whether a model can answer a route."""


class Registry:
    """The models of a server. They load in the background; until they all are, every request for one is refused."""

    def __init__(self, sources: Mapping[str, Callable[[], Model]], *, warm_up: bool = True) -> None:
        """Take the functions that load the models, by the models' names.

        Args:
            sources: name -> function that loads the model.
            warm_up: whether each model runs typical batches before it counts as loaded.
        """
        if not sources:
            raise InputError("there is no model to serve; give at least one bundle")
        self._sources = dict(sources)
        self._warm_up = warm_up
        self._served: dict[str, ServedModel] = {}
        self._lock = threading.Lock()
        self.on_load: Callable[[ServedModel], None] = lambda served: None
        """Called with each model before it answers requests."""
        self._is_ready = False
        self._is_ending = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the command line."""
        return tuple(self._sources)

    @property
    def is_ready(self) -> bool:
        """Whether every model is loaded, and the server does not end."""
        return self._is_ready and not self._is_ending

    def load(self) -> None:
        """Load the models; once they are there, do nothing.

        Raises:
            GteDeployError: a model cannot be loaded; those before it stay loaded until `close`.
        """
        for name, source in self._sources.items():
            if self._is_ready or self._is_ending:
                return
            started = time.perf_counter()
            model = source()
            with self._lock:
                if self._is_ending:
                    model.close()
                    return
                self._served[name] = ServedModel(name, model)
            if self._warm_up:
                model.warm_up()
            self.on_load(self._served[name])
            logger.info("%s is loaded from %s in %.1f s", name, model.path, time.perf_counter() - started)
        self._is_ready = True

    def end(self) -> None:
        """Refuse requests from now on."""
        self._is_ending = True

    def close(self) -> None:
        """Free the models. Idempotent."""
        self.end()
        with self._lock:
            served = list(self._served.values())
            self._served.clear()
        for each in served:
            each.model.close()

    def all(self) -> list[ServedModel]:
        """Return the models.

        Raises:
            RequestError: they are not loaded yet, or the server ends.
        """
        if self._is_ending:
            raise unhealthy("the server is shutting down; send the request to another one")
        if not self._is_ready:
            missing = [name for name in self._sources if name not in self._served]
            what = f"loads {missing[0]}" if missing else "warms its models up"
            raise unhealthy(f"the server {what}; /ready answers with status 200 when requests can be sent")
        return list(self._served.values())

    def choose(self, name: str | None, suits: Suits, needs: str) -> ServedModel:
        """Return the model of that name, or the first that suits; `needs` is the beginning of an error message.

        Raises:
            RequestError: there is no such model, or it does not suit; the message names one that does.
        """
        models = self.all()
        able = [served for served in models if suits(served)]
        if name is None:
            if able:
                return able[0]
            has = ", ".join(f"{served.name} ({served.model.spec.task})" for served in models)
            raise RequestError(424, f"{needs}; this server has {has}", "Backend")
        found = self.named(name)
        if found not in able:
            hint = f"use {', '.join(served.name for served in able)}" if able else "this server has none"
            message = f"{needs}, and {name} is made for {found.model.spec.task}; {hint}"
            raise RequestError(424, message, "Backend", field="model")
        return found

    def named(self, name: str) -> ServedModel:
        """Return the model of that name.

        Raises:
            RequestError: there is none, or the models are not loaded yet.
        """
        found = next((served for served in self.all() if served.name == name), None)
        if found is None:
            message = f"there is no model {name!a}; this server has {', '.join(self.names)}"
            raise RequestError(404, message, field="model")
        return found


def named_sources(bundles: Sequence[str]) -> dict[str, str]:
    """Return name -> model from `NAME=MODEL` or `MODEL`, whose name is then its last part.

    Raises:
        InputError: a name is empty or given twice.
    """
    found: dict[str, str] = {}
    for bundle in bundles:
        name, separator, source = bundle.partition("=")
        if not separator:
            # `owner/name@revision` has the name "name"; "." has the name of the folder.
            source = bundle
            name = (Path(bundle).name or Path(bundle).resolve().name).partition("@")[0]
        if not name or not source:
            raise InputError(f"{bundle!r} has no name or no model; expected MODEL or NAME=MODEL")
        if name in found:
            raise InputError(f"two models are called {name!r}; give each a name of its own: NAME=MODEL")
        found[name] = source
    return found


def describe(served: ServedModel, routes: Sequence[str]) -> dict[str, Any]:
    """Return the facts about a model that `/info` and `/v1/models` show. They have no path of the server's disk."""
    spec, model = served.model.spec, served.model
    return {
        "name": served.name,
        "checksum": model.checksum,
        "task": spec.task,
        "routes": list(routes),
        "backend": model.backend,
        "precision": served.info["precision"],
        "device": model.device,
        "max_length": model.max_seq_length,
        "embedding_size": model.get_embedding_dimension() if spec.task in ("embed", "hybrid", "fill-mask") else None,
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "labels": [spec.id2label[number] for number in sorted(spec.id2label)],
        "mask_token": model.tokenizer.mask_token if spec.task == "fill-mask" else None,
    }
