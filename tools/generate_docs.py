"""Write the generated parts of the documents, or check that they are up to date.

    python tools/generate_docs.py            # write (make docs)
    python tools/generate_docs.py --check    # exit with 1 and a diff when a page is stale

docs/python-api.md is built from signatures and docstrings, docs/command-line.md from the output of `--help`,
docs/families.md from the registry of families, docs/checkpoints-verified.md from the table of published checkpoints and
the results of `gte-export verify-published`, docs/reliability.md from the results of the reliability battery. In every
other page, the blocks between `<!-- generated: COMMAND --help -->` and `<!-- end -->` are filled, and those between
`<!-- file: PATH -->` and `<!-- end -->` with the file.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import importlib
import inspect
import io
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
API, COMMANDS = ROOT / "docs" / "python-api.md", ROOT / "docs" / "command-line.md"
FAMILY_PAGE = ROOT / "docs" / "families.md"
PUBLISHED_PAGE, PUBLISHED_RESULTS = ROOT / "docs" / "checkpoints-verified.md", ROOT / "benchmarks/results/published"
RELIABILITY_PAGE, BATTERY_RESULTS = ROOT / "docs" / "reliability.md", ROOT / "benchmarks/results/reliability"
BLOCK = re.compile(r"(<!-- generated: ([\w -]+?) --help -->\n).*?(<!-- end -->)", re.DOTALL)
FILE_BLOCK = re.compile(r"(<!-- file: ([\w./-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
LANGUAGES = {".py": "python", ".mjs": "javascript", ".html": "html"}
NOTICE = "<!-- Written by tools/generate_docs.py: change the docstrings or the options, then run `make docs`. -->"
# The installed commands -> module:function.
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
INTERNAL = ("after_fork", "add", "watch", "unwatch")  # public by name, but called by the package itself

Definition = ast.ClassDef | ast.FunctionDef


def source(module: str) -> str:
    """Return the source of a project's module, which is a file or a package."""
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def find(module: str, name: str) -> tuple[str, Definition]:
    """Follow imports to the definition of a name in the project; return its module and node. Raises LookupError."""
    if module.split(".")[0] != "gte_deploy":
        raise LookupError(f"{name} is from {module}")
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return find(node.module, alias.name)
    raise LookupError(f"{module} neither defines nor imports {name}")


def methods(module: str, definition: ast.ClassDef) -> dict[str, tuple[str, ast.FunctionDef]]:
    """Return the public methods of a class and its constructor, with their modules; a class's own methods win."""
    found = {
        node.name: (module, node)
        for node in definition.body
        if isinstance(node, ast.FunctionDef) and f"{node.name}.setter" not in map(ast.unparse, node.decorator_list)
    }
    for base in definition.bases:
        with contextlib.suppress(LookupError):
            where, parent = find(module, ast.unparse(base))
            assert isinstance(parent, ast.ClassDef)
            found = {**methods(where, parent), **found}
    names = (name for name in sorted(found) if name in ("__init__", "__call__") or not name.startswith("_"))
    return {name: found[name] for name in names if name not in INTERNAL}


def signature(module: str, call: str, node: ast.FunctionDef) -> str:
    """Return a call as the source declares it, without `self`."""
    lines = source(module).splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    text = textwrap.dedent("\n".join(lines)).rstrip(":")
    return re.sub(r"\bself(,\s+)?", "", re.sub(r"^def \w+", call, text), count=1)


