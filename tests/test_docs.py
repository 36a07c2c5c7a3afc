"""Links between the documents lead somewhere, every page is found from README.md, and generated pages are current."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md", *PAGES]


def _links(document: Path) -> list[str]:
    """The targets of a document's links, but for those to other sites."""
    return re.findall(r"\]\((?!\w+:)([^)\s]+)\)", document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links(document: Path) -> None:
    for target in _links(document):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in _anchors(path), f"{document.name} links to {target}"


def test_readme_names_every_document() -> None:
    text = README.read_text(encoding="utf-8")
    assert [path.name for path in PAGES if path.parent.name == "docs" and f"(docs/{path.name})" not in text] == []


def test_the_site_names_every_document() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = {*re.findall(r"([\w-]+\.md)$", navigation, re.MULTILINE)}
    assert [path.name for path in PAGES if path.parent.name == "docs" and path.name not in named] == []


def test_every_document_is_found_from_the_readme() -> None:
    found, waiting = {README}, [README]
    while waiting:
        document = waiting.pop()
        for target in _links(document):
            path = (document.parent / target.partition("#")[0]).resolve()
            if path.suffix == ".md" and path not in found:
                found.add(path)
                waiting.append(path)
    assert sorted(path.relative_to(ROOT).as_posix() for path in set(DOCUMENTS) - found) == []


def test_generated_pages_are_current() -> None:
    command = [sys.executable, "tools/generate_docs.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"run `make docs`\n{run.stdout}{run.stderr}"


DECISIONS = [page for page in PAGES if page.parent.name == "decisions" and page.name != "README.md"]
PARTS = ["Context", "Options and measurements", "Decision", "Revisit when"]


@pytest.mark.parametrize("page", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n20\d\d-\d\d-\d\d.* · \w+", text), "a title, and a line with date and area"
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == PARTS
    assert re.search(r"^Sources?: ", text, re.MULTILINE)


def test_the_index_of_decisions_has_a_line_for_each_under_its_area() -> None:
    text = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    listed = {
        (name, area.lower())
        for area, lines in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        for name in re.findall(r"^- \[.+\]\((.+\.md)\)", lines, re.MULTILINE)
    }
    stated = re.compile(r"^20\d\d-\d\d-\d\d.*? · (\w+)", re.MULTILINE)
    areas = {(page.name, found[1]) for page in DECISIONS if (found := stated.search(page.read_text(encoding="utf-8")))}
    assert listed == areas


def test_documents_that_the_code_names_are_there() -> None:
    files = [file for name in ("gte_deploy", "exporters", "models", "training") for file in (ROOT / name).rglob("*.py")]
    pattern = re.compile(r"\bdocs/[a-z0-9/-]+\.md\b")
    named = [(file, name) for file in files for name in pattern.findall(file.read_text(encoding="utf-8"))]
    assert named
    assert [f"{file.relative_to(ROOT)}: {name}" for file, name in named if not (ROOT / name).is_file()] == []


def test_files_that_the_documents_name_are_there() -> None:
    pattern = re.compile(
        r"\b(?:tests|exporters|gte_deploy|models|training|benchmarks|tools|examples)/[\w/]+\.(?:py|md|sh|yaml)\b"
    )
    texts = {page: re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8")) for page in DOCUMENTS}
    named = {(page, name) for page, text in texts.items() for name in pattern.findall(text)}
    assert named
    # NAME stands for a file that a reader writes.
    missing = [f"{page.name}: {name}" for page, name in named if "NAME" not in name and not (ROOT / name).is_file()]
    assert sorted(missing) == []


def test_the_scripts_of_the_page_on_runtimes_are_run_by_the_tests_of_consumers() -> None:
    shown = re.findall(r"<!-- file: (\S+) -->", (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8"))
    folder = ROOT / "tests" / "consumers"
    runners = [*folder.rglob("test_*.py"), *folder.rglob("conftest.py"), folder / "javascript" / "index.html"]
    run = "".join(file.read_text(encoding="utf-8") for file in runners)
    assert shown
    assert [name for name in shown if f'"{Path(name).name}"' not in run] == []


def test_every_reader_that_the_page_on_bundles_names_has_scripts_on_the_page_on_runtimes() -> None:
    bundles, runtimes = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("bundle", "runtimes"))
    table = bundles.partition("## Files for other libraries")[2].partition("\n## ")[0]
    readers = re.findall(r"^\| (?!library|-)(.+?) \|", table, re.MULTILINE)
    names = [re.sub(r"( \(| with ).*", "", name) for reader in readers for name in re.split(r", (?![^(]*\))", reader)]
    sections = re.split(r"^##+ ", runtimes, flags=re.MULTILINE)
    with_scripts = [section.partition("\n")[0] for section in sections if "<!-- file: " in section]
    assert len(names) > 5
    assert [name for name in names if not any(title.startswith(name) for title in with_scripts)] == []


def test_the_table_of_fields_is_the_readers_own() -> None:
    from gte_deploy.models.field_tables import document

    written = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert written == document(), "write it anew: python -m gte_deploy.models.field_tables > docs/checkpoints.md"


def _anchors(path: Path) -> set[str]:
    """GitHub's: lower case, spaces as hyphens, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


class _Plain(ast.NodeTransformer):
    """Leaves out what the documents leave out: docstrings, annotations, and imports in functions."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign | None:
        return None if node.value is None else ast.Assign([node.target], node.value, lineno=0)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
        return node


def _definitions(source: str) -> dict[str, str]:
    """Name of a class or constant -> its code, as `_Plain` leaves it."""
    tree = _Plain().visit(ast.parse(source))
    named = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    named |= {node.targets[0].id: node for node in tree.body if isinstance(node, ast.Assign)}
    return {name: ast.unparse(node) for name, node in named.items()}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("OpenVinoTarget", "exporters/targets/openvino.py"),
        ("CountRequest", "tests/runtime/tasks/test_registry.py"),
        ("COUNT", "tests/runtime/tasks/test_registry.py"),
        ("BERT", "models/families/bert.py"),
        ("GLU", "exporters/graph/fusion/glu.py"),
    ],
)
def test_the_page_on_extending_shows_the_code_as_it_is(name: str, source: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.M | re.S)
    shown = [found[name] for block in blocks if name in (found := _definitions(block))]
    assert shown == [_definitions((ROOT / source).read_text(encoding="utf-8"))[name]]
