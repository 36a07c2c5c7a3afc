"""An emulated ARM64 machine with this project's runtime, without root: set up once, for tests of the CPU bundle.

    python tests/support/arm64.py    # set it up under build/arm64; nothing to do when repeated

QEMU's user mode runs the aarch64 programs: Debian's Python, and the aarch64 wheels of the packages that the runtime
needs, in the versions of this environment. Everything is unpacked into one folder; the system stays as it is.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import debian
from debian import Unavailable

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "arm64"


@dataclass(frozen=True)
class Cpu:
    """An ARM64 CPU that QEMU emulates.

    Args:
        qemu: QEMU's name of it.
        part: its part number (ARM's), as Linux reports it.
        features: its instructions, as Linux reports them.
        int8_products: opcode and mask of the instruction with which ONNX Runtime multiplies matrices of 8-bit integers.
    """

    qemu: str
    part: int
    features: str
    int8_products: tuple[int, int]


_SMULL = 0x0E20C000, 0xFFE0FC00  # products of single integers
_UDOT = 0x6F80E000, 0xFFC0F400  # dot products of four
_SVE_UMMLA = 0x45C09800, 0xFFE0FC00  # products of matrices of 2 x 8 and 8 x 2
_ARMV8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"
CPUS = {
    "raspberry-pi-4": Cpu("cortex-a72", 0xD08, "fp asimd evtstrm crc32 cpuid", _SMULL),
    "raspberry-pi-5": Cpu("cortex-a76", 0xD0B, _ARMV8_2, _UDOT),
    "graviton-2": Cpu("neoverse-n1", 0xD0C, _ARMV8_2, _UDOT),
    # QEMU's "max" has all instructions of Neoverse V1 and V2, and more. Here it gets their lengths of SVE vectors.
    "graviton-3": Cpu("max,sve-default-vector-length=32", 0xD40, f"{_ARMV8_2} sve i8mm bf16", _SVE_UMMLA),
    "grace": Cpu("max,sve-default-vector-length=16", 0xD4F, f"{_ARMV8_2} sve sve2 i8mm bf16", _SVE_UMMLA),
}
"""A machine -> its CPU, or one with the same instructions."""

_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
_WHEELS = ("numpy", "onnxruntime", "tokenizers", "huggingface_hub")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_QEMU = "qemu-aarch64-static"


def installed(folder: Path = FOLDER) -> Path:
    """Return the folder of a machine that is set up.

    Raises:
        Unavailable: it is not set up, or for other versions of the packages.
    """
    if not _is_done(folder):
        raise Unavailable("it is not set up; `make test-arm64` downloads 150 MB and sets it up under build/arm64")
    return folder


def install(folder: Path = FOLDER) -> Path:
    """Set the machine up in `folder`, once for all processes.

    Raises:
        Unavailable: a package cannot be had, with the reason of apt or pip.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_done(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _unpack_system(folder)
            _install_wheels(folder)
            for cpu in CPUS:
                _describe(folder, cpu)
            _done(folder).write_text(_stamp(), encoding="utf-8")
    return folder


def run(folder: Path, cpu: str, log: Path, script: Path, *arguments: str | os.PathLike[str]) -> str:
    """Run a Python script on an emulated CPU, log each instruction that it reaches, and return its stdout.

    Raises:
        RuntimeError: the script failed; the message ends with its stderr.
    """
    system = folder / "cpus" / cpu
    emulator = [_qemu(folder), "-L", str(system), "-cpu", CPUS[cpu].qemu, "-d", "in_asm", "-D", str(log)]
    command = [*emulator, str(_python(folder)), str(script), *map(str, arguments)]
    environment = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": f"{folder / 'site'}:{ROOT}",
    }
    return debian.run(command, RuntimeError, env=environment)


def reaches(log: Path, opcode: int, mask: int) -> bool:
    """Whether a run reached an instruction: a code word that equals `opcode` in the bits of `mask`."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        words = (re.match(r"0x[0-9a-f]+:\s+([0-9a-f]{8})\s", line) for line in lines)
        return any(int(word[1], 16) & mask == opcode for word in words if word)


def _is_done(folder: Path) -> bool:
    is_ours = _done(folder).is_file() and _done(folder).read_text(encoding="utf-8") == _stamp()
    return is_ours and Path(_qemu(folder)).is_file()  # the system's QEMU may be gone


def _done(folder: Path) -> Path:
    return folder / "done"


def _stamp() -> str:
    return f"{' '.join(_PACKAGES)} {' '.join(_requirements())} {CPUS}\n"


def _requirements() -> list[str]:
    return [f"{name}=={importlib.metadata.version(name)}" for name in _WHEELS]


def _unpack_system(folder: Path) -> None:
    """Download and unpack Debian's packages for ARM64, and QEMU for this machine unless it is installed."""
    debian.require("dpkg")
    here = debian.run(["dpkg", "--print-architecture"]).strip()
    architectures = ("APT::Architecture", "arm64"), ("APT::Architectures::", "arm64"), ("APT::Architectures::", here)
    apt = debian.unpack(_PACKAGES, folder / "system", folder, architectures)
    if shutil.which(_QEMU) is None:
        debian.run([*apt, "download", f"qemu-user-static:{here}"], cwd=folder)
        (archive,) = folder.glob("qemu-user-static_*.deb")
        debian.run(["dpkg-deb", "-x", str(archive), str(folder / "qemu")])
        (folder / "qemu" / "usr" / "bin" / _QEMU).rename(folder / _QEMU)
        shutil.rmtree(folder / "qemu")
        archive.unlink()
    shutil.rmtree(folder / "state")
    shutil.rmtree(folder / "cache")


def _install_wheels(folder: Path) -> None:
    version = _python(folder).name.removeprefix("python")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    options = ["--only-binary", ":all:", "--python-version", version, "--target", str(folder / "site")]
    for platform in _PLATFORMS:
        options += ["--platform", platform]
    debian.run([*command, *options, *_requirements()])


def _describe(folder: Path, cpu: str) -> None:
    """Write the files by which Linux describes a CPU; QEMU takes files under its prefix in place of the system's.

    ONNX Runtime reads them when it is imported, and fails on the description of a CPU of another kind.
    """
    system = folder / "cpus" / cpu
    devices = system / "sys" / "devices" / "system" / "cpu"
    for path in (system / "proc", devices):
        path.mkdir(parents=True)
    for path in (folder / "system").iterdir():
        (system / path.name).symlink_to(path)
    facts = {
        "processor": "0",
        "Features": CPUS[cpu].features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": f"{CPUS[cpu].part:#x}",
        "CPU revision": "1",
    }
    lines = "".join(f"{name}\t: {value}\n" for name, value in facts.items())
    (system / "proc" / "cpuinfo").write_text(lines + "\n", encoding="utf-8")
    for name in ("possible", "present", "online", "kernel_max"):
        (devices / name).write_text("0\n", encoding="utf-8")


def _python(folder: Path) -> Path:
    (python,) = (folder / "system" / "usr" / "bin").glob("python3.*")
    return python


def _qemu(folder: Path) -> str:
    return shutil.which(_QEMU) or str(folder / _QEMU)


if __name__ == "__main__":
    try:
        print(install())
    except Unavailable as error:
        sys.exit(f"no emulated ARM64 here: {error}")
