"""Every block of the documents is run, generated, or says why it is not: tests/support/pages.py has the rules."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import pages
from environments import Unavailable, interpreter
from factories import add_multi_vector_modules, add_sparse_modules, add_tokens
from gte_deploy.core.spec import Profile
from gte_deploy.models import builtin_path
from hub import running_hub
from hybrid_reference import make_hybrid_checkpoint
from pages import ROOT, Thing, Wrong
from plan_bundles import make_plan_bundle
from runtime_models import make_word_checkpoint

FOLDERS = ("docs", "examples", "models", "benchmarks", "tests")
# gte-export wrote the card of this bundle, with MODEL in place of its name: tests of the cards run such blocks.
CARD = ROOT / "models" / "builtin_embed" / "README.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (*ROOT.glob("*.md"), *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.md"))))
    if path != CARD
}
# Blocks of generated pages are signatures and help texts: tests/test_docs.py compares these pages.
BLOCKS = {
    name: pages.blocks(text)
    for name, path in PAGES.items()
    if pages.GENERATED not in (text := path.read_text(encoding="utf-8")) and "```" in text
}


def of_pages(way: str) -> list[object]:
    """The pages with blocks that run in this way; each runs on a worker of its own."""
    chosen = [name for name, found in BLOCKS.items() if way in pages.runs(found)]
    return [pytest.param(name, id=name, marks=pytest.mark.xdist_group(name)) for name in chosen]


IN_ENVIRONMENTS = [(name, way) for name, found in BLOCKS.items() for way in pages.runs(found) if way.startswith("in ")]


THINGS: dict[str, tuple[str, dict[str, object] | None]] = {
    "gte-en-mlm-tiny-onnx-fp32": ("built-in", {"max_length": 128}),
    "my-bundle": ("built-in", {"max_length": 128, "task": "embed", "pooling": "mean"}),
    "my-checkpoint": ("embed", None),
    "my-short-checkpoint": ("embed of words", None),
    "my-fine-tuned": ("fine-tuned", None),
    "my-reranker": ("rerank", None),
    "my-splade": ("splade", None),
    "my-embedding-bundle": ("embed of words", {}),
    "my-reranker-bundle": ("classify of words", {}),
    "my-sparse-bundle": ("hybrid", {"task": "sparse"}),
    "my-hybrid-bundle": ("hybrid", {"task": "hybrid"}),
    "my-colbert-bundle": ("multi-vector", {}),
    "my-classifier-bundle": ("classifier", {}),
    "my-tagger-bundle": ("tagger", {}),
}
"""What a page can need -> a checkpoint of `checkpoint_of`, and the options of its export; None for no export."""


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory, word_checkpoints: dict[str, Path]) -> Callable[[str], Path]:
    """`checkpoint_of(kind)`: what a reader has trained, but small; other tests export some of them, too. Read only."""
    folder = tmp_path_factory.mktemp("pages")
    made: dict[str, Path] = {"built-in": builtin_path()}
    made |= {f"{task} of words": path for task, path in word_checkpoints.items()}
    late = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 60}
    makers: dict[str, Callable[[Path], Path]] = {
        "embed": lambda path: make_word_checkpoint(path, task="embed", pooling="cls", max_positions=8192),
        "fine-tuned": _save_embedder,
        "rerank": lambda path: make_word_checkpoint(path, task="classify", max_positions=8192),
        "splade": lambda path: add_sparse_modules(make_word_checkpoint(path, seed=7)),
        "tagger": lambda path: make_word_checkpoint(path, task="token-classify", num_labels=3, seed=3),
        "multi-vector": lambda path: add_multi_vector_modules(
            add_tokens(make_word_checkpoint(path, task="embed", seed=4), ["[Q] ", "[D] "]), config=late
        ),
        "classifier": lambda path: make_word_checkpoint(path, task="classify", num_labels=3),
        "hybrid": make_hybrid_checkpoint,
    }

    def checkpoint(kind: str) -> Path:
        if kind not in made:
            made[kind] = makers[kind](folder / kind)
        return made[kind]

    return checkpoint


def _save_embedder(path: Path) -> Path:
    """The built-in model as an embedder, as sentence-transformers saves one."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(builtin_path()), model_kwargs={"dtype": "float32"})
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(path))
    return path


