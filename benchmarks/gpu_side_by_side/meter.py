"""What the GPU is, and how much of its memory is taken at most meanwhile. Runs in a process of its own."""

from __future__ import annotations

import threading
import time
from typing import Any

_EVERY_S = 0.002


class Meter:
    """Watches one GPU from outside the process that is measured: weights, workspaces, arenas and contexts count."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("there is no NVIDIA GPU, or torch cannot use it")
        self._used_before = self._peak = 0
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def describe(self) -> dict[str, Any]:
        """Name, compute capability, bytes of memory, and the versions of driver-side CUDA as torch sees it."""
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
        """Memory that nobody has."""
        import torch

        return torch.cuda.mem_get_info()[0]

    def start(self) -> None:
        """Begin to watch; what is taken now does not count."""
        self._used_before = self._peak = self._used()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._stop,), daemon=True)
        self._thread.start()

    def peak_bytes(self) -> int:
        """The most that was taken since `start`, above what was taken then."""
        return max(self._peak, self._used()) - self._used_before

    def stop(self) -> int:
        """`peak_bytes`, and no more watching."""
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
