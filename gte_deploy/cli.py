"""`gte-deploy`: ask a model from the command line. Results on stdout, logs and progress on stderr."""

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy._version import __version__
from gte_deploy.bulk.options import BulkOptions, output_format
from gte_deploy.cli_options import (
    BatchingOptions,
    BenchOptions,
    ChunkingOptions,
    ClassifyTokensOptions,
    CompareOptions,
    CompletionOptions,
    EncodeHybridOptions,
    EncodeMultiVectorOptions,
    EncodeOptions,
    EncodeSparseOptions,
    FileOptions,
    FillMaskOptions,
    InfoOptions,
    LoadOptions,
    ModelOptions,
    PickOptions,
    PredictOptions,
    PrintOptions,
    PromptOptions,
    PushOptions,
    RankOptions,
    ServedModelsOptions,
    SignOptions,
    TextOptions,
    VerifyOptions,
)
from gte_deploy.core.calls import JoinOptions
from gte_deploy.core.command_line import CommandParser, completes, progress_lines, run_command, shows_progress
from gte_deploy.core.completion import completion_script
from gte_deploy.core.errors import GteDeployError, InputError, MissingDependencyError
from gte_deploy.core.exit_codes import OK
from gte_deploy.core.files import follow_links, is_special, write_text, write_with
from gte_deploy.core.options import Given, add_arguments, parse_given, read_options
from gte_deploy.core.spec import TaskName
from gte_deploy.core.streams import prepare_streams
from gte_deploy.serving.options import ServerOptions

if TYPE_CHECKING:
    from gte_deploy.bulk.options import BulkMethod
    from gte_deploy.bulk.progress import BulkState
    from gte_deploy.bundle.signature import TrustedKeys
    from gte_deploy.core.activations import Activation
    from gte_deploy.core.spec import ModelSpec, ScoreFunction
    from gte_deploy.model import Model

_PROG = "gte-deploy"
_STDIN = "-"
_BYTE_ORDER_MARK = "\ufeff"  # with which some programs for Windows begin a file
_SECONDS_BETWEEN_LINES = 60
_METHODS = (
    "fill_mask",
    "encode",
    "predict",
    "classify_tokens",
    "encode_sparse",
    "encode_hybrid",
    "encode_multi_vector",
)
_TYPED = {
    **{f"use {method}, or": f"use `{_PROG} {method.replace('_', '-')}`, or" for method in _METHODS},
    "or load another model": "or give another --model",
}
"""Words of errors for callers in Python -> what they are on the command line."""