@pytest.fixture
def thing(
    bundle_of: Callable[..., Path], checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Thing]]:
    """What a page needs: a name of THINGS, which is read only, and some more."""
    with ExitStack() as stack:
        yield _maker(bundle_of, checkpoint_of, tmp_path_factory.mktemp, stack)


def _maker(
    bundle_of: Callable[..., Path],
    checkpoint_of: Callable[[str], Path],
    new_folder: Callable[[str], Path],
    stack: ExitStack,
) -> Callable[[str], Thing]:
    def make(name: str) -> Thing:
        if name == "hub":
            hub = stack.enter_context(running_hub())
            sources = {"bundle": bundle_of(checkpoint_of("embed of words")), "checkpoint": checkpoint_of("embed")}
            for what, source in sources.items():
                files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
                repository = hub.add(f"owner/{what}", files)
                repository.refs |= dict.fromkeys(("v1", "4f2a91c"), repository.at("main"))
            return hub.environment(new_folder("home"), token=True)
        if name == "my-plan-bundle":
            bundle = bundle_of(checkpoint_of("embed of words"))
            profiles = [Profile((1, 1), (8, 16), (32, 32)), Profile((1, 33), (2, 64), (4, 128))]
            return make_plan_bundle(bundle, new_folder("plan") / "bundle", profiles)
        kind, options = THINGS[name]
        checkpoint = checkpoint_of(kind)
        return checkpoint if options is None else bundle_of(checkpoint, **options)

    return make


@pytest.mark.parametrize("name", BLOCKS)
def test_marks_are_right_and_every_block_has_a_way(name: str) -> None:
    pages.check_marks(name, BLOCKS[name])


@pytest.mark.parametrize("name", of_pages(""))
def test_the_blocks_of_a_page_do_what_it_says(name: str, thing: Callable[[str], Thing], tmp_path: Path) -> None:
    pages.run_page(PAGES[name], tmp_path, thing)


@pytest.mark.slow
@pytest.mark.parametrize("name", of_pages("slow"))
def test_the_slow_blocks_of_a_page_do_what_it_says(name: str, thing: Callable[[str], Thing], tmp_path: Path) -> None:
    pages.run_page(PAGES[name], tmp_path, thing, way="slow")


@pytest.mark.consumers
@pytest.mark.parametrize(("name", "way"), sorted(IN_ENVIRONMENTS))
def test_blocks_do_what_the_page_says_in_an_environment(
    name: str, way: str, thing: Callable[[str], Thing], tmp_path: Path
) -> None:
    try:
        python = interpreter(way.removeprefix("in "))
    except Unavailable as error:
        pytest.skip(f"{name} {way}: {error}")
    pages.run_page(PAGES[name], tmp_path, thing, way=way, python=str(python))


@pytest.mark.parametrize(
    ("name", "reason"), [(name, reason) for name, found in BLOCKS.items() for reason in pages.not_run(name, found)]
)
def test_what_is_not_run(name: str, reason: str) -> None:
    """A skip for each page and reason names the commands that nobody has seen to work here."""
    pytest.skip(f"{name}: {reason}: {', '.join(pages.not_run(name, BLOCKS[name])[reason])}")


# --- the rules themselves ---------------------------------------------------------------------------------------------


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, *, way: str = "") -> None:
    page, folder = tmp_path / "page.md", tmp_path / "folder"
    page.write_text(text, encoding="utf-8")
    folder.mkdir()
    monkeypatch.setattr(pages, "CHECKOUT", ())
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    pages.check_marks("page.md", pages.blocks(text))
    pages.run_page(page, folder, lambda name: tmp_path, way=way)


GOOD = r"""
<!-- needs: a-thing -->
<!-- shell
mkdir below && echo hidden > below/file -->

```console
$ cd below      # a comment
$ cat \
    file
hidden
$ ls ../a-thing/page.md
../a-thing/page.md
```

```python
from pathlib import Path

answer = Path("file").read_text()
```

<!-- python
assert answer == "hidden\n" -->

1. In a list:

   ```console
   $ echo "score 0.7858 in 3.1 ms, 1.9e-06"; echo; echo more; echo end 3
   score 0.7857 in 17 ms, 2.3e-07
   …
   end 3
   ```

<!-- not run (false): it fails -->

```console
$ false
$ true
```

<!-- run: slow -->

```console
$ exit 7
```
"""


def test_a_good_page_runs(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, GOOD)
    assert pages.not_run("page", pages.blocks(GOOD)) == {"it fails": ["false"]}


