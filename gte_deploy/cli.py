"""`gte-deploy`: ask a model from the command line. Results on stdout, logs and progress on stderr."""

import argparse
import dataclasses
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy._version import __version__
from gte_deploy.core.errors import GteDeployError, InputError, MissingDependencyError
from gte_deploy.core.exit_codes import BROKEN_PIPE, FAILURE, HELP, INTERRUPTED, OK, exit_code_of
from gte_deploy.core.spec import COMPUTE_PRECISIONS, POOLINGS, SPARSE_ROUTES, Task

if TYPE_CHECKING:
    from gte_deploy.model import Model

_PROG = "gte-deploy"
_STDIN = "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gte-deploy`; returns the exit code (see `gte_deploy.core.exit_codes`)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format=f"{_PROG}: %(levelname)s: %(message)s",
    )
    _never_fail_to_print()
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except GteDeployError as error:
        return _fail(str(error), exit_code_of(error))
    except BrokenPipeError:
        # The reader went away (`| head`): leave nothing for the interpreter to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _fail(str(error), FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description="Run GTE models: fill masks, embed, rank, classify tokens; verify bundles.", epilog=HELP
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fill_mask(commands)
    _add_encode(commands)
    _add_encode_sparse(commands)
    _add_rank(commands)
    _add_classify_tokens(commands)
    _add_verify(commands)
    _add_info(commands)
    _add_bench(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, epilog=HELP)
    parser.set_defaults(run=run)
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done on stderr")
    parser.add_argument("--json", action="store_true", help="print JSON, one line a result")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="bundle, checkpoint folder or hub id (default: the built-in model)")
    parser.add_argument(
        "--backend", choices=("auto", "onnx", "openvino", "torch", "tensorrt"), default="auto", help="default: auto"
    )
    parser.add_argument("--compute-precision", choices=COMPUTE_PRECISIONS, help="of openvino, and of torch on a GPU")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: what the bundle is made for, and else cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: every CPU it may use)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows of a batch (default: 32)")
    parser.add_argument("--max-batch-tokens", type=int, metavar="N", help="tokens of a batch, padding included")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest text in tokens (default: the model's)")
    parser.add_argument("--truncation", action="store_true", help="cut texts that are too long instead of failing")


def _add_texts(parser: argparse.ArgumentParser, name: str = "texts") -> None:
    parser.add_argument(name, nargs="*", metavar="TEXT", help="the texts; without any they are read from --input")
    parser.add_argument("-i", "--input", metavar="FILE", help="UTF-8 file with one text a line; - is stdin (default)")


def _add_fill_mask(commands: Any) -> None:
    parser = _add_command(commands, "fill-mask", _fill_mask, "Predict the [MASK] words of each text.")
    _add_texts(parser)
    _add_model_options(parser)
    parser.add_argument("-k", "--top-k", type=int, default=5, metavar="N", help="answers for each mask (default: 5)")
    parser.add_argument("--targets", nargs="+", metavar="WORD", help="choose among these words only")


def _add_encode(commands: Any) -> None:
    parser = _add_command(commands, "encode", _encode, "Embed each text: one JSON list a line, or a .npy file.")
    _add_texts(parser)
    _add_model_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE.npy", help="write one array [texts, size] instead of printing")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: the checkpoint's")
    _add_prompts(parser, "each text")
    parser.add_argument("--normalize", action="store_true", help="scale embeddings to length 1")
    parser.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N dimensions")
    parser.add_argument(
        "--precision",
        choices=("float32", "int8", "uint8", "binary", "ubinary"),
        default="float32",
        help="default: float32",
    )


def _add_encode_sparse(commands: Any) -> None:
    summary = "Weigh the vocabulary for each text: one JSON object of token and weight a line, heaviest first."
    parser = _add_command(commands, "encode-sparse", _encode_sparse, summary)
    _add_texts(parser)
    _add_model_options(parser)
    parser.add_argument("--route", choices=SPARSE_ROUTES, help="where queries and documents are encoded differently")
    parser.add_argument("--prompt-name", metavar="NAME", help="put this prompt of the model before each text")
    parser.add_argument("--prompt", metavar="TEXT", help="put this text before each text")
    parser.add_argument("--max-active-dims", type=int, metavar="N", help="keep the N heaviest (default: the model's)")


def _add_rank(commands: Any) -> None:
    parser = _add_command(commands, "rank", _rank, "Order documents by a reranker's score with a query.")
    parser.add_argument("-q", "--query", required=True, metavar="TEXT")
    _add_texts(parser)
    _add_model_options(parser)
    _add_prompts(parser, "the query")
    parser.add_argument("-k", "--top-k", type=int, metavar="N", help="documents to print (default: all)")


def _add_classify_tokens(commands: Any) -> None:
    summary = "Label the tokens of each text, such as the names in it."
    parser = _add_command(commands, "classify-tokens", _classify_tokens, summary)
    _add_texts(parser)
    _add_model_options(parser)
    parser.add_argument(
        "--aggregation-strategy",
        choices=("none", "simple", "first", "average", "max"),
        default="none",
        help="join neighbours with one label, as transformers' pipeline does (default: none, each token alone)",
    )
    parser.add_argument(
        "--ignore-labels", nargs="*", default=["O"], metavar="LABEL", help="labels not to print (default: O)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="cut long texts into windows that overlap by N tokens, and join them"
    )


