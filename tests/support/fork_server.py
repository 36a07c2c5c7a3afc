"""Kills work at a chosen moment: a process that has imported everything, and forks a child for each piece of work.

A kill then costs what the killed work costs, and not an interpreter. `ForkServer` is for tests. A script that it runs
imports what its work needs, and calls `serve`; the work calls `die_at`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What differs between runs in names of files: numbers, and what tempfile and secrets draw.
_RANDOM = re.compile(r"\.[a-z0-9_]{8}(?=/|$)|[0-9a-f]{8,}")


class ForkServer:
    """A process that runs `script`, which calls `serve`."""

    def __init__(self, script: str, *arguments: object) -> None:
        paths = [str(ROOT), str(ROOT / "tests" / "support")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.read() == "ready"

    def read(self) -> str:
        """Return the next line of the process."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, **request: Any) -> int:
        """Fork a child for the request, whose values become JSON; return its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        return int(self.read())

    def run(self, **request: Any) -> int:
        """Return the child's exit code: 0, or -9 where it was killed."""
        self.start(**request)
        return int(self.read())

    def killed_after(self, pid: int, seconds: float) -> bool:
        """Kill a started child after some time, and return whether that ended it."""
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(pid, signal.SIGKILL)
        return int(self.read()) == -signal.SIGKILL

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0


def serve(work: Callable[..., int | None]) -> None:
    """Fork a child for each line of stdin, which is a JSON object with the arguments of `work`.

    The child ends with the exit code that `work` returns; None is 0.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(work(**json.loads(line)) or 0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(folder: str, stage: str, stages: str = "") -> None:
    """Kill this process when it first reaches a stage: a call of the file system, such as "os.rename out.parts/part-N".

    The calls are seen through an audit hook, so that none can be forgotten; it stays until the process ends.

    Args:
        folder: the stages are the calls below it.
        stage: the name of the stage; empty for none.
        stages: a file outside of the folder for the names of all stages that are reached; empty for none.
    """
    names = open(stages, "w", encoding="utf-8") if stages else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for value in arguments:
            if isinstance(value, (str, Path)) and str(value).startswith(folder):
                name = f"{event} {_without_chance(str(value).removeprefix(folder).lstrip('/'))}"
                if names is not None:
                    print(name, file=names, flush=True)
                if name == stage:
                    die()
                return

    sys.addaudithook(hook)


def _without_chance(path: str) -> str:
    """A path without what differs between runs."""
    return re.sub(r"\d+", "N", _RANDOM.sub("*", path)) or "."


def stages_of(file: Path) -> list[str]:
    """The names of stages in a file, a line for each, in the order in which they were first reached."""
    return list(dict.fromkeys(file.read_text(encoding="utf-8").splitlines()))


def spread(stages: Sequence[str], most: int) -> list[str]:
    """At most so many of the stages, evenly, with the first and the last."""
    count = min(most, len(stages))
    return [stages[round(number * (len(stages) - 1) / max(1, count - 1))] for number in range(count)]