def test_a_slow_run_has_the_slow_blocks_too(tmp_path, monkeypatch):
    with pytest.raises(Wrong, match=r"exit code 7\n\$ exit 7"):
        run(tmp_path, monkeypatch, GOOD, way="slow")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```console\n$ false\n```", r"page.md:2: exit code 1"),
        ("```console\n$ echo a\nb\n```", r"shows something else[\s\S]+-b\n\+a"),
        ("```console\n$ echo 12 words\n13 words\n```", "shows something else"),
        ("```console\n$ echo a; echo b\na\n```", "shows something else"),
        ("```python\n1 / 0\n```", r'page.md:1: [\s\S]*"page.md", line 2[\s\S]*ZeroDivisionError'),
        ("```python\nimport os; os._exit(3)\n```", "Python ended with 3"),
        ("```console\n$ pip install '.[none]'\n```", "no extra none"),
        ("```cpp\nint x;\n```", "nothing runs this block of cpp"),
        ("<!-- not run (gte): why -->\n```console\n$ true\n```", "no command begins with 'gte'"),
        ("<!-- run by: nothing.py -->\n```console\n$ true\n```", "no file that names page.md"),
        ("<!-- run: often -->\n```console\n$ true\n```", "run: often is no mark"),
        ("<!-- background (true): 8080 -->\n```console\n$ true\n```", "background: 8080 is no mark"),
        ("<!-- not run: why -->\n\ntext\n", "right before its block"),
    ],
)
def test_a_wrong_page_fails(text, message, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    with pytest.raises(Wrong, match=message):
        run(tmp_path, monkeypatch, text + "\n")


def test_a_command_in_the_background_ends_before_the_next(tmp_path, monkeypatch):
    run(
        tmp_path,
        monkeypatch,
        """
<!-- background (python) -->
```console
$ python -c "import sys, time; print('ready'); open('first', 'w'); time.sleep(60)"
ready
$ test -e first
$ python -c "print('again'); import time; time.sleep(60)"
again
```
""",
    )


SERVER = """
<!-- shell
cat > server.py <<'END'
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if self.path == "/loads" else 200)
        self.end_headers()
        self.wfile.write(b"answer")

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print(f"http://127.0.0.1:{server.server_port} serves", flush=True)
print("and more", flush=True)
server.serve_forever()
END
-->
<!-- background (python): port 8080 -->
```console
$ python server.py --port 8080  # a comment
http://127.0.0.1:8080 serves
$ curl http://127.0.0.1:8080/
$ curl http://127.0.0.1:8080/loads
answer
$ CURL
```

```python
from urllib.request import urlopen

assert urlopen("http://127.0.0.1:8080/").read() == b"answer"
```
"""


def test_a_server_of_a_page_has_a_port_of_its_own(tmp_path, monkeypatch):
    with ExitStack() as stack:
        with suppress(OSError):  # taken by someone else
            stack.enter_context(socket.create_server(("127.0.0.1", 8080)))
        run(tmp_path, monkeypatch, SERVER.replace("CURL", "curl -f http://127.0.0.1:8080/"))


def test_an_error_is_no_answer_of_a_server(tmp_path, monkeypatch):
    with pytest.raises(Wrong, match="exit code 22"):
        run(tmp_path, monkeypatch, SERVER.replace("CURL", "curl http://127.0.0.1:8080/loads"))


@pytest.mark.parametrize(
    ("shown", "printed", "vary"),
    [
        ("a  b", "a b", False),
        ("0.785", "0.787", False),
        ("1,526.6 ms", "3.1 ms", False),
        ("48.3 MB", "51 MB", False),
        ("3.6e-07", "0.0e+00", False),
        ("loss 3.25", "loss 17.0", True),
        ("gte-fp32 [1, 256]", "gte-fp32 [1, 256]", False),
        ("a … c", "a b b c", False),
    ],
)
def test_output_that_is_the_same(shown, printed, vary):
    assert pages.same([shown], printed, vary=vary)


@pytest.mark.parametrize(
    ("shown", "printed", "vary"),
    [
        ("0.785", "0.788", False),
        ("17", "18", True),
        ("loss 3.25", "loss 17.0", False),
        ("fp32", "fp16", True),
        ("[1, 256]", "[2, 256]", False),
        ("a … c", "a b", False),
        ("a", "a\nb", False),
    ],
)
def test_output_that_is_another(shown, printed, vary):
    assert not pages.same([shown], printed, vary=vary)
