"""gte-deploy: results on stdout, the rest on stderr, exit codes, no traceback."""

import contextlib
import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import sentence_transformers
import transformers

import gte_deploy
from factories import add_multi_vector_modules, add_tokens, write_labels
from gte_deploy import cli
from gte_deploy.cli_options import (
    BatchingOptions,
    BenchOptions,
    ClassifyTokensOptions,
    EncodeHybridOptions,
    EncodeOptions,
    EncodeSparseOptions,
    FillMaskOptions,
    LoadOptions,
    ModelOptions,
    PromptOptions,
    RankOptions,
)
from gte_deploy.core import exit_codes
from gte_deploy.core.errors import BundleError, InputError, MissingDependencyError
from gte_deploy.core.options import options_of
from gte_deploy.tuning.bench import bench
from runtime_models import make_word_checkpoint

TEXT = "Paris is the [MASK] of France."


@pytest.fixture(scope="module")
def checkpoints(word_checkpoints):
    return {task: str(path) for task, path in word_checkpoints.items()}


@pytest.fixture(scope="module")
def late_checkpoint(tmp_path_factory):
    folder = make_word_checkpoint(tmp_path_factory.mktemp("late") / "model", task="embed")
    config = {"query_prefix": "king", "document_prefix": "queen", "query_length": 16, "document_length": 24}
    return add_multi_vector_modules(folder, config={**config, "prompts": {"query": "the ", "document": ""}})


@pytest.fixture
def run(capsys):
    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


def test_fill_mask(run, checkpoints):
    code, out, _ = run("fill-mask", "-m", checkpoints["fill-mask"], "--json", "-k", 2, TEXT, "a [MASK] [MASK]")
    assert code == exit_codes.OK
    with gte_deploy.load(checkpoints["fill-mask"]) as model:
        expected = model.fill_mask([TEXT, "a [MASK] [MASK]"], top_k=2)
    assert [json.loads(line) for line in out.splitlines()] == expected


def test_fill_mask_for_people(run, checkpoints):
    code, out, _ = run("fill-mask", "-m", checkpoints["fill-mask"], TEXT, "a [MASK] [MASK]", "-k", 2)
    assert code == exit_codes.OK
    lines = out.splitlines()
    assert len(lines) == 1 + 2 + 1 + 4 and lines[0] == TEXT and lines[3] == "a [MASK] [MASK]"
    assert all(line.startswith("  0.") for line in (*lines[1:3], *lines[4:]))


DIRECT = (
    (ModelOptions, gte_deploy.load),
    (LoadOptions, gte_deploy.load),
    (FillMaskOptions, gte_deploy.Model.fill_mask),
    (EncodeOptions, gte_deploy.Model.encode),
    (PromptOptions, gte_deploy.Model.encode),
    (EncodeSparseOptions, gte_deploy.Model.encode_sparse),
    (EncodeHybridOptions, gte_deploy.Model.encode_hybrid),
    (PromptOptions, gte_deploy.Model.encode_hybrid),
    (PromptOptions, gte_deploy.Model.encode_sparse),
    (RankOptions, gte_deploy.Model.rank),
    (ClassifyTokensOptions, gte_deploy.Model.classify_tokens),
    (BenchOptions, bench),
    *(
        (BatchingOptions, getattr(gte_deploy.Model, name))
        for name in ("fill_mask", "encode", "encode_sparse", "encode_hybrid")
    ),
    *((BatchingOptions, getattr(gte_deploy.Model, name)) for name in ("predict", "classify_tokens")),
)


@pytest.mark.parametrize(("kind", "function"), DIRECT, ids=lambda value: value.__name__)
def test_options_are_the_functions_arguments_with_its_defaults(kind, function):
    """`--help` states a function's own default, and what is not given is left to the function."""
    parameters = inspect.signature(function).parameters
    for name, (default, _) in options_of(kind).items():
        parameter = parameters["precision" if name == "compute_precision" else name]
        assert parameter.default == (inspect.Parameter.empty if default is dataclasses.MISSING else default), name