def prose(node: Definition) -> str:
    """Convert a docstring to Markdown: the sections of arguments and errors become lists."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(ast.get_docstring(node) or "").splitlines():
        if title := re.fullmatch(r"(Args|Raises|Returns):", line):
            section = title[1]
            lines += [f"**{section.replace('Args', 'Arguments')}**", ""]
        elif section in ("Args", "Raises") and (item := re.match(r" {4}(\w[\w, ]*): ?(.*)", line)):
            lines.append(f"- {', '.join(f'`{name}`' for name in item[1].split(', '))}: {item[2]}")
        else:
            lines.append(line[6 if section in ("Args", "Raises") else 4 :] if section else line)
    return "\n".join(lines).strip()


def section(title: str, module: str, node: Definition) -> str:
    """Write one class, function, method or property; the last word of its title is the name of the call."""
    call = ""
    if isinstance(node, ast.FunctionDef) and "property" not in map(ast.unparse, node.decorator_list):
        call = f"```python\n{signature(module, title.split()[-1], node)}\n```\n\n"
    return f"{title}\n\n{call}{prose(node)}\n"


def class_sections(module: str, name: str, *, variable: str, constructor: bool) -> Iterator[str]:
    """Yield the section of a class, and one for each of its public methods."""
    where, node = find(module, name)
    assert isinstance(node, ast.ClassDef)
    yield section(f"## {module}.{name}", where, node)
    for method, (at, definition) in methods(where, node).items():
        if method == "__call__":
            yield section(f"### {variable}", at, definition)
        elif method != "__init__":
            yield section(f"### {variable}.{method}", at, definition)
        elif constructor:
            yield section(f"### {module}.{name}", at, definition)


def error_rows() -> Iterator[str]:
    """Yield a row for each of the package's errors: its bases, its meaning, and the exit code of the commands."""
    exit_code_of = importlib.import_module("gte_deploy.core.exit_codes").exit_code_of
    package = importlib.import_module("gte_deploy")
    for name in (name for name in package.__all__ if name.endswith("Error")):
        error, meaning = getattr(package, name), prose(find("gte_deploy", name)[1])
        bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        bare = type(name, (error,), {"__init__": lambda self: None})()  # some errors need more than a message
        yield f"| `{name}` | {bases} | {meaning} | {exit_code_of(bare)} |"


EXPORT = (
    ("gte_deploy.exporters.export", "export"),
    ("gte_deploy.exporters.options", "ExportOptions"),
    ("gte_deploy.exporters.targets.cpu", "CpuOptions"),
    ("gte_deploy.exporters.targets.cpu", "CalibrationOptions"),
    ("gte_deploy.exporters.targets.cuda.target", "CudaOptions"),
    ("gte_deploy.exporters.targets.tensorrt.options", "TensorRTOptions"),
    ("gte_deploy.exporters.adoption", "adopt"),
    ("gte_deploy.exporters.conversion", "convert"),
    ("gte_deploy.bundle.upload", "push_to_hub"),
    ("gte_deploy.exporters.triton.repository", "export_repository"),
    ("gte_deploy.exporters.triton.options", "TritonOptions"),
)


def api_page() -> str:
    """Return the whole of docs/python-api.md."""
    parts = [f"{NOTICE}\n\n# The Python API\n", section("## gte_deploy.load", *find("gte_deploy", "load"))]
    parts += class_sections("gte_deploy", "Model", variable="model", constructor=False)
    parts += class_sections(
        "gte_deploy.text.model_tokenizer", "ModelTokenizer", variable="model.tokenizer", constructor=False
    )
    parts += class_sections("gte_deploy", "Call", variable="call", constructor=True)
    parts += [section(f"## gte_deploy.{name}", *find("gte_deploy", name)) for name in ("Usage", "JoinOptions")]
    parts += [
        section(f"## gte_deploy.{name}", *find("gte_deploy", name))
        for name in ("TokenChunks", "SentenceChunks", "ChunkEmbeddings")
    ]
    bulk = ("encode_files", "BulkOptions", "BulkSummary")
    parts += [section(f"## gte_deploy.bulk.{name}", *find("gte_deploy.bulk", name)) for name in bulk]
    parts += class_sections("gte_deploy.triton", "Client", variable="client", constructor=True)
    for module, name in EXPORT:
        parts.append(section(f"## {module}.{name}", *find(module, name)))
        if name.endswith("Options"):
            table = importlib.import_module("gte_deploy.core.options").options_table
            parts.append(f"{table(getattr(importlib.import_module(module), name))}\n")
    parts += ["## Errors\n\nAll are in `gte_deploy`. The last column is the exit code that the commands end with.\n"]
    return "\n".join([*parts, "| error | bases | meaning | exit code |\n|---|---|---|---|", *error_rows(), ""])


