"""npm packages that open bundles, in Node.js and in Chromium, and axe-core: installed once, kept.

    python tests/support/javascript.py    # install them in build/environments/javascript; nothing to do when repeated

The versions are those of tests/consumers/javascript/package-lock.json; the packages take 630 MB. There,
`onnxruntime-web-release` is a release of onnxruntime-web; transformers.js brings a development version under the usual
name. No script of a package runs: that of onnxruntime-node would fetch CUDA libraries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from environments import FOLDER, Unavailable

SOURCES = Path(__file__).resolve().parents[1] / "consumers" / "javascript"
"""The scripts, the page for browsers, and the list of packages."""
ENVIRONMENT = FOLDER / "javascript"

_LOCK = "package-lock.json"
_DONE = "installed.json"
_FAILED = "failed.txt"
_MINUTES = 15
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def install() -> Path:
    """Install the packages, unless they are there in these versions, and return the folder that has node_modules.

    Raises:
        Unavailable: Node.js is missing, or npm cannot install them; the message is npm's. `installed` repeats it.
    """
    if _is_done():
        return ENVIRONMENT
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    ENVIRONMENT.mkdir(parents=True)
    try:
        _npm_ci()
    except Unavailable as error:
        (ENVIRONMENT / _FAILED).write_text(str(error), encoding="utf-8")
        raise
    shutil.copyfile(SOURCES / _LOCK, ENVIRONMENT / _DONE)
    return ENVIRONMENT


def installed() -> Path:
    """Return the folder that has node_modules.

    Raises:
        Unavailable: the packages are not installed; the message is npm's, or names the command that installs them.
    """
    if _is_done():
        return ENVIRONMENT
    failed = ENVIRONMENT / _FAILED
    if failed.is_file():
        raise Unavailable(f"npm could not install the packages: {failed.read_text(encoding='utf-8')}")
    raise Unavailable("it needs packages of npm: python tests/support/javascript.py")


def browser() -> str:
    """Return the path of Chromium: that of the environment variable CHROMIUM, or one on the PATH.

    Raises:
        Unavailable: there is none.
    """
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        raise Unavailable("there is no Chromium: apt-get install chromium, or set CHROMIUM to its path")
    return found


def _is_done() -> bool:
    done = ENVIRONMENT / _DONE
    return done.is_file() and done.read_bytes() == (SOURCES / _LOCK).read_bytes()


def _npm_ci() -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise Unavailable("there is no Node.js (20 or later): apt-get install nodejs npm")
    for name in ("package.json", _LOCK):
        shutil.copyfile(SOURCES / name, ENVIRONMENT / name)
    npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        ended = subprocess.run(npm, cwd=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=_MINUTES * 60)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"npm took longer than {_MINUTES} minutes") from error
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("npm error")]
        raise Unavailable(" ".join(lines) or f"npm ended with {ended.returncode}")


if __name__ == "__main__":
    try:
        print(install())
    except Unavailable as error:
        sys.exit(str(error))