def _add_prompts(parser: argparse.ArgumentParser, where: str) -> None:
    parser.add_argument("--prompt-name", metavar="NAME", help=f"put this prompt of the model before {where}")
    parser.add_argument("--prompt", metavar="TEXT", help=f"put this text before {where}")


def _add_verify(commands: Any) -> None:
    parser = _add_command(commands, "verify", _verify, "Check every file of a bundle against its manifest.")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        type=Path,
        help="also compare its answers to texts with those of the checkpoint's own library (needs the [export] extra)",
    )


def _add_info(commands: Any) -> None:
    parser = _add_command(commands, "info", _info, "Say what a bundle or checkpoint is, without loading its weights.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: the built-in model")


def _add_bench(commands: Any) -> None:
    summary = "Time a bundle on every engine that this machine has for it, each in a process of its own."
    parser = _add_command(commands, "bench", _bench, summary)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--backend", choices=("onnx", "openvino", "tensorrt"), help="this engine only")
    parser.add_argument(
        "--shapes", nargs="+", metavar="ROWSxTOKENS", help="of the batches (default: 1x16 1x128 1x512 8x128)"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls of each (default: 10)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: every CPU it may use)")
    parser.add_argument(
        "--pick", action="store_true", help="record the fastest in your cache, for every later load of this bundle here"
    )
    parser.add_argument(
        "--precision-may-change", action="store_true", help="let --pick take bf16, whose answers differ a little"
    )


def _fill_mask(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments)
    with _load(arguments) as model:
        # One text at a time would give up batching, and a list of one text is answered as the text alone.
        answers = model.fill_mask(
            texts,
            top_k=arguments.top_k,
            targets=arguments.targets,
            **_length_options(arguments),
            **_batch_options(arguments),
        )
    for text, answer in zip(texts, [answers] if len(texts) == 1 else answers, strict=True):
        if arguments.json:
            print(json.dumps(answer))
            continue
        print(text)
        for masks in answer if isinstance(answer[0], list) else [answer]:
            for candidate in masks:
                print(f"  {candidate['score']:.4f}  {candidate['token_str']:<16} {candidate['sequence']}")


def _encode(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments)
    if arguments.output is not None and not Path(arguments.output).parent.is_dir():
        raise InputError(f"--output {arguments.output}: the folder does not exist")
    with _load(arguments) as model:
        embeddings = model.encode(
            texts,
            arguments.prompt_name,
            arguments.prompt,
            show_progress_bar=sys.stderr.isatty(),
            precision=arguments.precision,
            normalize_embeddings=arguments.normalize,
            truncate_dim=arguments.truncate_dim,
            pooling=arguments.pooling,
            **_length_options(arguments),
            **_batch_options(arguments),
        )
    if arguments.output is None:
        for embedding in embeddings.tolist():
            print(json.dumps(embedding))
        return
    _save_array(Path(arguments.output), embeddings)
    print(f"{_PROG}: wrote {arguments.output}: {embeddings.shape} {embeddings.dtype}", file=sys.stderr)


def _encode_sparse(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments)
    with _load(arguments, task="sparse") as model:
        embeddings = model.encode_sparse(
            texts,
            arguments.prompt_name,
            arguments.prompt,
            show_progress_bar=sys.stderr.isatty(),
            max_active_dims=arguments.max_active_dims,
            route=arguments.route,
            as_dict=True,
            **_length_options(arguments),
            **_batch_options(arguments),
        )
    for embedding in embeddings:
        print(json.dumps(embedding, ensure_ascii=arguments.json))


def _rank(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments)
    with _load(arguments) as model:
        ranking = model.rank(
            arguments.query,
            texts,
            arguments.top_k,
            return_documents=True,
            prompt_name=arguments.prompt_name,
            prompt=arguments.prompt,
            **_length_options(arguments),
            **_batch_options(arguments),
        )
    for entry in ranking:
        print(json.dumps(entry) if arguments.json else f"{entry['score']:.4f}  {entry['corpus_id']}  {entry['text']}")


def _classify_tokens(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments)
    with _load(arguments) as model:
        answers = model.classify_tokens(
            texts,
            aggregation_strategy=arguments.aggregation_strategy,
            ignore_labels=arguments.ignore_labels,
            stride=arguments.stride,
            **_length_options(arguments),
            **_batch_options(arguments),
        )
    label = "entity" if arguments.aggregation_strategy == "none" else "entity_group"
    for text, entities in zip(texts, answers, strict=True):
        if arguments.json:
            print(json.dumps(entities))
            continue
        print(text)
        for entity in entities:
            print(f"  {entity['score']:.4f}  {entity[label]:<8} {entity['start']}-{entity['end']}  {entity['word']}")


