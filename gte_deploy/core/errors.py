"""Typed errors. Every message says what was received, what was expected and what to do next."""

import importlib.util

from gte_deploy.core.install import install_command


class GteDeployError(Exception):
    """The base class of every error that gte-deploy raises on purpose.

    `advice` is the part of the message that says what to do next, such as a command to run; empty where the message
    has no such part of its own.
    """

    advice: str = ""

    def __init__(self, message: str = "", *, advice: str = "") -> None:
        super().__init__(f"{message} {advice}" if advice else message)
        self.advice = advice


class InputError(GteDeployError, ValueError):
    """A text, argument or tensor from the caller is not acceptable; the message names its index and the limit."""


class TooLongError(InputError):
    """A text, or the texts of a pair together, have more tokens than the model takes."""

    def __init__(self, index: int, excess: str, *, first_fits: bool = True) -> None:
        """Take the number of the input, what is said of it, and whether the first text of a pair fits alone."""
        super().__init__(f"input {index} {excess}")
        self.index = index
        self.first_fits = first_fits
        self._excess = excess

    def of(self, name: str) -> InputError:
        """The same error of an input with a name, such as "the query"."""
        return InputError(f"{name} {self._excess}")


class ConfigError(GteDeployError, ValueError):
    """A config.json asks for something that this package does not support, or lacks a field that it needs."""


class CheckpointError(GteDeployError, ValueError):
    """A checkpoint is missing, unreadable, or its tensors do not match the architecture."""


class BundleError(GteDeployError, ValueError):
    """A bundle is missing, incomplete, altered, or of another format version."""


class SignatureError(BundleError):
    """A trusted key is asked for, and none has signed the bundle as it is; nothing of it was read but its manifest."""


class ExportError(GteDeployError, RuntimeError):
    """An export could not be completed: a pass did not match as the architecture requires, or a target refused."""


class OutputExistsError(InputError, ExportError):
    """The output exists already, and may not be replaced; the message says what replaces it, or to choose another."""


class ParityError(ExportError):
    """An exported graph differs from PyTorch by more than the bound of its precision."""


class BackendError(GteDeployError, RuntimeError):
    """A backend could not be opened or failed while running."""


class NonFiniteError(BackendError):
    """A model computed NaN or Inf; no result of that batch is returned."""


class SpikeError(GteDeployError, RuntimeError):
    """A training run stopped itself at a spike of its loss or gradient norm, as its recipe asks."""


class UnavailableError(BackendError):
    """A server cannot be reached, is overloaded, or did not answer in time; the same call may succeed later."""


class UnreachableError(UnavailableError, ConnectionError):
    """No connection to a server: it refuses one, or its host has no such name or no route; check the URL."""


class NoAnswerError(UnavailableError, TimeoutError):
    """A server was reached, and its answer did not come in time."""


class OverloadedError(UnavailableError):
    """So many tokens wait that the call was refused at once: more than may wait, or more than its deadline allows.

    `retry_after_s` estimates when they are computed.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(UnavailableError):
    """The deadline of a call passed; nothing of it waits any more."""


class CancelledCallError(GteDeployError, RuntimeError):
    """The caller has cancelled the call; nothing of it waits any more."""


class MissingDependencyError(GteDeployError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, module: str, extra: str, advice: str = "") -> None:
        message = f"{module!r} is not installed, and this needs it: {install_command(extra)}"
        super().__init__(f"{message}. {advice}" if advice else message)


def require_modules(*modules: str, extra: str) -> None:
    """Refuse to begin work whose packages are not there, without importing them.

    Raises:
        MissingDependencyError: one of the modules is not installed; the message names the extra.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, extra)