def test_only_what_is_given_is_passed_on(run, monkeypatch):
    calls = []
    monkeypatch.setattr("gte_deploy.loading.load", lambda **options: calls.append(options) or FakeModel(calls))
    assert run("encode", "a")[0] == run("encode", "-m", "x", "--compute-precision", "bf16", "--max-len", 9, "a")[0] == 0
    progress = {"show_progress_bar": sys.stderr.isatty()}
    assert calls[:2] == [{"path": "gte-en-embed-tiny"}, progress]
    assert calls[2:] == [{"path": "x", "precision": "bf16"}, {**progress, "max_length": 9}]


class FakeModel(contextlib.nullcontext):
    """Records the options of `encode`."""

    def __init__(self, calls):
        super().__init__(self)
        self.calls = calls
        self.spec = types.SimpleNamespace(task="embed")

    def encode(self, texts, **options):
        self.calls.append(options)
        return np.zeros((len(texts), 2), np.float32)


@pytest.mark.parametrize("flag", ["--max-len", "--max-length"])
def test_two_spellings_of_the_longest_input(flag, run, checkpoints):
    code, _, err = run("encode", "-m", checkpoints["embed"], flag, 4, "the king of the old city")
    assert code == exit_codes.USAGE and "limit is 4" in err
    code, out, _ = run("encode", "-m", checkpoints["embed"], flag, 4, "--truncation", "the king of the old city")
    assert code == exit_codes.OK and len(json.loads(out)) == 32


