"""Small checkpoints with a BERT-like tokenizer, and bundles of them, for the tests of the runtime.

Its fixtures are taken over by tests/conftest.py.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from factories import make_checkpoint

MAX_LENGTH = 128
VOCAB_SIZE = 128
PIECES = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *(".", ",", "!", "?", "'", "-", "(", ")", ":", '"'),
    *"the a an of in on at to and or is was are it he she they we you this that not".split(),
    *"paris france capital city river house water light king queen world time year day".split(),
    *"man woman old new big small good bad walk run play sing read write".split(),
    *("##s", "##ed", "##ing", "##er", "##ly", "##ness", "##un", "##a", "##b", "##c", "##able"),
    *("don", "t", "s", "m", "re", "1", "2", "3", "b", "c"),
    *("中", "国", "é", "ß"),
)
TEXTS = (
    "Paris is the [MASK] of France.",
    "the king walked to the [MASK], and the queen is [MASK]!",
    "[MASK]",
    "the man isn't old ([MASK] is not); readable [MASK] unknownword 中国",
    "[SEP] the [MASK] [PAD] a [CLS] time",
)


def make_texts(count: int, *, seed: int = 0, most_words: int = 40) -> list[str]:
    """Texts of random words and lengths; some are equal."""
    chosen = random.Random(seed)
    words = [piece for piece in PIECES if piece.isascii() and piece.isalpha()]
    return [" ".join(chosen.choices(words, k=chosen.randint(1, most_words))) for _ in range(count)]


def make_word_checkpoint(folder: Path, **options: Any) -> Path:
    """A checkpoint with the pieces above, whose tokenizer.json is what BERT's is."""
    options = {
        "vocab": PIECES,
        "vocab_size": VOCAB_SIZE,
        "max_positions": MAX_LENGTH,
        "layout": "native",
        "heads": 2,  # of 16: TensorRT fuses attention with no smaller ones
        **options,
    }
    make_checkpoint(folder, **options)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    tokenizer["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def word_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One native-layout checkpoint for each task. Shared by the session: read only."""
    folder = tmp_path_factory.mktemp("words")
    options: dict[str, dict[str, Any]] = {
        "fill-mask": {},
        "embed": {
            "pooling": "cls",
            "seed": 1,
            "prompts": {"query": "the query: ", "document": "", "passage": "the passage: "},
        },
        "classify": {"seed": 2},
    }
    return {task: make_word_checkpoint(folder / task, task=task, **more) for task, more in options.items()}


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """`bundle_of(checkpoint, **options)`: the bundle that the exporter makes of it. Read only.

    Made once for all of pytest-xdist's workers, which share the parent of their temporary folders.
    """
    from gte_deploy.exporters.export import export

    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def bundle(checkpoint: Path, **options: Any) -> Path:
        digest = hashlib.sha256(repr(sorted(options.items())).encode())
        for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            digest.update(file.read_bytes())
        target = shared / f"bundle-{digest.hexdigest()[:16]}"
        with FileLock(shared / f"{target.name}.lock"):
            return target if target.is_dir() else export(checkpoint, target, **options).path

    return bundle


@pytest.fixture(scope="session")
def task_checkpoints(word_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each kind of route, by the name of its model."""
    folder = tmp_path_factory.mktemp("served")
    more: dict[str, dict[str, Any]] = {
        "labels": {"task": "classify", "num_labels": 3, "seed": 5},
        "tags": {"task": "token-classify", "num_labels": 3, "seed": 6},
    }
    made = {name: make_word_checkpoint(folder / name, **options) for name, options in more.items()}
    return {"embed": word_checkpoints["embed"], "rank": word_checkpoints["classify"], **made} | {
        "mask": word_checkpoints["fill-mask"]
    }


@pytest.fixture(scope="session")
def task_bundles(task_checkpoints: dict[str, Path], bundle_of: Callable[..., Path]) -> dict[str, Path]:
    """A bundle of each of `task_checkpoints`, and a sparse one of the fill-mask model."""
    bundles = {name: bundle_of(checkpoint) for name, checkpoint in task_checkpoints.items()}
    return bundles | {"sparse": bundle_of(task_checkpoints["mask"], task="sparse")}


@pytest.fixture(scope="session")
def load_on(bundle_of: Callable[..., Path]) -> Callable[..., Any]:
    """`load_on(backend, checkpoint, max_length=None, **options)`: the checkpoint on "torch", its bundle elsewhere."""
    import gte_deploy

    def load(backend: str, checkpoint: Path, *, max_length: int | None = None, **options: Any) -> gte_deploy.Model:
        name, *how = backend.split()
        precision = "bf16" if "bf16" in how else None
        if name == "openvino":
            _skip_without_openvino(precision)
        options_of_bundle: dict[str, Any] = {} if max_length is None else {"max_length": max_length}
        if name == "tensorrt":
            options_of_bundle["format"] = "trt"
        path = checkpoint if name == "torch" else bundle_of(checkpoint, **options_of_bundle)
        if name == "tensorrt":
            _skip_where_it_does_not_fit(path)
        device = "cuda" if "cuda" in how else None
        return gte_deploy.load(path, backend=name, precision=precision, device=device, **options)

    return load


def _skip_where_it_does_not_fit(bundle: Path) -> None:
    """TensorRT-RTX, which builds where ordinary TensorRT is missing, has no engines for some GPUs."""
    from gte_deploy.backends.tensorrt.plan import check_plan
    from gte_deploy.bundle.manifest import read_manifest
    from gte_deploy.core.errors import BackendError

    plan = read_manifest(bundle).plan
    assert plan is not None
    try:
        check_plan(plan, "cuda")
    except BackendError as error:
        pytest.skip(str(error))


def _skip_without_openvino(precision: str | None) -> None:
    pytest.importorskip("openvino")
    from gte_deploy.backends.openvino import has_native_bf16

    if precision == "bf16" and not has_native_bf16():
        pytest.skip("this CPU does not compute in bfloat16")


# A row beside others against the row alone: the same float32 sums in another order, and on a GPU of other tiles.
ROW_TOLERANCE, ROW_TOLERANCE_ON_GPUS = 1e-5, 1e-4
# The same where another shape may round to 16 bits elsewhere.
ROW_TOLERANCE_OF_HALVES = 0.1
HALVES = ("tensorrt", "torch cuda bf16")
_GPU = ("onnx cuda", "torch cuda", "torch cuda bf16", "tensorrt")


@pytest.fixture(
    scope="session",
    params=[
        "torch",
        "onnx",
        "openvino",
        "openvino bf16",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in _GPU),
    ],
)
def backend(request: pytest.FixtureRequest) -> str:
    """As `load_on` takes it: the name, where it runs, and what it computes in where that is not fp32."""
    return request.param


@pytest.fixture(scope="session")
def repeat_tolerance(backend: str) -> float:
    """How far the same batch may be from itself: TensorRT-RTX goes over to kernels that it compiles meanwhile."""
    return 0.1 if backend == "tensorrt" else 0.0


@pytest.fixture(scope="session")
def row_tolerance(backend: str) -> float:
    """How far a row in a batch may be from the row alone."""
    if backend in HALVES:
        return ROW_TOLERANCE_OF_HALVES
    return ROW_TOLERANCE_ON_GPUS if "cuda" in backend else ROW_TOLERANCE


@pytest.fixture(scope="session")
def models(backend: str, load_on: Callable[..., Any], word_checkpoints: dict[str, Path]) -> dict[str, Any]:
    """The word checkpoints, loaded on the backend under test."""
    return {task: load_on(backend, checkpoint, num_threads=1) for task, checkpoint in word_checkpoints.items()}
