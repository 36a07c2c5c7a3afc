"""Installs extras of this checkout with pip, and shows how far it is: packages, megabytes, seconds.

    .venv/bin/python tools/install.py 'about 3 GB' '.[dev]'

The first argument says how much is coming. What pip says goes to build/install.log; its end is shown if pip fails.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

LOG = Path(__file__).resolve().parents[1] / "build" / "install.log"
_SECONDS_BETWEEN_LINES = 30
_LINES_OF_A_FAILURE = 30
_UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}
# "  Downloading numpy-2.4.6-cp311-cp311-manylinux_2_27_x86_64.whl (16.8 MB)"
_SIZED = re.compile(r"(?:Downloading|Using cached) \S+ \((\d+(?:\.\d+)?) ([kMG]B)\)")


def progress(lines: Iterable[str]) -> Iterator[str]:
    """Yield what is done, after each line of pip's output."""
    packages, megabytes, state = 0, 0.0, "looking up packages"
    for line in lines:
        if line.startswith("Collecting "):
            packages += 1
        elif sized := _SIZED.search(line):
            megabytes += float(sized[1]) * _UNITS[sized[2]]
        elif line.startswith("Installing collected packages"):
            state = "unpacking them"
        elif line.startswith("Successfully installed"):
            state = "done"
        yield f"{packages} packages, {megabytes:,.0f} MB, {state}"


def main(size: str, *requirements: str) -> int:
    """Install the requirements in this environment; return pip's exit code."""
    LOG.parent.mkdir(exist_ok=True)
    what = " ".join(requirements)
    print(f"Installing {what} into {sys.prefix}: {size}, once. pip's messages are in {LOG}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += [word for one in requirements for word in (("--editable", one) if one.startswith(".") else (one,))]
    started = shown = time.monotonic()
    done = ""
    is_terminal = sys.stderr.isatty()
    with (
        LOG.open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        assert pip.stdout is not None

        def logged(lines: Iterable[str]) -> Iterator[str]:
            for line in lines:
                log.write(line)
                yield line

        for done in progress(logged(pip.stdout)):
            now = time.monotonic()
            if is_terminal:
                print(f"\r\x1b[K{done}, {now - started:.0f} s", end="", file=sys.stderr, flush=True)
            elif now - shown >= _SECONDS_BETWEEN_LINES:
                print(f"{done}, {now - started:.0f} s", file=sys.stderr, flush=True)
                shown = now
    end = "\n" if is_terminal else ""
    if pip.returncode != 0:
        tail = "".join(LOG.read_text(encoding="utf-8").splitlines(keepends=True)[-_LINES_OF_A_FAILURE:])
        print(f"{end}{tail}pip could not install {what}", file=sys.stderr)
    else:
        print(f"{end}installed in {time.monotonic() - started:.0f} s: {done}", file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