def test_help_loads_no_library():
    """`--help` answers at once: of what is slow to import, nothing is loaded."""
    code = """if True:
        import sys
        from gte_deploy import cli
        for command in ((), *((name,) for name in cli._COMMANDS)):
            try:
                cli.main([*command, "--help"])
            except SystemExit as stop:
                assert stop.code == 0
        slow = {"numpy", "tokenizers", "torch", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt"}
        assert not slow & set(sys.modules), slow & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for name in cli._COMMANDS:
        assert f"usage: gte-deploy {name} " in done.stdout


def test_targets(run, checkpoints, caplog):
    code, out, _ = run("fill-mask", "-m", checkpoints["fill-mask"], TEXT, "--json", "--targets", "city", "kingly")
    assert code == exit_codes.OK
    assert {answer["token_str"] for answer in json.loads(out)} == {"city", "king"}
    assert "kingly" in caplog.text  # the warning


def test_encode_prints_a_line_for_each_text(run, checkpoints):
    code, out, _ = run("encode", "-m", checkpoints["embed"], "--normalize", "--truncate-dim", 8, "a", "the king")
    assert code == exit_codes.OK
    got = np.array([json.loads(line) for line in out.splitlines()])
    with gte_deploy.load(checkpoints["embed"]) as model:
        expected = model.encode(["a", "the king"], normalize_embeddings=True, truncate_dim=8)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_encode_writes_an_array(run, checkpoints, tmp_path):
    (tmp_path / "texts").write_bytes("a\r\nthe king\n\nété\n".encode())
    output = tmp_path / "out.npy"
    code, out, err = run(
        "encode", "-m", checkpoints["embed"], "-i", tmp_path / "texts", "-o", output, "--prompt-name", "query"
    )
    assert (code, out) == (exit_codes.OK, "") and "(4, 32) float32" in err
    with gte_deploy.load(checkpoints["embed"]) as model:
        expected = model.encode(["a", "the king", "", "été"], prompt_name="query")
    np.testing.assert_allclose(np.load(output, allow_pickle=False), expected, atol=1e-6)
    assert output.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts"]


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (("--chunks", "tokens:4", "--chunk-overlap", 1), gte_deploy.TokenChunks(4, 1)),
        (("--chunks", "sentences:9"), gte_deploy.SentenceChunks(9)),
    ],
)
def test_encode_prints_a_line_for_each_chunk(run, checkpoints, given, rule):
    texts = ["the king is old. the queen! ", "", "a city"]
    code, out, _ = run("encode", "-m", checkpoints["embed"], *given, "--window-overlap", 2, "--max-len", 9, *texts)
    assert code == exit_codes.OK
    with gte_deploy.load(checkpoints["embed"]) as model:
        expected = model.encode(texts, chunks=rule, window_overlap=2, max_length=9)
    lines = [json.loads(line) for line in out.splitlines()]
    places = [[number, *place] for number, each in enumerate(expected) for place in each.offsets.tolist()]
    assert [[line["text"], line["start"], line["end"]] for line in lines] == places
    vectors = np.concatenate([each.embeddings for each in expected])
    np.testing.assert_allclose([line["embedding"] for line in lines], vectors, atol=1e-6)


def test_rank(run, checkpoints):
    arguments = ("rank", "-m", checkpoints["classify"], "-q", "the king", "a queen", "water", "time")
    code, out, _ = run(*arguments, "--json", "-k", 2)
    assert code == exit_codes.OK
    with gte_deploy.load(checkpoints["classify"]) as model:
        expected = model.rank("the king", ["a queen", "water", "time"], 2, return_documents=True)
    assert [json.loads(line)["corpus_id"] for line in out.splitlines()] == [entry["corpus_id"] for entry in expected]
    assert len(run(*arguments)[1].splitlines()) == 3


def test_encode_multi_vector(run, late_checkpoint, checkpoints):
    texts = ["the king", "a queen, and water"]
    with gte_deploy.load(late_checkpoint, backend="torch") as model:
        expected = {"query": model.encode_query(texts), "document": model.encode_document(texts)}
        ranking = model.rank(texts[0], texts, return_documents=True)
    for route, arguments in {"query": ("--route", "query"), "document": ()}.items():
        code, out, _ = run("encode-multi-vector", "-m", late_checkpoint, *arguments, *texts)
        assert code == exit_codes.OK
        for line, vectors in zip(out.splitlines(), expected[route], strict=True):
            np.testing.assert_allclose(json.loads(line), vectors, atol=1e-6)
    code, out, _ = run("rank", "-m", late_checkpoint, "--json", "-q", texts[0], *texts)
    assert code == exit_codes.OK
    assert [json.loads(line)["corpus_id"] for line in out.splitlines()] == [entry["corpus_id"] for entry in ranking]
    code, _, err = run("encode", "-m", late_checkpoint, *texts)
    assert code == exit_codes.USAGE and "use gte-deploy encode-multi-vector" in err
    code, _, err = run("encode-multi-vector", "-m", checkpoints["embed"], *texts)
    assert code == exit_codes.USAGE and "is made for embed" in err


def test_rank_by_maxsim(run, tmp_path, bundle_of):
    """The command ranks with a bundle of a multi-vector model as MultiVectorEncoder does with the checkpoint."""
    checkpoint = add_tokens(make_word_checkpoint(tmp_path / "late", task="embed", seed=4), ["[Q] ", "[D] "])
    settings = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 24}
    add_multi_vector_modules(checkpoint, config=settings)
    documents = ["a queen, and a king!", "water", "the king", "the river of the city"]
    library = sentence_transformers.MultiVectorEncoder(str(checkpoint), device="cpu")
    scores = library.similarity(library.encode_query(["to the king"]), library.encode_document(documents))[0].numpy()
    command = ("rank", "-m", bundle_of(checkpoint), "-q", "the king", "--prompt", "to ", *documents)
    code, out, _ = run(*command, "--json", "-k", 3)
    assert code == exit_codes.OK
    found, best = [json.loads(line) for line in out.splitlines()], np.argsort(-scores)[:3]
    assert [entry["corpus_id"] for entry in found] == best.tolist() and found[0]["text"] == documents[best[0]]
    np.testing.assert_allclose([entry["score"] for entry in found], scores[best], atol=1e-3)
    code, _, err = run(*command, "the river of the city " * 9)
    says = "document 4 has at least 34 tokens, special tokens included; the limit is 24"
    assert code == exit_codes.USAGE and says in err


def test_rank_names_the_text_that_is_too_long(run, checkpoints, late_checkpoint):
    long = "the river of the city " * 40
    for arguments, says in (
        (("-q", long, "water", "time"), "the query is too long: with document 0 it has 204 tokens"),
        (("-q", "time", "water", long), "document 1, with the query, has 204 tokens"),
    ):
        code, _, err = run("rank", "-m", checkpoints["classify"], *arguments)
        assert code == exit_codes.USAGE and says in err and "Pass --truncation" in err
        assert run("rank", "-m", checkpoints["classify"], *arguments, "--truncation")[0] == exit_codes.OK
    for arguments, says in (
        (("-q", long, "water", "time"), "the query has "),
        (("-q", "time", "water", long), "document 1 has "),
    ):
        code, _, err = run("rank", "-m", late_checkpoint, *arguments)
        assert code == exit_codes.USAGE and says in err


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Three labels, of which two have names."""
    folder = tmp_path_factory.mktemp("classifier") / "c"
    make_word_checkpoint(folder, task="classify", num_labels=3, seed=5)
    write_labels(folder, ["bad", "good", "unclear"])
    return str(folder)


