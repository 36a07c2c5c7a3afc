"""What the machine offers and does: the kernels of its CPU, the noise of other programs, and the energy it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SPREAD_LIMIT = 0.15
BUSY_LIMIT = 0.05
STEAL_LIMIT = 0.02
"""A measurement is noisy above one of these limits, see `NOISE_RULE`."""

NOISE_RULE = (
    f"A measurement is noisy if a fixed matrix product, timed before it and in every round, takes {SPREAD_LIMIT:.0%} "
    f"longer in the median than at best; if others keep the CPUs busy for more than {BUSY_LIMIT:.0%} while the "
    f"benchmark sleeps; or if the hypervisor takes more than {STEAL_LIMIT:.0%} of the CPU time."
)

# Flag in /proc/cpuinfo -> the name for people. In this order, the last of a precision is the fastest.
_KERNELS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "SVE",
    "bf16": "bf16",
}
_FOR_PRECISION = {
    "fp32": ("NEON", "SVE", "AVX2", "AVX-512"),
    "16-bit": ("bf16", "AVX512-BF16", "AMX-BF16"),
    "int8": ("NEON", "dotprod", "i8mm", "AVX2", "AVX-512", "VNNI", "AMX-INT8"),
}

_PROC = Path("/proc")
_POWERCAP = Path("/sys/class/powercap")
_CALIBRATION_SIZE = 1024
_ASLEEP_S = 0.5


def kernels(cpuinfo: str | None = None) -> list[str]:
    """Return the names of the instruction sets that matter for matrix products, of x86 and ARM.

    Args:
        cpuinfo: the text of /proc/cpuinfo; by default of this machine.
    """
    text = (_PROC / "cpuinfo").read_text(encoding="utf-8") if cpuinfo is None else cpuinfo
    flags = next((line.split() for line in text.splitlines() if line.startswith(("flags", "Features"))), [])
    return list(dict.fromkeys(name for flag, name in _KERNELS.items() if flag in flags))


def kernel_of(precision: str, offered: Sequence[str]) -> str | None:
    """Return the fastest of the offered kernels for a precision of a `Contestant`; None if it has none.

    Weight-only precisions compute in fp32.
    """
    known = _FOR_PRECISION.get(precision, _FOR_PRECISION["fp32"])
    return next((name for name in reversed(known) if name in offered), None)


@dataclass(frozen=True)
class CpuTimes:
    """Ticks of all CPUs since the system started, from /proc/stat."""

    total: int
    idle: int
    steal: int

    @classmethod
    def now(cls, stat: Path = _PROC / "stat") -> CpuTimes:
        """Read the present values."""
        # user nice system idle iowait irq softirq steal; guest time, after them, is part of user time.
        ticks = [int(value) for value in stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
        return cls(sum(ticks), ticks[3] + ticks[4], ticks[7])

    def shares_since(self, before: CpuTimes) -> tuple[float, float]:
        """Return the busy and the stolen share of the CPU time since `before`."""
        total = max(1, self.total - before.total)
        return 1 - (self.idle - before.idle) / total, (self.steal - before.steal) / total


@dataclass(frozen=True)
class Noise:
    """How much other programs disturbed a measurement.

    Args:
        spread: the median time of the calibration product over its least time, less 1.
        busy: share of the CPU time that others took while the benchmark slept before it.
        steal: share of the CPU time that the hypervisor took from the start to the end.
    """

    spread: float
    busy: float
    steal: float

    @classmethod
    def of(cls, seconds: Sequence[float], *, busy: float, steal: float) -> Noise:
        """Make it from the times of the calibration product; without a time the spread is 0."""
        spread = statistics.median(seconds) / min(seconds) - 1 if seconds else 0.0
        return cls(spread, busy, steal)

    def reason(self) -> str | None:
        """Say what is above its limit; None if nothing is."""
        parts = [
            f"{text} {value:.0%} (limit {limit:.0%})"
            for text, value, limit in (
                ("the calibration product's median is above its least time by", self.spread, SPREAD_LIMIT),
                ("other programs keep the CPUs busy for", self.busy, BUSY_LIMIT),
                ("the hypervisor takes", self.steal, STEAL_LIMIT),
            )
            if value > limit
        ]
        return "; ".join(parts) or None


def busy_share() -> float:
    """Return the share of the CPU time that others take while this process sleeps for half a second.

    It sleeps as long before, until threads of the contestants have stopped spinning.
    """
    time.sleep(_ASLEEP_S)
    before = CpuTimes.now()
    time.sleep(_ASLEEP_S)
    return CpuTimes.now().shares_since(before)[0]


class Calibration:
    """A fixed matrix product, whose time changes only if the machine does; it lives in a process of its own."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn((_CALIBRATION_SIZE, _CALIBRATION_SIZE), generator=generator)
        self.product()

    def product(self) -> None:
        """Compute the product; the caller takes the time."""
        import torch

        torch.mm(self._matrix, self._matrix)


class Energy:
    """The energy of all CPU packages, from the RAPL counters of Intel and AMD.

    `reason` says why there is none; it is None if `joules` can be called.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:0 is a part of it.
        self._zones = sorted(zone for zone in folder.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self._ranges: list[int] = []
        self.reason: str | None = None
        if not self._zones:
            self.reason = f"{folder} has no intel-rapl: the CPU has no energy counters, or a virtual machine hides them"
            return
        try:
            self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
            self._last = self._counters()
        except (OSError, ValueError) as error:
            self.reason = f"the energy counters cannot be read ({error}); by default only root may"

    def joules(self) -> float:
        """Return the joules since the last call, or since this object was made; a counter may have wrapped once."""
        before, self._last = self._last, self._counters()
        spent = (
            now - then if now >= then else now - then + size
            for now, then, size in zip(self._last, before, self._ranges, strict=True)
        )
        return sum(spent) / 1e6

    def _counters(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]