@functools.cache
def help_of(command: str) -> str:
    """Return the output of `command --help`, 100 columns wide."""
    name, *rest = command.split()
    module, _, main = SCRIPTS[name].partition(":")
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), main)([*rest, "--help"])
    return printed.getvalue()


def filled(page: str) -> str:
    """Return a page with its generated blocks filled again."""
    page = BLOCK.sub(lambda m: f"{m[1]}```text\n$ {m[2]} --help\n{help_of(m[2])}```\n{m[3]}", page)
    return FILE_BLOCK.sub(lambda m: f"{m[1]}{file_block(ROOT / m[2])}{m[3]}", page)


def file_block(file: Path) -> str:
    """Return a file as a block of code."""
    return f"```{LANGUAGES[file.suffix]}\n{file.read_text(encoding='utf-8')}```\n"


COMMANDS_INTRODUCTION = """# The command lines

What `gte-deploy`, `gte-export` and `gte-train` print for `--help`, below. They have in common:

- Results go to stdout; errors, warnings and progress go to stderr.
- Progress is shown on a terminal. `--progress` shows it elsewhere, too; `--quiet` leaves only results and errors. The
  losses of `gte-train run` are its log, which `--quiet` alone leaves out.
- `--json` prints results as JSON on stdout. An error is then one more JSON object on stdout, the last line:
  `{"error": {"type": "InputError", "message": "…", "advice": "…", "exit_code": 2}}`. `type` is the class of the
  [Python API](python-api.md#errors), or UsageError, KeyboardInterrupt or the class of an error of the system;
  `message` is the whole message; `advice` is the part that says what to do next, or null. stderr has the message as
  text.
- Choices are taken in lower or upper case, with `_` or `-`. What is unknown is refused with the nearest known word.
- A command never replaces a bundle, repository, corpus or checkpoint that exists, unless `--force` is given. Files
  (`gte-deploy encode --output vectors.parquet`) are replaced, when the new one is complete, and keep their mode; new
  ones have the mode that the umask leaves. Of a link, the file is replaced that it names. A device or a pipe stays what
  it is, and gets the bytes.
- SIGTERM and SIGHUP end a command as Ctrl-C does, with exit code 143 or 129: unfinished folders are removed.
  `gte-train run` and the fine-tuning commands write a checkpoint, and end with 130; at SIGTERM `gte-deploy serve`
  answers what is in work, and ends with 0.
"""


def commands_page() -> str:
    """Return the whole of docs/command-line.md: every command, and the sub-commands that its help lists."""
    meanings = importlib.import_module("gte_deploy.core.exit_codes").MEANINGS
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in meanings.items())
    parts = [f"{NOTICE}\n\n{COMMANDS_INTRODUCTION}\n| exit code | meaning |\n|---|---|\n{rows}\n"]
    for command in SCRIPTS:
        printed = help_of(command)
        names = re.findall(r"^ {4}([a-z][\w-]*)(?!\S)", printed.partition("  COMMAND\n")[2], re.MULTILINE)
        names += re.findall(rf"^  {command} ([a-z][a-z-]*) ", printed, re.MULTILINE)  # as gte-export lists them
        for title in (f"## {command}", *(f"### {command} {name}" for name in names)):
            parts.append(f"{title}\n\n<!-- generated: {title.lstrip('# ')} --help -->\n<!-- end -->\n")
    return filled("\n".join(parts))