@pytest.mark.parametrize("function", [None, "sigmoid", "none"])
def test_predict(run, classifier, function):
    """All labels of each text, as transformers' pipeline gives them."""
    texts = ["the king", "old water, and a good book"]
    judge = transformers.pipeline("text-classification", classifier, dtype="float32", device="cpu")
    expected = judge(texts, top_k=None, function_to_apply=function)
    given = () if function is None else ("--function-to-apply", function)
    code, out, _ = run("predict", "-m", classifier, "--json", *given, *texts)
    assert code == exit_codes.OK
    for line, entries in zip(out.splitlines(), expected, strict=True):
        found = json.loads(line)
        assert [entry["label"] for entry in found] == [entry["label"] for entry in entries]
        np.testing.assert_allclose([e["score"] for e in found], [e["score"] for e in entries], atol=1e-5)
    code, out, _ = run("predict", "-m", classifier, *given, *texts)
    lines = out.splitlines()
    assert lines[0] == texts[0] and lines[4] == texts[1] and len(lines) == 2 + 2 * 3
    first = expected[0][0]
    assert lines[1].split() == [f"{first['score']:.4f}", first["label"]]


def test_predict_of_pairs(run, classifier, checkpoints, tmp_path):
    """As CrossEncoder scores them, from arguments and from lines; one label gives one score."""
    pairs = [("the king", "a queen"), ("water", "")]
    (tmp_path / "pairs.tsv").write_text("".join(f"{first}\t{second}\n" for first, second in pairs))
    for checkpoint, softmax in ((classifier, True), (checkpoints["classify"], False)):
        judge = sentence_transformers.CrossEncoder(checkpoint, device="cpu")
        expected = judge.predict(pairs, apply_softmax=softmax).reshape(2, -1)
        for given in ([*pairs[0], *pairs[1]], ["-i", tmp_path / "pairs.tsv"]):
            code, out, err = run("predict", "-m", checkpoint, "--pairs", "--json", *given)
            assert code == exit_codes.OK, err
            scores = [sorted(entry["score"] for entry in json.loads(line)) for line in out.splitlines()]
            np.testing.assert_allclose(scores, np.sort(expected), atol=1e-5)


def test_what_predict_refuses(run, classifier, tagger, checkpoints, tmp_path):
    (tmp_path / "lines").write_text("a\tb\nno tab\n")
    for given, says in (
        (("-m", classifier, "--pairs", "a", "b", "c"), "--pairs takes the texts two by two, and there are 3"),
        (("-m", classifier, "--pairs", "-i", tmp_path / "lines"), "line 2 has 0 tabs"),
        (("-m", tagger, "a"), "use gte-deploy classify-tokens"),
        (("-m", checkpoints["embed"], "a"), "use `gte-deploy encode`"),
    ):
        code, _, err = run("predict", *given)
        assert code == exit_codes.USAGE and says in err


def test_prompts_of_rank(run, checkpoints):
    arguments = ("rank", "-m", checkpoints["classify"], "-q", "the king", "a queen", "water", "--json")
    code, out, _ = run(*arguments, "--prompt", "time ")
    assert code == exit_codes.OK
    with gte_deploy.load(checkpoints["classify"]) as model:
        expected = model.rank("time the king", ["a queen", "water"], return_documents=True)
    assert [json.loads(line) for line in out.splitlines()] == expected
    assert run(*arguments, "--prompt-name", "nobody")[0] == exit_codes.USAGE


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger") / "c"
    make_word_checkpoint(folder, task="token-classify", num_labels=3, seed=4)
    write_labels(folder, ["O", "B-PER", "I-PER"])
    return str(folder)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ((), {}),
        (
            ("--aggregation-strategy", "average", "--ignore-labels"),
            {"aggregation_strategy": "average", "ignore_labels": ()},
        ),
        (
            ("--aggregation-strategy", "simple", "--stride", 2, "--max-length", 8, "--ignore-labels", "PER"),
            {"aggregation_strategy": "simple", "stride": 2, "max_length": 8, "ignore_labels": ["PER"]},
        ),
        (("--truncation", "--max-length", 4), {"truncation": True, "max_length": 4}),
    ],
)
def test_classify_tokens(options, arguments, run, tagger):
    texts = ["the king walked to the old city of france", "paris"]
    code, out, _ = run("classify-tokens", *texts, "-m", tagger, "--json", *options)
    assert code == exit_codes.OK
    with gte_deploy.load(tagger) as model:
        expected = model.classify_tokens(texts, **arguments)
    assert [json.loads(line) for line in out.splitlines()] == expected


