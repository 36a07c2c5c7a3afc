"""A server in a process of its own, as a user starts it, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

_STARTED = re.compile(r"gte-deploy: (http://\S+) serves ")


class ServerProcess:
    """A process that runs `command`, which must say where it listens as `gte-deploy serve` does."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path, python: str | Path = sys.executable, **variables: str
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **variables}
        self._process = subprocess.Popen(
            [python, *command], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._found = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._found.wait(60):
            self.kill()
            raise AssertionError(f"the server did not start:\n{self.log}")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if (match := _STARTED.match(line)) and not self._found.is_set():
                self.url = match[1]
                self._found.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._process.poll() is None:
            if httpx.get(f"{self.url}/ready").status_code == 200:
                return
            time.sleep(0.02)
        raise AssertionError(f"the server is not ready:\n{self.log}")

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal, and return the exit code."""
        self._process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 60) -> int:
        code = self._process.wait(seconds)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)


def serve_command(*arguments: object) -> list[str]:
    return ["-m", "gte_deploy", "serve", "--port", "0", *map(str, arguments)]


class KeptOpen:
    """A model that stays open when its server ends."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def close(self) -> None:
        """Do nothing."""
