"""Describes the GPU and measures its peak memory, in a process of its own."""

from __future__ import annotations

import threading
import time
from typing import Any

_EVERY_S = 0.002


class Meter:
    """Measures one GPU from outside the measured process, so weights, workspaces, arenas and contexts all count."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("there is no NVIDIA GPU, or torch cannot use it")
        self._used_before = self._peak = 0
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def describe(self) -> dict[str, Any]:
        """Return name, compute capability, bytes of memory, multiprocessors, and the version of torch's CUDA."""
        import torch

        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }

    def free_bytes(self) -> int:
        """Return the bytes of free memory."""
        import torch

        return torch.cuda.mem_get_info()[0]

    def start(self) -> None:
        """Start measuring; memory that is in use now does not count."""
        self._used_before = self._peak = self._used()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._stop,), daemon=True)
        self._thread.start()

    def peak_bytes(self) -> int:
        """Return the most memory in use since `start`, less the memory in use at `start`."""
        return max(self._peak, self._used()) - self._used_before

    def stop(self) -> int:
        """Stop measuring, and return `peak_bytes`."""
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join()
        return self.peak_bytes()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self._peak = max(self._peak, self._used())
            time.sleep(_EVERY_S)

    def _used(self) -> int:
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free