@dataclass(frozen=True)
class _Command:
    """One command: the function that runs it, its summary, and the dataclasses of its options."""

    run: Callable[[Given], None]
    summary: str
    options: tuple[type, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gte-deploy`; returns the exit code (see `gte_deploy.core.exit_codes`)."""
    prepare_streams()
    parser = _parser()
    if completes(parser, argv):
        return OK
    given = vars(parser.parse_args(argv))
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if "verbose" in given else logging.ERROR if "quiet" in given else logging.WARNING,
        format=f"{_PROG}: %(levelname)s: %(message)s",
    )
    command = _COMMANDS[given["command"]]
    with warnings.catch_warnings():
        if "verbose" not in given:
            warnings.simplefilter("ignore")  # of the libraries that read a checkpoint, for their own callers
        return run_command(_PROG, partial(command.run, given), given, kinds=command.options, names=_TYPED)


def _parser() -> argparse.ArgumentParser:
    summary = "Run GTE models: fill masks, embed, rank, classify; serve them; verify bundles."
    parser = CommandParser(prog=_PROG, description=summary)
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in _COMMANDS.items():
        inner = commands.add_parser(name, help=command.summary, description=command.summary)
        for kind in (*command.options, PrintOptions):
            add_arguments(inner, kind)
    return parser


def _fill_mask(given: Given) -> None:
    texts = _texts(given)
    with _load(given) as model:
        # All texts in one call, so that they share batches; a list of one text is answered like the text alone.
        arguments = _arguments(given, FillMaskOptions, BatchingOptions)
        answers = model.fill_mask(texts, show_progress_bar=_shows_bar(given, texts), **arguments)
    for text, answer in zip(texts, [answers] if len(texts) == 1 else answers, strict=True):
        if "json" in given:
            print(json.dumps(answer))
            continue
        print(text)
        for masks in answer if isinstance(answer[0], list) else [answer]:
            for candidate in masks:
                print(f"  {candidate['score']:.4f}  {candidate['token_str']:<16} {candidate['sequence']}")


def _shows_bar(given: Given, inputs: Sequence[Any]) -> bool:
    """Whether a bar counts the answered inputs: where progress is shown, and there is more than one."""
    return shows_progress(given) and (len(inputs) > 1 or "progress" in given)


def _encode(given: Given) -> None:
    from gte_deploy.models import BUILTIN_EMBED_NAME

    given = {"path": BUILTIN_EMBED_NAME, **given}
    files = read_options(FileOptions, given)
    arguments = _arguments(given, EncodeOptions, PromptOptions, BatchingOptions)
    arguments |= (chunking := read_options(ChunkingOptions, given).arguments())
    if _are_files(given, files):
        _encode_files(given, files, "encode", arguments)
        return
    texts, output = _texts(given), files.output
    if output is not None:
        _check_output(output)
    if chunking and output is not None:
        raise InputError("--output holds one embedding for each text, and --chunks gives several; leave one out")
    with _load(given) as model:
        if model.spec.task in ("sparse", "multi-vector"):
            raise InputError(f"{model.path} is made for {model.spec.task}: use {_PROG} encode-{model.spec.task}")
        embeddings = model.encode(texts, show_progress_bar=_shows_bar(given, texts), **arguments)
    if chunking:
        from gte_deploy.tasks.chunks import chunk_records

        for record in chunk_records(embeddings):
            print(json.dumps(record))
        return
    if output is None:
        for embedding in embeddings.tolist():
            print(json.dumps(embedding))
        return
    from gte_deploy.core.arrays import array_writer  # imports numpy

    write_with(output, array_writer(embeddings))
    if "quiet" not in given:
        print(f"{_PROG}: wrote {output}: {embeddings.shape} {embeddings.dtype}", file=sys.stderr)


def _check_output(output: Path) -> None:
    """Refuse an output for a list of texts, before the model is loaded; a device or a pipe needs no extension."""
    if not follow_links(output).parent.is_dir():
        raise InputError(f"--output {output}: the folder does not exist")
    if not is_special(output) and output_format(output, None) != "npy":
        raise InputError(f"--output {output}: a list of texts is written as .npy")


def _are_files(given: Given, files: FileOptions) -> bool:
    """Whether the command reads a file and writes one.

    Raises:
        InputError: it does not, and an option is given that has no meaning then.
    """
    if not given.get("texts") and files.input not in (None, _STDIN) and files.output is not None:
        return True
    for kind in (BulkOptions, FileOptions):
        if for_files := parse_given(kind, given).keys() - {"input", "output"}:
            name = sorted(for_files)[0].replace("_", "-")
            raise InputError(f"--{name} is for files: give --input FILE and --output FILE, too")
    return False


def _encode_files(
    given: Given, files: FileOptions, method: "BulkMethod", arguments: dict[str, Any], task: TaskName | None = None
) -> None:
    """Encode a file by a method of the model; `task` replaces a checkpoint's own task."""
    from gte_deploy.bulk import encode_files

    options = read_options(BulkOptions, given)
    line = _ProgressLine()
    try:
        summary = encode_files(
            str(files.input),
            files.output or "",
            model=_arguments(given, ModelOptions).get("path"),
            options=options,
            load_options=_load_arguments(given, task),
            encode_options=arguments,
            method=method,
            report=line.show if shows_progress(given) else None,
        )
    except KeyboardInterrupt:
        parts = None if files.output is None else Path(f"{follow_links(files.output)}.parts")
        if parts is not None and parts.is_dir():
            print(f"{_PROG}: {parts} keeps what is done; repeat the command to go on", file=sys.stderr)
        raise
    finally:
        line.end()
    if "json" in given:
        print(json.dumps(summary.to_json()))
    elif "quiet" not in given:
        print(f"{_PROG}: {summary.describe()}", file=sys.stderr)
    if summary.failures > files.max_failures:
        raise GteDeployError(
            f"{summary.failures:,} rows have no vector, and --max-failures is {files.max_failures:,}; "
            f"{summary.failures_file} says why"
        )


class _ProgressLine:
    """Shows the state of a run on stderr: on one line of a terminal, else as a line each minute."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._shown: float | None = None

    def show(self, state: "BulkState") -> None:
        """Show a state."""
        if self._on_terminal:
            print(f"\r\x1b[K{state.describe()}", end="", file=sys.stderr, flush=True)
        elif self._shown is None or state.seconds - self._shown >= _SECONDS_BETWEEN_LINES:
            print(f"{_PROG}: {state.describe()}", file=sys.stderr, flush=True)
        else:
            return
        self._shown = state.seconds

    def end(self) -> None:
        """End the line."""
        if self._on_terminal and self._shown is not None:
            print(file=sys.stderr)


def _encoded_files(given: Given, method: "BulkMethod", arguments: dict[str, Any], task: TaskName | None = None) -> bool:
    """Encode a file, if the command line names one and a file to write; says whether it does."""
    files = read_options(FileOptions, given)
    if _are_files(given, files):
        _encode_files(given, files, method, arguments, task)
        return True
    if files.output is not None:
        raise InputError(f"--output {files.output} is for files: give --input FILE, too, or let the answers be printed")
    return False


def _encode_sparse(given: Given) -> None:
    arguments = _arguments(given, EncodeSparseOptions, PromptOptions, BatchingOptions)
    if _encoded_files(given, "encode_sparse", arguments, "sparse"):
        return
    texts = _texts(given)
    with _load(given, task="sparse") as model:
        embeddings = model.encode_sparse(texts, show_progress_bar=_shows_bar(given, texts), as_dict=True, **arguments)
    for embedding in embeddings:
        print(json.dumps(embedding, ensure_ascii="json" in given))


def _encode_hybrid(given: Given) -> None:
    arguments = _arguments(given, EncodeHybridOptions, PromptOptions, BatchingOptions)
    if _encoded_files(given, "encode_hybrid", arguments, "hybrid"):
        return
    texts = _texts(given)
    with _load(given, task="hybrid") as model:
        found = model.encode_hybrid(texts, show_progress_bar=_shows_bar(given, texts), as_dict=True, **arguments)
    for dense, sparse in zip(found.dense.tolist(), found.sparse, strict=True):
        print(json.dumps({"dense": dense, "sparse": sparse}, ensure_ascii="json" in given))


def _encode_multi_vector(given: Given) -> None:
    route = read_options(EncodeMultiVectorOptions, given).route
    arguments = _arguments(given, PromptOptions, BatchingOptions)
    if _encoded_files(given, "encode_multi_vector", arguments | {"is_query": route == "query"}):
        return
    texts = _texts(given)
    with _load(given) as model:
        if model.spec.task != "multi-vector":
            raise InputError(
                f"this needs a multi-vector model, and {model.path} is made for {model.spec.task}; give another --model"
            )
        encode = model.encode_query if route == "query" else model.encode_document
        embeddings = encode(texts, show_progress_bar=_shows_bar(given, texts), **arguments)
    for embedding in embeddings:
        print(json.dumps(embedding.tolist()))


def _rank(given: Given) -> None:
    texts = _texts(given)
    arguments = _arguments(given, RankOptions, BatchingOptions)
    with _load(given) as model:
        bar = _shows_bar(given, texts)
        ranking = model.rank(documents=texts, return_documents=True, show_progress_bar=bar, **arguments)
    for entry in ranking:
        line = f"{entry['score']:.4f}  {entry['corpus_id']}  {entry['text']}"
        print(json.dumps(entry) if "json" in given else line)


def _predict(given: Given) -> None:
    options = read_options(PredictOptions, given)
    inputs = _pairs(given) if options.pairs else [(text,) for text in _texts(given)]
    arguments = _arguments(given, PromptOptions, BatchingOptions)
    with _load(given) as model:
        if model.spec.task == "token-classify":
            raise InputError(f"{model.path} labels the tokens of a text: use {_PROG} classify-tokens")
        function = _function_of(options.function_to_apply, model.spec)
        scores = model.predict(inputs, activation_fn=function, show_progress_bar=_shows_bar(given, inputs), **arguments)
        names = model.spec.id2label
    for texts, row in zip(inputs, scores.reshape(len(inputs), -1).tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda label: -row[label])
        found = [{"label": names.get(label, f"LABEL_{label}"), "score": row[label]} for label in order]
        if "json" in given:
            print(json.dumps(found))
            continue
        print("\t".join(texts))
        for entry in found:
            print(f"  {entry['score']:.4f}  {entry['label']}")


def _pairs(given: Given) -> list[tuple[str, str]]:
    """The pairs of the command line, or those of the lines of --input."""
    texts = _texts(given)
    if given.get("texts"):
        if len(texts) % 2:
            raise InputError(f"--pairs takes the texts two by two, and there are {len(texts)}")
        return list(zip(texts[::2], texts[1::2], strict=True))
    pairs = []
    for number, line in enumerate(texts, 1):
        first, tab, second = line.partition("\t")
        if not tab or "\t" in second:
            raise InputError(f"line {number} has {line.count(chr(9))} tabs; with --pairs, one is between two texts")
        pairs.append((first, second))
    return pairs


def _function_of(name: "ScoreFunction | None", spec: "ModelSpec") -> "Activation | None":
    from gte_deploy.core.activations import identity, sigmoid, softmax

    if name is None:
        return softmax if spec.activation is None and spec.num_labels > 1 else None
    return {"none": identity, "sigmoid": sigmoid, "softmax": softmax}[name]


def _classify_tokens(given: Given) -> None:
    texts, options = _texts(given), read_options(ClassifyTokensOptions, given)
    with _load(given) as model:
        arguments = _arguments(given, ClassifyTokensOptions, BatchingOptions)
        answers = model.classify_tokens(texts, show_progress_bar=_shows_bar(given, texts), **arguments)
    label = "entity" if options.aggregation_strategy == "none" else "entity_group"
    for text, entities in zip(texts, answers, strict=True):
        if "json" in given:
            print(json.dumps(entities))
            continue
        print(text)
        for entity in entities:
            print(f"  {entity['score']:.4f}  {entity[label]:<8} {entity['start']}-{entity['end']}  {entity['word']}")


def _verify(given: Given) -> None:
    from gte_deploy.bundle.download import resolve_bundle
    from gte_deploy.bundle.inspection import check_graphs
    from gte_deploy.bundle.manifest import files_besides, manifest_bytes, open_bundle
    from gte_deploy.bundle.signature import TrustedKeys, read_signatures

    options = read_options(VerifyOptions, given)
    trusted = None if options.keys is None else TrustedKeys(options.keys)
    if options.checkpoint is not None:
        from gte_deploy.models import require_checkpoint

        require_checkpoint(options.checkpoint)
    tell = progress_lines(_PROG, given) or (lambda line: None)
    folder = resolve_bundle(options.bundle, trusted)
    tell(f"compare the files of {folder} with its manifest")
    manifest = open_bundle(folder, trusted)
    check_graphs(folder, manifest)
    if besides := files_besides(folder, manifest):
        logging.getLogger(__name__).warning(
            "the manifest does not name %d files of %s, which nothing verifies or loads; the first: %s",
            len(besides),
            folder,
            besides[0],
        )
    size = sum(entry.size for entry in manifest.files.values())
    checksum = manifest.to_json()["checksum"]
    signer = None if trusted is None else trusted.require_signature(folder, manifest_bytes(folder))
    check = None
    if options.checkpoint is not None:
        tell(f"compare its answers with those of {options.checkpoint}")
        from gte_deploy.exporters.verification.answers import verify_against

        check = verify_against(folder, options.checkpoint)
    if "json" in given:
        counts = {"files": len(manifest.files), "bytes": size}
        facts = {"path": str(folder), "verified": True, **counts, "checksum": checksum, "signed_by": signer}
        print(json.dumps(facts if check is None else {**facts, "answers": check.to_json()}))
        return
    print(
        f"{options.bundle}: {len(manifest.files)} files, {size:,} bytes, all as the manifest says, checksum {checksum}"
    )
    if signer is not None:
        print(f"The manifest is signed by the key {signer}")
    elif read_signatures(folder):
        print("Its signature was not checked: --key FILE checks it")
    if check is not None:
        compared = ", ".join(f"{what} {value}" for what, value in check.compared.items())
        print("\n".join([f"It answers as {options.checkpoint} does: {compared}", *check.skipped]))


def _sign(given: Given) -> None:
    from gte_deploy.bundle.signing import sign_bundle

    arguments = _arguments(given, SignOptions)
    if (tell := progress_lines(_PROG, given)) is not None:
        tell(f"compare the files of {arguments['bundle']} with its manifest, and sign it")
    signed = sign_bundle(**arguments)
    print(json.dumps(signed.to_json()) if "json" in given else signed.describe())


def _push(given: Given) -> None:
    from gte_deploy.bundle.upload import push_to_hub

    arguments = _arguments(given, PushOptions)
    if (tell := progress_lines(_PROG, given)) is not None:
        tell(f"compare the files of {arguments['bundle']} with its manifest, and push them")
    pushed = push_to_hub(**arguments)
    print(json.dumps(dataclasses.asdict(pushed)) if "json" in given else pushed.describe())


def _info(given: Given) -> None:
    from gte_deploy.bundle.download import resolve_model
    from gte_deploy.bundle.facts import facts_of, info_table

    folder = resolve_model(read_options(InfoOptions, given).model)
    facts = facts_of(folder)
    print(json.dumps(facts) if "json" in given else info_table(facts, folder))


def _completion(given: Given) -> None:
    print(completion_script(read_options(CompletionOptions, given).shell), end="")


def _bench(given: Given) -> None:
    from gte_deploy.bundle.download import resolve_bundle
    from gte_deploy.tuning.bench import bench, fastest, format_table, record

    options = read_options(PickOptions, given)
    if options.pick and ("num_threads" in given or "backend" in given):
        raise InputError("--pick measures every engine as it is loaded by default; leave out --threads and --backend")
    arguments = _arguments(given, BenchOptions)
    report = bench(
        resolve_bundle(arguments.pop("bundle")),
        **arguments,
        progress=progress_lines(_PROG, given) or (lambda line: None),
    )
    picked = None
    if options.pick:
        picked = fastest(report, precision_may_change=options.precision_may_change)
        file = record(report, picked)
        if "quiet" not in given:
            print(f"{_PROG}: recorded {picked.name} in {file}", file=sys.stderr)
    if "json" in given:
        print(json.dumps({**report.to_json(), "picked": picked and picked.name}))
        return
    print(format_table(report))
    if picked is not None:
        print(f"picked {picked.name}: load takes it for this bundle, on this machine, with backend 'auto'")


def _compare(given: Given) -> None:
    from gte_deploy.bundle.download import resolve_bundle

    options = read_options(CompareOptions, given)
    if options.html is not None and not options.html.parent.is_dir():
        raise InputError(f"--html {options.html}: the folder {options.html.parent} does not exist; make it first")
    texts = None if options.input is None else [line for line in _texts(given) if line.strip()]
    from gte_deploy.tuning.compare import compare_bundles, format_comparison

    result = compare_bundles(
        resolve_bundle(options.a),
        resolve_bundle(options.b),
        texts,
        repeats=options.repeats,
        num_threads=options.num_threads,
        progress=progress_lines(_PROG, given),
    )
    if options.html is not None:
        from gte_deploy.tuning.compare_page import render_comparison

        write_text(options.html, render_comparison(result))
    print(json.dumps(result.to_json()) if "json" in given else format_comparison(result))


def _serve(given: Given) -> None:
    options = read_options(ServerOptions, {"access_log": "json", **given} if "json" in given else given)
    try:
        from gte_deploy.serving.server import serve
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "starlette", "serve") from error
    from gte_deploy.bundle.signature import TrustedKeys
    from gte_deploy.loading import load
    from gte_deploy.serving.registry import named_sources

    arguments = {**_arguments(given, ServedModelsOptions), **_load_arguments(given)}
    names = named_sources(arguments.pop("models"))
    keys = arguments.get("trusted_keys")
    trusted = None if keys is None else TrustedKeys(keys)
    for path in names.values():
        _require_model(path, trusted)
    join = JoinOptions(max_queue_tokens=options.max_queue_tokens)
    sources = {name: partial(load, path, join_calls=join, **arguments) for name, path in names.items()}
    serve(sources, options)


def _require_model(path: str, trusted: "TrustedKeys | None") -> None:
    """Refuse what is plainly no model before the server says that it serves it; a hub id is not looked up."""
    from gte_deploy.bundle.manifest import is_bundle, read_manifest
    from gte_deploy.models import locate, require_checkpoint

    folder = locate(path)
    if isinstance(folder, Path) and trusted is not None:
        read_manifest(folder, trusted)
    elif not (isinstance(folder, Path) and is_bundle(folder)):
        require_checkpoint(path)


def _load(given: Given, task: TaskName | None = None) -> "Model":
    """Load the model that the command line names; `task` replaces a checkpoint's own task."""
    from gte_deploy.loading import load

    return load(**_arguments(given, ModelOptions), **_load_arguments(given, task))


def _load_arguments(given: Given, task: TaskName | None = None) -> dict[str, Any]:
    """Return the arguments of `load` that the command line gives, without the model; `task` is that of a checkpoint."""
    arguments = _arguments(given, LoadOptions)
    if task is not None and "trusted_keys" not in arguments:  # which only bundles satisfy
        from gte_deploy.bundle.download import resolve_model
        from gte_deploy.bundle.manifest import is_bundle
        from gte_deploy.models import is_builtin

        path = _arguments(given, ModelOptions).get("path")
        if is_builtin(path) or not is_bundle(resolve_model(path)):
            arguments["task"] = task
    # `encode` has an argument `precision`, too: the type of embeddings.
    if "compute_precision" in arguments:
        arguments["precision"] = arguments.pop("compute_precision")
    return arguments


def _arguments(given: Given, *kinds: type) -> dict[str, Any]:
    """Return the given options of the dataclasses as keyword arguments; other options keep the function's defaults."""
    return {name: value for kind in kinds for name, value in parse_given(kind, given).items()}


def _texts(given: Given) -> list[str]:
    """The texts of the command line, or the lines of --input."""
    options = read_options(TextOptions, given)
    if options.texts:
        if options.input is not None:
            raise InputError("give texts as arguments or with --input, not both")
        return list(options.texts)
    source = options.input or _STDIN
    if source == _STDIN and (sys.stdin is None or (options.input is None and sys.stdin.isatty())):
        raise InputError("no texts: give them as arguments, with --input FILE, or on stdin")
    try:
        data = sys.stdin.buffer.read() if source == _STDIN else Path(source).read_bytes()
        lines = data.decode("utf-8").removeprefix(_BYTE_ORDER_MARK).split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8: {error.reason} at byte {error.start:,}") from error
    except OSError as error:
        raise InputError(f"--input {source} cannot be read: {error.strerror}") from error
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


_TEXTS_OR_FILES = (FileOptions, TextOptions, BulkOptions)
_ANY_MODEL = (ModelOptions, LoadOptions, BatchingOptions)
_COMMANDS = {
    "fill-mask": _Command(
        _fill_mask,
        "Predict the [MASK] words of each text.",
        (TextOptions, FillMaskOptions, *_ANY_MODEL),
    ),
    "encode": _Command(
        _encode,
        "Embed each text, or its chunks: one JSON list or object a line, or a file of vectors, also of large files.",
        (*_TEXTS_OR_FILES, PromptOptions, EncodeOptions, ChunkingOptions, *_ANY_MODEL),
    ),
    "encode-sparse": _Command(
        _encode_sparse,
        "Weigh the vocabulary for each text: one JSON object of token and weight a line, heaviest first, or a file.",
        (*_TEXTS_OR_FILES, PromptOptions, EncodeSparseOptions, *_ANY_MODEL),
    ),
    "encode-hybrid": _Command(
        _encode_hybrid,
        "Embed each text densely and sparsely in one pass: one JSON object with both a line, or a file.",
        (*_TEXTS_OR_FILES, PromptOptions, EncodeHybridOptions, *_ANY_MODEL),
    ),
    "encode-multi-vector": _Command(
        _encode_multi_vector,
        "Embed each token of each text, for late interaction (ColBERT): one JSON list of lists a line, or a file.",
        (*_TEXTS_OR_FILES, PromptOptions, EncodeMultiVectorOptions, *_ANY_MODEL),
    ),
    "rank": _Command(
        _rank,
        "Order documents by a reranker's score with a query, or by MaxSim of a multi-vector model.",
        (RankOptions, TextOptions, *_ANY_MODEL),
    ),
    "predict": _Command(
        _predict,
        "Score the labels of each text, or pair of texts, by a classifier.",
        (PredictOptions, TextOptions, PromptOptions, *_ANY_MODEL),
    ),
    "classify-tokens": _Command(
        _classify_tokens,
        "Label the tokens of each text, such as the names in it.",
        (TextOptions, ClassifyTokensOptions, *_ANY_MODEL),
    ),
    "serve": _Command(
        _serve,
        "Serve models over HTTP, with the routes of text-embeddings-inference, OpenAI and Cohere.",
        (ServedModelsOptions, LoadOptions, ServerOptions),
    ),
    "verify": _Command(
        _verify, "Check every file of a bundle against its manifest, and its signature.", (VerifyOptions,)
    ),
    "sign": _Command(_sign, "Sign a bundle with your private key.", (SignOptions,)),
    "push": _Command(_push, "Verify a bundle and push it to the Hugging Face hub.", (PushOptions,)),
    "info": _Command(_info, "Say what a bundle or checkpoint is, without loading its weights.", (InfoOptions,)),
    "bench": _Command(
        _bench,
        "Time a bundle on every engine that this machine has for it, each in a process of its own.",
        (BenchOptions, PickOptions),
    ),
    "compare": _Command(
        _compare,
        "Put two bundles side by side: their answers to the same texts, speed and size.",
        (CompareOptions,),
    ),
    "completion": _Command(
        _completion,
        "Print the script that lets your shell complete gte-deploy, gte-export and gte-train.",
        (CompletionOptions,),
    ),
}