def _verify(arguments: argparse.Namespace) -> None:
    from gte_deploy.bundle.inspection import check_graphs
    from gte_deploy.bundle.manifest import open_bundle

    manifest = open_bundle(arguments.bundle)
    check_graphs(arguments.bundle, manifest)
    size = sum(entry.size for entry in manifest.files.values())
    check = None
    if arguments.checkpoint is not None:
        from gte_deploy.exporters.verification.answers import verify_against

        check = verify_against(arguments.bundle, arguments.checkpoint)
    if arguments.json:
        facts = {"path": str(arguments.bundle), "verified": True, "files": len(manifest.files), "bytes": size}
        print(json.dumps(facts if check is None else {**facts, "answers": check.to_json()}))
        return
    print(f"{arguments.bundle}: {len(manifest.files)} files, {size:,} bytes, all as the manifest says")
    if check is not None:
        compared = ", ".join(f"{what} {value}" for what, value in check.compared.items())
        print("\n".join([f"It answers as {arguments.checkpoint} does: {compared}", *check.skipped]))


def _info(arguments: argparse.Namespace) -> None:
    from gte_deploy.backends.choice import choose_engine
    from gte_deploy.bundle.manifest import is_bundle, read_manifest

    if arguments.model is not None and is_bundle(Path(arguments.model)):
        manifest = read_manifest(Path(arguments.model))
        facts = {"path": arguments.model, "kind": "bundle", **manifest.to_json()}
        facts["files"] = {name: entry.size for name, entry in manifest.files.items()}
        facts["engine"] = dataclasses.asdict(choose_engine(manifest))
    else:
        facts = _checkpoint_info(arguments.model)
    if arguments.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, (dict, list, tuple)) else value}")


def _bench(arguments: argparse.Namespace) -> None:
    from gte_deploy.tuning.bench import bench, fastest, format_table, record

    if arguments.pick and (arguments.threads is not None or arguments.backend is not None):
        raise InputError("--pick measures every engine as it is loaded by default; leave out --threads and --backend")
    report = bench(
        arguments.bundle,
        backend=arguments.backend,
        shapes=arguments.shapes,
        repeats=arguments.repeats,
        num_threads=arguments.threads,
        progress=lambda line: print(f"{_PROG}: {line}", file=sys.stderr, flush=True),
    )
    picked = None
    if arguments.pick:
        picked = fastest(report, precision_may_change=arguments.precision_may_change)
        file = record(report, picked)
        print(f"{_PROG}: recorded {picked.name} in {file}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({**report.to_json(), "picked": picked and picked.name}))
        return
    print(format_table(report))
    if picked is not None:
        print(f"picked {picked.name}: load takes it for this bundle, on this machine, with backend 'auto'")


def _checkpoint_info(name: str | None) -> dict[str, Any]:
    from gte_deploy.core.quiet import keep_caches_in_ours
    from gte_deploy.models import resolve_checkpoint
    from gte_deploy.models.description import describe

    keep_caches_in_ours()
    folder = resolve_checkpoint(name)
    try:
        spec = describe(folder).spec
    except ModuleNotFoundError as error:
        raise MissingDependencyError("transformers", "torch") from error
    return {"path": str(folder), "kind": "checkpoint", "spec": dataclasses.asdict(spec)}


def _load(arguments: argparse.Namespace, task: Task | None = None) -> "Model":
    """The model of the command line; `task` is what a checkpoint is loaded for, where it is made for another."""
    from gte_deploy.bundle.manifest import is_bundle
    from gte_deploy.loading import load

    return load(
        arguments.model,
        backend=arguments.backend,
        precision=arguments.compute_precision,
        device=arguments.device,
        num_threads=arguments.threads,
        task="auto" if task is None or (arguments.model is not None and is_bundle(Path(arguments.model))) else task,
    )


def _length_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"truncation": arguments.truncation, "max_length": arguments.max_length}


def _batch_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"batch_size": arguments.batch_size, "max_batch_tokens": arguments.max_batch_tokens}


def _texts(arguments: argparse.Namespace) -> list[str]:
    """The texts of the command line, or the lines of --input."""
    if arguments.texts:
        if arguments.input is not None:
            raise InputError("give texts as arguments or with --input, not both")
        return list(arguments.texts)
    source = arguments.input or _STDIN
    if source == _STDIN and arguments.input is None and sys.stdin.isatty():
        raise InputError("no texts: give them as arguments, with --input FILE, or on stdin")
    try:
        data = sys.stdin.buffer.read() if source == _STDIN else Path(source).read_bytes()
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8: {error.reason} at byte {error.start:,}") from error
    except OSError as error:
        raise InputError(f"--input {source} cannot be read: {error.strerror}") from error
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _save_array(path: Path, array: Any) -> None:
    import numpy as np

    from gte_deploy.core.files import write_with

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_with(path, write)


def _never_fail_to_print() -> None:
    # A terminal that is not UTF-8 gets escapes, not a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> int:
    print(f"{_PROG}: error: {message}", file=sys.stderr)
    return code
