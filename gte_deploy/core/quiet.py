"""Stops libraries from sending telemetry, starting processes and writing into the home folder.

`import gte_deploy` sets the variables that turn this off. For libraries without a variable, the code that imports them
uses the functions of this module.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from gte_deploy.core.errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

_TELEMETRY_OFF = {
    # From 1.29 on, ONNX Runtime for Linux sends facts about its sessions (names and hashes of models, the device) to
    # Microsoft, unless this variable is set before the import.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Each library creates a folder when it is imported: PyTorch in the folder for temporary files, under the user's name,
# which an unknown user does not have; Matplotlib in ~/.config.
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "MPLCONFIGDIR": "matplotlib"}
_OPENVINO_TELEMETRY = "openvino_telemetry"

logger = logging.getLogger(__name__)


def turn_off_telemetry() -> None:
    """Set the variables that turn telemetry off. Variables that the user set stay unchanged."""
    for name, value in _TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


def keep_caches_in_ours() -> None:
    """Put the caches of PyTorch and Matplotlib into ours; call it before either is imported.

    If there is no writable home folder, or another user can have written the cache, they go into a temporary folder
    that is removed when the process ends. Variables that the user set stay unchanged.
    """
    missing = [variable for variable in _CACHES if variable not in os.environ]
    folder = _writable_folder() if missing else None
    for variable in missing:
        if folder is not None:
            os.environ[variable] = str(folder / _CACHES[variable])


@contextlib.contextmanager
def without_openvino_telemetry() -> Iterator[None]:
    """A `with` block for the first import of openvino or nncf, which then send no telemetry in this process.

    `import openvino` sends an event: it looks up an analytics host, forks, and writes an id into the home folder. It
    sends nothing if the package openvino_telemetry is not installed; inside this block that seems to be the case. The
    user's own imports of that package, before or after, are not affected.
    """
    absent = object()
    known: Any = sys.modules.get(_OPENVINO_TELEMETRY, absent)
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # so that Python finds no such module
    try:
        yield
    finally:
        del sys.modules[_OPENVINO_TELEMETRY]
        if known is not absent:
            sys.modules[_OPENVINO_TELEMETRY] = known


def import_openvino() -> Any:
    """The module openvino, imported without its telemetry.

    Raises:
        MissingDependencyError: openvino is not installed.
        BackendError: it is installed and cannot be imported.
    """
    try:
        with without_openvino_telemetry():
            import openvino
    except ModuleNotFoundError as error:
        raise MissingDependencyError("openvino", "openvino") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(f"openvino is installed and cannot be imported: {error}") from error
    return openvino


def _writable_folder() -> "Path | None":
    import atexit
    import shutil
    import tempfile
    from pathlib import Path

    from gte_deploy.core.own_cache import own_cache_folder

    try:
        folder = own_cache_folder()  # PyTorch executes what it finds there
        if os.access(folder, os.W_OK):
            return folder
    except OSError as error:
        logger.info("the caches of PyTorch and Matplotlib last as long as this process: %s", error)
    try:
        folder = Path(tempfile.mkdtemp(prefix="gte-deploy-"))
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def quiet_libraries(stdout: TextIO) -> Iterator[None]:
    """Silence Python warnings and log messages up to WARNING, and send what libraries print to `stdout`."""
    previous = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(stdout):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
