"""The scripts in examples/ do what their first lines say."""

import ast
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import gte_deploy
from loading import load_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 60

# One worker exports, once for all.
pytestmark = pytest.mark.xdist_group("examples")


def run(name: str, *arguments: object, code: int = 0) -> str:
    """What an example prints; with another exit code than 0, what it prints on stderr."""
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, str]:
    """A bundle of the built-in model as an example exports it, and what the example printed."""
    bundle = tmp_path_factory.mktemp("examples") / "bundle"
    return bundle, run("onnxruntime_alone.py", bundle)


@pytest.fixture(scope="module")
def bundle(exported) -> Path:
    return exported[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_short_explained_and_listed(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    assert f"python examples/{script.name}" in (ast.get_docstring(ast.parse(text)) or "")
    assert f"]({script.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    others = ("triton/test_example.py", "consumers/test_device_conversions.py")
    tests = (Path(__file__), *(ROOT / "tests" / name for name in others))
    assert any(f'{script.name}"' in test.read_text(encoding="utf-8") for test in tests), "no test runs it"


def test_onnxruntime_alone(exported):
    bundle, printed = exported
    first, *answers = printed.splitlines()
    assert first == f"exported to {bundle}"
    with gte_deploy.load(bundle, backend="onnx") as model:
        expected = model.fill_mask("The president of the united [MASK] of America.", top_k=3)
    assert [line.split()[1] for line in answers] == [answer["token_str"] for answer in expected]
    assert [float(line.split()[0]) for line in answers] == pytest.approx([a["score"] for a in expected], abs=1e-4)
    assert run("onnxruntime_alone.py", bundle).splitlines() == answers, "a bundle that is there is not exported again"


def test_fill_mask(bundle):
    lines = run("fill_mask.py", bundle).splitlines()
    assert lines[0].endswith("the president of the united states of america.")
    assert lines[3].startswith("first mask:") and lines[4].startswith("second mask: states")
    assert lines[5] == "'that' is more likely than 'the'"


def test_semantic_search(bundle, tmp_path):
    (tmp_path / "river.txt").write_text("The water of the river runs into the sea.\n\nRivers carry sand.\n")
    (tmp_path / "law.md").write_text("The court shall decide who pays.\n")
    (tmp_path / "ignored.csv").write_text("the water of the river runs into the sea\n")
    query = "The water of the river runs into the sea."
    best, *others = run("semantic_search.py", tmp_path, query, bundle).splitlines()
    assert best == f"1.000  river.txt: {query}"
    assert len(others) == 2 and all(float(line.split()[0]) < 1 for line in others)
    (tmp_path / "empty").mkdir()
    assert "has no .txt or .md file" in run("semantic_search.py", tmp_path / "empty", "a question", bundle, code=1)


def test_late_chunking(tiny_embed, tmp_path):
    sentences = [" ".join(f"w{i}" for i in range(first, first + 50)) + "!" for first in (5, 60, 120, 180)]
    file = tmp_path / "document.txt"
    file.write_text("\n\n".join(sentences), encoding="utf-8")
    lines = run("late_chunking.py", file, sentences[2], tiny_embed).splitlines()
    assert [lines[0], lines[4]] == ["chunks embedded in their document:", "chunks embedded alone:"]
    results = [[line.split(None, 2) for line in part] for part in (lines[1:4], lines[5:8])]
    scores = [[float(score) for score, _, _ in part] for part in results]
    assert all(part == sorted(part, reverse=True) for part in scores)
    assert scores[0][0] < scores[1][0] == 1, "the chunk alone is the question itself"
    start = file.read_text(encoding="utf-8").index(sentences[2])
    assert results[1][0][1:] == [f"{start}-{start + len(sentences[2])}", sentences[2][:80]]
    file.write_text(" ", encoding="utf-8")
    assert "has no text" in run("late_chunking.py", file, "a", tiny_embed, code=1)


def test_clean_data(bundle, tmp_path):
    prose = "There is no doubt that the people of this country want peace and order."
    noise = "xq zzv klop bnm qwe rty uio asd fgh"
    file = tmp_path / "lines.txt"
    file.write_text(f"{prose}\n\ntoo short\n{noise}\n")
    worst, best = run("clean_data.py", file, bundle).splitlines()
    assert worst.endswith(noise) and best.endswith(prose)
    assert float(worst.split()[0]) < 0.2 < 0.7 < float(best.split()[0])
    file.write_text("the people of\n")  # one hidden word: one text
    assert run("clean_data.py", file, bundle) == "1.00  the people of\n"
    file.write_text("\n")
    assert "has no line" in run("clean_data.py", file, bundle, code=1)


def test_rerank(tiny_reranker):
    documents = ["w5 w6 w7", "w100", "w200 w201"]
    *ranking, scores = run("rerank.py", tiny_reranker, "w5 w6", *documents).splitlines()
    with gte_deploy.load(tiny_reranker, backend="torch") as model:
        expected = model.predict([("w5 w6", document) for document in documents])
    assert scores == "in your order: " + ", ".join(f"{score:.4f}" for score in expected)
    assert [line.split("  ")[1] for line in ranking] == [documents[i] for i in (-expected).argsort()]


def test_rerank_by_the_built_in_model():
    documents = ["Bread is made of flour.", "The river runs into the sea.", "The court decides who pays."]
    ranking = run("rerank.py", "--demo", "the water of the river runs into the sea", *documents).splitlines()
    assert len(ranking) == 3 and ranking[0].endswith(f"  {documents[1]}")
    # By hand: the score is the sum of the tokens' best cosines, so a text has as many as it has tokens with itself.
    (same,) = run("rerank.py", "--demo", documents[0], documents[0]).splitlines()
    assert same == f"8.0000  {documents[0]}", "[CLS], five words, the full stop and [SEP]"


@pytest.mark.parametrize("name", ["semantic_search.py", "late_chunking.py", "rerank.py", "clean_data.py"])
def test_without_its_arguments_an_example_says_how_to_run_it(name):
    assert f"python examples/{name}" in run(name, code=1)


def test_triton_client_without_a_server():
    pytest.importorskip("tritonclient")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert run("triton_client.py", url, code=1).startswith("the server does not answer: ")


NOTEBOOK = ROOT / "examples" / "notebooks" / "fine_tune.py"


def test_the_notebook_is_its_script():
    tool = load_file(ROOT / "tools" / "notebook.py", "notebook")
    written = json.loads(NOTEBOOK.with_suffix(".ipynb").read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in written["cells"]]
    assert found == tool.cells(NOTEBOOK.read_text(encoding="utf-8")), f"run tools/notebook.py {NOTEBOOK}"
    assert (written["nbformat"], written["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in written["cells"]}) == len(found)


@pytest.mark.slow
def test_the_notebook_trains_exports_and_answers(tmp_path):
    done = subprocess.run([sys.executable, NOTEBOOK], cwd=tmp_path, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    right = {name: int(share) for name, share in re.findall(r"^right (.+): (\d+)%$", done.stdout, re.MULTILINE)}
    assert right["before"] < right["after"] == right["with the bundle"] and right["after"] >= 90
    assert "compared with PyTorch: passed" in done.stdout
    assert "largest difference of an embedding below 1e-5: True" in done.stdout
    # What the notebook shows is what the script prints, but for the shares, which vary a little between CPUs.
    written = json.loads(NOTEBOOK.with_suffix(".ipynb").read_text(encoding="utf-8"))
    shown = "".join(line for cell in written["cells"] for output in cell.get("outputs", ()) for line in output["text"])
    assert re.sub(r"\d+%", "%", shown) == re.sub(r"\d+%", "%", done.stdout)
    assert not list(tmp_path.iterdir()), "it writes to a temporary folder alone"