PASS_TITLES = {
    "rope": "rotation of queries and keys as one operator",
    "attention": "attention as one operator, with the mask folded into it",
    "alibi_attention": "attention with biased scores, without storing the biases of all pairs (CPUs)",
    "local_attention": "local attention in blocks (CPUs)",
    "projections": "three projections as GEMMs with bias (CPUs)",
    "qkv": "three projections as one GEMM (GPUs)",
    "flash": "flash attention in half precision (CUDA)",
    "up_gate": "up and gate projections as one GEMM (GPUs)",
    "glu": "the gated unit as one pass (CUDA)",
    "skip_layer_norm": "residual sum, LayerNorm and GEMM on token rows",
    "packed_attention": "attention without padding (CUDA, TensorRT)",
}
POSITION_TITLES = {
    "rotary": "rotary",
    "absolute": "a table with an embedding of each place",
    "alibi": "scores biased by distance (ALiBi)",
}
FAMILIES_INTRODUCTION = """# Families of models

This page lists the architectures that every command takes. Each is read strictly and without remote code, traced from
the class of transformers, fused, and compared with its own library in every export. JinaBERT and MosaicBERT, whose
network is remote code, have a network of this package. A pass that fires another number of times than the table says is
an error. [Fields of config.json](checkpoints.md) are honoured or refused by name; so are other values of `model_type`.
[Extending](extending.md#a-family) shows how to add a family.
"""
FAMILIES_END = """## What was verified

- The tests make random checkpoints with the classes of transformers, and save them as transformers and
  sentence-transformers do. They export them, and compare the bundles with transformers' pipelines,
  SentenceTransformer, CrossEncoder and SparseEncoder: ONNX Runtime and OpenVINO in FP32 for all families, INT8 on CPUs
  and TensorRT-RTX's build of an engine too (`make test-slow`). The bounds are those of [numerics](numerics.md).
- The numbers of parameters of the published base and large models are tested from their sizes alone. The
  hub's weights were out of reach, and their scores and speed were not measured here:
  [published checkpoints](checkpoints-verified.md) lists them, and the command that verifies one.
- CUDA graphs of families other than GTE were emulated on a CPU, and not run on a GPU.
- ModernBERT's hidden states and logits are also compared with a computation in float64 from the paper, in NumPy.
- The published layout of Nomic BERT is compared with a computation in NumPy and float64 that reads the stored tensors
  itself: hidden states, logits of the vocabulary and of labels, on PyTorch (also without padding) and in the graphs.
- The tests compare the network of JinaBERT v2 and MosaicBERT with the papers' formulas in float64, on random
  checkpoints in the published layouts. The published code never runs: an export compares token ids, pooling, prompts,
  limits and activations with the library, which runs this package's network, and its report says so. The published
  weights were not downloaded.

## Texts above the length of training

Biased scores (ALiBi) need no table of positions, so nothing in a checkpoint ends at a length. JinaBERT takes texts of
`max_position_embeddings` tokens, 8,192 in its published models. MosaicBERT takes those of `alibi_starting_size` tokens
if this is more: as its model card says, raise it in config.json for longer texts. In both, a limit of the tokenizer
(`model_max_length`) holds too. On CPUs a run never stores the biases or the scores of all pairs of tokens
([how](decisions/alibi-in-chunks.md)); on GPUs it stores both.

## What is refused

- Removal of padding on GPUs (`padding="remove"`) for families without the pass "packed_attention": the passes for it
  rewrite rotary attention and gated layers. `padding="auto"` keeps padding there.
- Nomic BERT with `rotary_scaling_factor`: texts above `max_trained_positions` tokens. Their rotary frequencies depend
  on the length of the text and on earlier texts. Without the factor, `n_positions` is the limit. Mixtures of experts
  (nomic-embed-text-v2-moe) are refused.
- A sentencepiece model (`sentencepiece.bpe.model`) without tokenizer.json, if the extra `sentencepiece` is not
  installed: transformers converts the model with it when the checkpoint is read. Bundles have a tokenizer.json.
- Multi-vector models on ModernBERT whose queries are lengthened by tokens without attention to more than the window of
  local attention allows ([why](bundle.md#multi-vector-models)).
- Pretraining (`gte-train run`) of other families than GTE. `gte-train glue` fine-tunes all of them
  ([evaluation](evaluation.md#glue)).
- JinaBERT with normalised queries and keys (`jinaai/jina-bert-v2-qk-post-norm`, jina-embeddings-v2-base-code), which
  is another network under the same class names; JinaBERT with a table of positions.
"""