def test_classify_tokens_for_people(run, tagger):
    text = "the old king of france"
    code, out, _ = run("classify-tokens", text, "-m", tagger, "--ignore-labels")
    lines = out.splitlines()
    assert code == exit_codes.OK and lines[0] == text and len(lines) == 6
    assert lines[1].split()[2:] == ["0-3", "the"] and lines[1].split()[1] in ("O", "B-PER", "I-PER")


def test_verify_and_info_of_a_bundle(run, word_checkpoints, bundle_of, tmp_path):
    bundle = bundle_of(word_checkpoints["embed"])
    code, out, _ = run("verify", bundle)
    written = json.loads((bundle / "manifest.json").read_bytes())["checksum"]
    assert code == exit_codes.OK and out.endswith(f"all as the manifest says, checksum {written}\n")
    code, out, _ = run("verify", bundle, "--json")
    assert code == exit_codes.OK and json.loads(out)["verified"] is True and json.loads(out)["checksum"] == written
    code, out, _ = run("info", bundle, "--json")
    facts = json.loads(out)
    assert code == exit_codes.OK and (facts["kind"], facts["spec"]["task"]) == ("bundle", "embed")
    assert facts["files"]["tokenizer.json"] == (bundle / "tokenizer.json").stat().st_size
    report = json.loads((bundle / "report.json").read_text())
    verified = [engine["title"] for engine in report["parity"]["engines"] if engine["passed"]]
    assert (facts["verified"], facts["made_for"]) == (verified, "CPUs")
    code, out, _ = run("info", bundle)
    assert code == exit_codes.OK and out.startswith(f"{bundle}: a bundle\n") and "{" not in out
    assert all(title in out for title in verified)
    rows = dict(line.strip().split("  ", 1) for line in out.splitlines()[1:-1] if not line.startswith("   "))
    assert rows["task"].strip() == "embed" and rows["precision"].strip() == "fp32"
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file() and file.name != "manifest.json")
    assert rows["size"].strip().startswith(f"{size / 1e6:,.1f} MB in ")

    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{}")
    code, out, err = run("verify", tmp_path / "b")
    assert (code, out) == (exit_codes.FAILURE, "") and "config.json has 2 bytes" in err


