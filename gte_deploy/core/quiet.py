"""What the libraries underneath would do unasked: tell their makers, start processes, write into the home folder.

`import gte_deploy` turns off what a variable turns off; the rest is done where such a library is imported.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gte_deploy.core.errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

_TELEMETRY_OFF = {
    # From 1.29 on, ONNX Runtime for Linux tells Microsoft of its sessions (names and hashes of models, the device),
    # unless this is set before it is imported.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Each makes its folder as it is imported: in the folder for temporary files under the user's name, which an unknown
# user does not have, and in ~/.config.
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "MPLCONFIGDIR": "matplotlib"}
_OPENVINO_TELEMETRY = "openvino_telemetry"


def turn_off_telemetry() -> None:
    """Set the variables that turn telemetry off; what the user has set stays."""
    for name, value in _TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


def keep_caches_in_ours() -> None:
    """Let PyTorch and Matplotlib make their caches in ours; to be called before either is imported.

    Without a home folder, or where it cannot be written, that is a temporary folder, gone at the end of the process.
    What the user has set stays.
    """
    missing = [variable for variable in _CACHES if variable not in os.environ]
    folder = _writable_folder() if missing else None
    for variable in missing:
        if folder is not None:
            os.environ[variable] = str(folder / _CACHES[variable])


@contextlib.contextmanager
def without_openvino_telemetry() -> Iterator[None]:
    """Around the first import of openvino or nncf in a process: it is silent from then on.

    `import openvino` sends an event: it looks up an analytics host, forks, and writes an id into the home folder. It
    does without where the package openvino_telemetry is not installed, and so it seems to be in here. A user's own
    import of that package before or after is not affected.
    """
    absent = object()
    known: Any = sys.modules.get(_OPENVINO_TELEMETRY, absent)
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say that there is none
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

    from gte_deploy.core.files import cache_folder

    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    try:
        folder = Path(tempfile.mkdtemp(prefix="gte-deploy-"))
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