def family_section(family: Any, shared: tuple[str, ...]) -> str:
    """Write one family: its facts, and a table of its passes.

    Args:
        family: the family.
        shared: values of `model_type` of other families, under which it is published too.
    """
    layer = {"num_hidden_layers": 1, "hidden_activation": "gelu", "feed_forward_type": "geglu"}
    per_layer, local = (
        family.sites(SimpleNamespace(**layer, layer_types=[kind])) for kind in ("full_attention", "sliding_attention")
    )
    limit = "max_position_embeddings" + (" - pad_token_id - 1" if family.counts_after_padding else "")
    padding = "PyTorch on GPUs in bfloat16" if family.runs_packed else "nowhere"
    padding += ", CUDA and TensorRT" if "packed_attention" in per_layer else ""
    left_out = "; ".join(
        f"{task}: {', '.join(f'`{prefix}*`' for prefix in prefixes)}" for task, prefixes in family.left_out.items()
    )
    tasks = [f"{task} (`{name}`)" for task, name in family.classes.items()]
    tasks += ["sparse (on the heads of fill-mask and token-classify)", "hybrid (on that of token-classify)"]
    tasks += ["multi-vector (on the encoder)"]
    rows = {
        "`model_type`": ", ".join(f"`{name}`" for name in (*family.model_types, *shared)),
        "tasks": ", ".join(tasks),
        "positions": POSITION_TITLES[family.positions],
        "longest text in tokens": f"`{limit}`",
        "network": f"of {'transformers' if family.module == 'transformers' else 'this package'}",
        "layouts": "native and original" if family.original_config else "that of transformers",
        "padding is removed in": padding,
        "last layer for the rows that are asked for": "fill-mask, embed and hybrid with CLS pooling, classify"
        + (" with CLS pooling" if family.head_transform else ""),
        "tensors that are left out": left_out or "none",
    }
    lines = [f"## {family.fields.name.removeprefix('config.json of ')}\n", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "| fusion pass | sites of each layer | |", "|---|---|---|"]
    for name, what in PASS_TITLES.items():
        count, in_local = per_layer.get(name, 0), local.get(name, 0)
        counts = f"{count}" if count == in_local else f"{count} with global attention, {in_local} with local"
        lines.append(f"| {name} | {counts} | {what} |")
    return "\n".join([*lines, ""])


def families_page() -> str:
    """Return the whole of docs/families.md, from the registry of families."""
    package = importlib.import_module("gte_deploy.models.families")
    found = {place: package.family_of_type(name) for name, place in package.FAMILIES.items()}
    shared = package.SHARED_TYPES
    sections = [
        family_section(family, tuple(kind for kind in shared if family.model_types[0] in shared[kind]))
        for family in found.values()
    ]
    return "\n".join([NOTICE, "", FAMILIES_INTRODUCTION, *sections, FAMILIES_END])


def published_page() -> str:
    """Return the whole of docs/checkpoints-verified.md."""
    published = importlib.import_module("gte_deploy.exporters.published.page")
    notice = "<!-- Written by tools/generate_docs.py from models/published.py and the results: run `make docs`. -->"
    return f"{notice}\n\n{published.checkpoints_page(PUBLISHED_RESULTS)}"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every page with generated parts, and its new content."""
    yield API, api_page()
    yield COMMANDS, commands_page()
    yield FAMILY_PAGE, families_page()
    yield PUBLISHED_PAGE, published_page()
    yield RELIABILITY_PAGE, importlib.import_module("tools.reliability_page").reliability_page(BATTERY_RESULTS)
    written = {API, COMMANDS, FAMILY_PAGE, PUBLISHED_PAGE, RELIABILITY_PAGE}
    for file in (ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - written)):
        yield file, filled(file.read_text(encoding="utf-8"))


def main() -> int:
    """Write or check the pages; return 1 if a page is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 and a diff for a stale page")
    check = parser.parse_args().check
    stale = 0
    for file, text in pages():
        name, found = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8") if file.exists() else ""
        if found != text and check:
            stale = 1
            sys.stdout.writelines(difflib.unified_diff(found.splitlines(True), text.splitlines(True), name, "wanted"))
        elif found != text:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return stale


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