def test_info_of_a_checkpoint(run, checkpoints):
    code, out, _ = run("info", checkpoints["classify"], "--json")
    facts = json.loads(out)
    assert code == exit_codes.OK and (facts["kind"], facts["spec"]["task"]) == ("checkpoint", "classify")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), exit_codes.USAGE, "COMMAND"),
        (("fly",), exit_codes.USAGE, "invalid choice"),
        (("fill-mask", "-m", "{fill-mask}", "no mask here"), exit_codes.USAGE, "input 0 has no mask"),
        (("fill-mask", "-m", "{fill-mask}", TEXT, "-k", "0"), exit_codes.USAGE, "--top-k must be"),
        (("fill-mask", "-m", "{embed}", TEXT), exit_codes.USAGE, "needs a fill-mask model"),
        (("fill-mask", "-m", "{fill-mask}", "[MASK] \udcff"), exit_codes.USAGE, "lone surrogate"),
        (("encode", "-m", "{embed}", "the " * 200), exit_codes.USAGE, "limit is 128"),
        (("encode", "-m", "{embed}", "a", "-i", "x"), exit_codes.USAGE, "not both"),
        (("encode", "-m", "{embed}", "-i", "/nowhere/x"), exit_codes.USAGE, "cannot be read"),
        (("encode", "-m", "{embed}", "a", "-o", "/nowhere/x.npy"), exit_codes.USAGE, "folder does not exist"),
        (("encode", "a", "--chunks", "words:3"), exit_codes.USAGE, "expected tokens:N or sentences:N"),
        (("encode", "a", "--chunks", "tokens:0"), exit_codes.USAGE, "size must be"),
        (("encode", "a", "--chunks", "sentences:3", "--chunk-overlap", "1"), exit_codes.USAGE, "do not overlap"),
        (("encode", "a", "--chunk-overlap", "1"), exit_codes.USAGE, "pass --chunks"),
        (("encode", "a", "--window-overlap", "1"), exit_codes.USAGE, "pass --chunks"),
        (("encode", "a", "--chunks", "tokens:3", "-o", "x.npy"), exit_codes.USAGE, "leave one out"),
        (("encode", "-m", "{embed}", "a", "--device", "tpu"), exit_codes.USAGE, "device must be"),
        (("encode", "-m", "{embed}", "a", "--backend", "onnx"), exit_codes.FAILURE, "gte-export"),
        (("encode", "-m", "/nowhere", "a"), exit_codes.FAILURE, "no folder"),
        (("rank", "-m", "{classify}", "a"), exit_codes.USAGE, "--query"),
        (("verify", "/nowhere"), exit_codes.FAILURE, "no folder"),
        (("info", "/nowhere"), exit_codes.FAILURE, "no folder"),
    ],
)
def test_exit_codes(run, checkpoints, arguments, code, message):
    filled = [checkpoints[a[1:-1]] if a.startswith("{") else a for a in arguments]
    got, out, err = run(*filled)
    assert (got, out) == (code, "")
    assert message in err


def test_exit_code_of_errors():
    assert exit_codes.exit_code_of(InputError("x")) == exit_codes.USAGE
    assert exit_codes.exit_code_of(BundleError("x")) == exit_codes.FAILURE
    assert exit_codes.exit_code_of(MissingDependencyError("onnxruntime", "cpu")) == exit_codes.MISSING_DEPENDENCY


def test_help_states_the_exit_codes(run):
    for arguments in (["--help"], ["encode", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "exit codes: 0 done" in out


@pytest.fixture(scope="module")
def bundles(word_checkpoints, bundle_of):
    """For the tests that start a process: a bundle loads without importing torch."""
    return {task: str(bundle_of(word_checkpoints[task])) for task in ("fill-mask", "embed")}


def command(*arguments):
    return [sys.executable, "-m", "gte_deploy", *map(str, arguments)]


def test_stdin_and_a_reader_that_leaves(bundles):
    process = subprocess.Popen(
        command("encode", "-m", bundles["embed"]),
        stdin=-1,
        stdout=-1,
        stderr=-1,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    process.stdout.close()
    _, err = process.communicate(b"the king\n" * 400, timeout=120)
    assert process.returncode == exit_codes.BROKEN_PIPE
    assert b"Traceback" not in err and b"Exception ignored" not in err


def test_warnings_go_to_stderr(bundles):
    done = subprocess.run(
        command("fill-mask", "-m", bundles["fill-mask"], TEXT, "--json", "--targets", "kingly"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == exit_codes.OK and json.loads(done.stdout)[0]["token_str"] == "king"
    assert "gte-deploy: WARNING: The target 'kingly'" in done.stderr


def test_input_that_is_not_utf8(bundles):
    done = subprocess.run(
        command("encode", "-m", bundles["embed"]), input=b"a\n\xff\n", capture_output=True, timeout=120, check=False
    )
    assert done.returncode == exit_codes.USAGE
    assert b"not UTF-8" in done.stderr and b"byte 2" in done.stderr and b"Traceback" not in done.stderr


def test_interrupted(bundles):
    process = subprocess.Popen(command("encode", "-m", bundles["embed"], "-i", "-"), stdin=-1, stdout=-1, stderr=-1)
    time.sleep(1.5)  # it is waiting for its input
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == exit_codes.INTERRUPTED
    assert b"interrupted" in err and b"Traceback" not in err


def test_a_missing_dependency(run, word_checkpoints, bundle_of, monkeypatch):
    bundle = bundle_of(word_checkpoints["embed"])
    for engine in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, engine, None)
    code, _, err = run("encode", "-m", bundle, "a")
    assert code == exit_codes.MISSING_DEPENDENCY and "[cpu]" in err
